"""What this runtime can execute. Imports no torch, so that planning can ask."""

from __future__ import annotations

from moepack.budget import (
    layer_segment,
    placement_memory,
    require_low_copies,
    stored_bytes,
)
from moepack.encodings import ENCODINGS
from moepack.errors import BudgetTooSmallError, CapabilityError, PlanMismatchError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import POLICIES, PREFETCH_MODES, EngineCapabilities, Placement, Plan, Policy
from moepack.trunk import TRUNK_ENCODINGS, trunk_name
from moepack.units import format_size

CAPABILITIES = EngineCapabilities(
    policies=POLICIES,
    devices=("cpu", "cuda"),
    prefetch=PREFETCH_MODES,
    max_prefetch_depth=4096,
    shared_pool=True,
    as_ready=True,
    encodings=tuple(ENCODINGS),
    low_copies=("cpu",),
    mixed_layers=True,
    trunks=TRUNK_ENCODINGS,
)


def require_own(plan: Plan) -> None:
    """Refuse to execute a plan that was made for an engine with other capabilities.

    Raises
    ------
    CapabilityError
        Always for such a plan, even where this engine could carry it out: its forecast is another
        engine's.
    """
    if plan.assumed_engine:
        raise CapabilityError(
            "the plan was made for an engine that can do more than this one; plan again without "
            "--assume-engine"
        )


def require_capable(placement: Placement, engine: EngineCapabilities = CAPABILITIES) -> None:
    """Refuse a placement that asks for more than an engine does.

    Raises
    ------
    CapabilityError
        Naming the layer, what it asks for and what there is.
    """
    for layer in placement.layers:
        what = f"layer {layer.layer}"
        _require_policy(what, layer.policy, engine)
        depth = layer.prefetch_depth
        if layer.prefetch not in engine.prefetch or depth > engine.max_prefetch_depth:
            raise CapabilityError(
                f"{what} wants {depth} experts fetched ahead (prefetch {layer.prefetch!r}); this "
                f"engine has {', '.join(engine.prefetch)}, and {engine.max_prefetch_depth} at "
                "most; plan again with this moepack"
            )
    if placement.pool is not None:
        if not engine.shared_pool:
            raise CapabilityError(
                f"the plan has {placement.pool.slots} slots that all layers share; this engine "
                "gives each layer its own; plan again with this moepack"
            )
        _require_policy("the shared pool", placement.pool.policy, engine)


def _require_low_copies(spec: ModelSpec, layout: Layout, placement: Placement) -> None:
    """Refuse a placement that replaces missing experts where there is nothing to replace them by.

    Raises
    ------
    CapabilityError, EncodingError, PlanMismatchError
        Naming what is in the way.
    """
    if placement.on_miss is None:
        return
    if placement.device not in CAPABILITIES.low_copies:
        raise CapabilityError(
            f"the plan replaces missing experts by low copies on {placement.device}; this engine "
            f"does on {', '.join(CAPABILITIES.low_copies)}; plan without --on-miss"
        )
    if not layout.low:
        raise PlanMismatchError(
            "the placement replaces missing experts by low copies, the layout has none; plan again "
            "and pack"
        )
    require_low_copies(spec, layout)


def require_encodings(layout: Layout, engine: EngineCapabilities = CAPABILITIES) -> None:
    """Refuse a layout of which an engine cannot compute with the trunk, or some layer's experts.

    Raises
    ------
    CapabilityError
        Naming the layer, its encoding and those that there are.
    """
    if layout.trunk not in engine.trunks:
        raise CapabilityError(
            f"the layout holds the trunk in {trunk_name(layout.trunk)}; this engine computes with "
            f"{', '.join(map(trunk_name, engine.trunks))}; plan again with this moepack"
        )
    for cut in layout.layers:
        for name in cut.classes:
            if name not in engine.encodings:
                raise CapabilityError(
                    f"layer {cut.layer} holds its experts as {name!r}; this engine computes with "
                    f"{', '.join(engine.encodings)}; plan again with this moepack"
                )
        if cut.encodings and not engine.mixed_layers:
            raise CapabilityError(
                f"layer {cut.layer} holds its experts as {' and '.join(cut.classes)}; this engine "
                "wants those of one layer alike; plan again with one encoding a layer"
            )


def _require_policy(what: str, policy: Policy, engine: EngineCapabilities) -> None:
    if policy not in engine.policies:
        raise CapabilityError(
            f"{what} wants the policy {policy!r}; this engine has {', '.join(engine.policies)}; "
            "plan again with this moepack"
        )


def _require_alike(spec: ModelSpec, layout: Layout, placement: Placement) -> None:
    """Refuse a shared pool over experts that do not fit one another's slots."""
    assert placement.pool is not None
    first = layout.layers[0]
    shape = layer_segment(spec, first, "top")
    for cut in layout.layers:
        if cut.split != cut.width:
            raise PlanMismatchError(
                f"all layers share slots for whole experts, and layer {cut.layer} is cut at "
                f"{cut.split} of {cut.width} neurons; plan again"
            )
        if cut.encodings:
            raise PlanMismatchError(
                f"all layers share slots of one size, and layer {cut.layer} holds experts in "
                f"{', '.join(cut.classes)}; plan again"
            )
        if layer_segment(spec, cut, "top") != shape:
            raise PlanMismatchError(
                f"all layers share slots of one size, and an expert of layer {cut.layer} takes "
                f"{stored_bytes(spec, cut, 'top')} bytes, one of layer {first.layer} "
                f"{stored_bytes(spec, first, 'top')}; plan again"
            )
    experts = sum(len(layer.hot) for layer in placement.layers)
    if placement.pool.slots > experts:
        raise PlanMismatchError(
            f"the plan shares {placement.pool.slots} slots among {experts} experts; expected no "
            "more slots than experts; plan again"
        )


def require_fit(spec: ModelSpec, layout: Layout, placement: Placement) -> None:
    """Refuse a placement that this engine, this layout or this budget cannot carry.

    Raises
    ------
    CapabilityError
        When it asks for a policy, a pool, prefetching or an encoding that the engine lacks.
    PlanMismatchError
        When its bytes are not those of this model and layout, or the layers cannot share a pool.
    BudgetTooSmallError
        When it needs more than its budget, naming the missing bytes.
    """
    require_capable(placement)
    require_encodings(layout)
    for layer in placement.layers:
        experts = spec.moe(layer.layer).num_experts
        if len(layer.hot) != experts:
            raise PlanMismatchError(
                f"the plan ranks {len(layer.hot)} experts of layer {layer.layer}, the model has "
                f"{experts}; plan again"
            )
    _require_low_copies(spec, layout, placement)
    if placement.pool is not None:
        _require_alike(spec, layout, placement)
    needed = placement_memory(spec, layout, placement)
    if needed != placement.memory:
        raise PlanMismatchError(
            f"the plan reserves {format_size(placement.memory.total_bytes)}, this model and layout "
            f"need {format_size(needed.total_bytes)}; the plan was made for others: plan again"
        )
    missing_bytes = needed.total_bytes - placement.fast_budget_bytes
    if missing_bytes > 0:
        raise BudgetTooSmallError(
            f"the plan needs {format_size(needed.total_bytes)}, the budget is "
            f"{format_size(placement.fast_budget_bytes)}: {missing_bytes} bytes are missing; plan "
            "again with a larger --vram or a smaller --context",
            missing_bytes=missing_bytes,
        )
