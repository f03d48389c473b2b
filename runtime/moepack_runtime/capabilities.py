"""What this runtime can execute. Imports no torch, so that planning can ask."""

from __future__ import annotations

from moepack.budget import memory_breakdown
from moepack.errors import BudgetTooSmallError, CapabilityError, PlanMismatchError
from moepack.model_spec import ModelSpec
from moepack.plan import EngineCapabilities, Layout, Placement
from moepack.units import format_size

CAPABILITIES = EngineCapabilities(policies=("lru",), devices=("cpu", "cuda"))


def require_capable(placement: Placement) -> None:
    """Refuse a placement that asks for more than this engine does.

    Raises
    ------
    CapabilityError
        Naming the layer, what it asks for and what there is.
    """
    for layer in placement.layers:
        if layer.policy not in CAPABILITIES.policies:
            raise CapabilityError(
                f"layer {layer.layer} wants the policy {layer.policy!r}; this engine has "
                f"{', '.join(CAPABILITIES.policies)}; plan again with this moepack"
            )
        if layer.prefetch_depth > CAPABILITIES.max_prefetch_depth:
            raise CapabilityError(
                f"layer {layer.layer} wants {layer.prefetch_depth} experts fetched ahead; this "
                f"engine does {CAPABILITIES.max_prefetch_depth}; plan again with this moepack"
            )


def require_fit(spec: ModelSpec, layout: Layout, placement: Placement) -> None:
    """Refuse a placement that this engine, this layout or this budget cannot carry.

    Raises
    ------
    CapabilityError
        When it asks for a policy or prefetching that the engine lacks.
    PlanMismatchError
        When its bytes are not those of this model and layout.
    BudgetTooSmallError
        When it needs more than its budget, naming the missing bytes.
    """
    require_capable(placement)
    needed = memory_breakdown(
        spec,
        layout,
        placement.layers,
        staging_experts=placement.staging_experts,
        context_tokens=placement.context_tokens,
        threads=placement.threads,
        pool=placement.pool,
    )
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
