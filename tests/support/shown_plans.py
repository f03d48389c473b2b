"""Plans made up for what shows them: no model, no planner."""

from __future__ import annotations

from collections.abc import Sequence

from moepack.footprint import MemoryBreakdown
from moepack.forecast import Baseline, PlannerReport, Prediction, Provenance
from moepack.layout import LayerLayout, Layout
from moepack.plan import PLAN_VERSION, LayerPlacement, Placement, Plan, Policy, SharedPool
from moepack.units import GIB, MIB
from tests.support.caches import half_life_of

EXPERTS = 16
WIDTH = 128


def baseline(tpot_s: float, *, ttft_s: float = 1.0, why_not: str = "") -> Baseline:
    return Baseline(ttft_s, tpot_s, 0.5, 1e6, eligible=not why_not, why_not=why_not)


def shown_plan(
    *,
    tops: Sequence[int] = (4, 4, 8),
    bottoms: Sequence[int] | None = None,
    splits: Sequence[float] | None = None,
    policies: Sequence[Policy] | None = None,
    tpot_s: float = 0.05,
    ttft_s: float = 1.0,
    hit_rate: float = 0.6,
    budget_bytes: int = 12 * GIB,
    chosen: str = "optimised",
    baselines: dict[str, Baseline] | None = None,
    pool: SharedPool | None = None,
    name: str = "a-model",
    assumptions: tuple[str, ...] = (),
) -> Plan:
    """A plan of as many layers as there are entries in ``tops``; 16 experts each."""
    count = len(tops)
    splits = splits or [1.0] * count
    layout = Layout(
        "0" * 64,
        tuple(
            LayerLayout(layer, round(split * WIDTH), WIDTH, 16, "BF16")
            for layer, split in enumerate(splits)
        ),
    )
    kept_by = policies or ["lcp"] * count
    layers = tuple(
        LayerPlacement(
            layer=layer,
            budget_bytes=0 if pool else kept * MIB,
            top_slots=0 if pool else kept,
            bottom_slots=(bottoms or [0] * count)[layer],
            policy=kept_by[layer],
            hot=tuple(range(EXPERTS)),
            half_life_tokens=half_life_of(kept_by[layer], 2.0 ** (4 + layer)),
        )
        for layer, kept in enumerate(tops)
    )
    return Plan(
        version=PLAN_VERSION,
        model_name=name,
        model_digest="0" * 64,
        max_context_tokens=4096,
        layout=layout,
        placement=Placement(
            device="cuda",
            fast_budget_bytes=budget_bytes,
            staging_experts=4,
            context_tokens=1024,
            prompt_tokens=512,
            new_tokens=128,
            memory=MemoryBreakdown(GIB, MIB, MIB, MIB, MIB, 2 * GIB),
            layers=layers,
            pool=pool,
        ),
        prediction=Prediction(
            ttft_s, tpot_s, 1 / tpot_s, hit_rate, hit_rate, 5e6, 3 * GIB, 9 * GIB, 1.5
        ),
        baselines={"lru": baseline(0.06)} if baselines is None else baselines,
        provenance=Provenance("a-machine", False, "derived, by hand", "made up", assumptions),
        planner=PlannerReport(2.5, chosen, 0.001, 1000),
    )
