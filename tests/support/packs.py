"""Plans around a layout and a placement, for packing in tests."""

from __future__ import annotations

from moepack.forecast import PlannerReport, Prediction, Provenance
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import PLAN_VERSION, Placement, Plan


def plan_for(spec: ModelSpec, layout: Layout, placement: Placement) -> Plan:
    """A plan that promises nothing in particular."""
    return Plan(
        version=PLAN_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        max_context_tokens=placement.context_tokens,
        layout=layout,
        placement=placement,
        prediction=Prediction(1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1, 1, 2.0),
        baselines={},
        provenance=Provenance("none", False, "none", "none"),
        planner=PlannerReport(0.0, "optimised", None, 0),
    )
