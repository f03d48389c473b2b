"""What a plan is asked for, and whether it can be made at all."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moepack.budget import fixed_bytes, staging_bytes
from moepack.compute import ComputeProfile
from moepack.encodings import encoding
from moepack.errors import BudgetTooSmallError, CapabilityError, PlanMismatchError
from moepack.hardware import HardwareProfile
from moepack.layout import Layout
from moepack.layouts import Stored, uniform_layout
from moepack.model_spec import ModelSpec
from moepack.plan import DeviceKind, EngineCapabilities, OnMiss, Placement
from moepack.routing import RoutingProfile
from moepack.trunk import trunk_name
from moepack.units import MIB, format_size

#: Share of the host's memory that a process may take when --ram does not say.
DEFAULT_RAM_SHARE = 0.9

#: What cuBLAS takes of VRAM beside the driver's context: its largest default workspace and a MiB of
#: cuBLASLt's, for the stream that computes and for the one that steps are recorded on.
CUBLAS_BYTES = 2 * 33 * MIB


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to be made for.

    Attributes
    ----------
    compute : ComputeProfile
        Measured, or derived from ``hardware``.
    routing : RoutingProfile
        Recorded from this model; or, with ``routing_is_assumed``, sampled from a preset.
    engine : EngineCapabilities
        What the plan may ask for; ``assumed_engine`` says that no such engine is here.
    fast_budget_bytes, ram_budget_bytes : int
        Bound on the fast tier, and on the whole process in host memory (None: what the hardware
        profile allows).
    link : tuple or None
        (bytes per second, latency in seconds) of a throttled link to plan for.
    keep_layout : Layout or None
        Keep the bytes of an existing pack and decide the placement alone.
    encoding : str or None
        What all routed experts are stored in (:mod:`moepack.encodings`); None: in the model's
        dtype. A layout that is kept has its own.
    by_expert : tuple of tuple of str
        Instead of that, of every layer with experts, of every expert by its id. Empty where all are
        stored in ``encoding``.
    low : str
        What a low copy of each is stored in; empty for none. Those of a layout that is kept.
    on_miss : OnMiss or None
        Which missing experts are replaced by it, or left out; None: none.
    calibration : str
        Digest of what rounding is weighed by; empty for nothing. A layout that is kept has its own.
    trunk : str
        What the trunk's large matrices are stored in (:mod:`moepack.trunk`); empty: as the
        checkpoint has them. That of a layout that is kept.
    """

    spec: ModelSpec
    hardware: HardwareProfile
    hardware_is_this_machine: bool
    compute: ComputeProfile
    routing: RoutingProfile
    engine: EngineCapabilities
    device: DeviceKind
    fast_budget_bytes: int
    ram_budget_bytes: int | None = None
    context_tokens: int = 4096
    prompt_tokens: int = 512
    new_tokens: int = 128
    link: tuple[float, float] | None = None
    routing_is_assumed: bool = False
    assumed_engine: bool = False
    keep_layout: Layout | None = None
    encoding: str | None = None
    by_expert: tuple[tuple[str, ...], ...] = ()
    low: str = ""
    on_miss: OnMiss | None = None
    calibration: str = ""
    trunk: str = ""

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What the routed experts of each layer that has some are stored in."""
        if self.keep_layout is not None:
            return tuple(cut.encodings or cut.encoding for cut in self.keep_layout.layers)
        if self.by_expert:
            return tuple(names if len(set(names)) > 1 else names[0] for names in self.by_expert)
        return (self.encoding or self.spec.dtype,) * len(self.spec.moe_layers)

    @property
    def encodings(self) -> frozenset[str]:
        """All that any routed expert is stored in."""
        each = ((names,) if isinstance(names, str) else names for names in self.stored)
        return frozenset(name for names in each for name in names)

    @property
    def is_mixed(self) -> bool:
        """Whether experts of a layer are stored in several encodings."""
        return any(not isinstance(names, str) for names in self.stored)

    @property
    def is_rounded(self) -> bool:
        """Whether any expert is to be stored in a quantised encoding."""
        return bool(self.low) or any(encoding(name).quantised for name in self.encodings)

    def even_layout(self, ratio: float) -> Layout:
        """Every layer cut near the same ratio, in its encoding; mixed layers stay whole.

        Raises
        ------
        UnknownEncodingError, GroupMismatchError
            When the experts cannot be stored so.
        """
        return replace(uniform_layout(self.spec, ratio, encodings=self.stored), trunk=self.trunk)

    @property
    def whole_layout(self) -> Layout:
        """No layer cut."""
        return self.even_layout(1.0)


def with_calibration(request: PlanRequest, layout: Layout) -> Layout:
    """The layout that a plan has: rounded as was asked for, where anything is rounded."""
    if request.keep_layout is not None or not layout.is_rounded:
        return layout
    return replace(layout, calibration=request.calibration)


def within_device(request: PlanRequest) -> PlanRequest:
    """The request with its budget cut down to what the device has left for a model.

    Only a GPU is smaller than what may be asked of it without a word; the host's memory is
    checked with the plan (:func:`require_host_memory`).
    """
    hardware = request.hardware
    if request.device != "cuda" or hardware.vram_bytes is None:
        return request
    free_bytes = hardware.vram_bytes - hardware.device_base_bytes - CUBLAS_BYTES
    return replace(request, fast_budget_bytes=min(request.fast_budget_bytes, max(0, free_bytes)))


def max_context_tokens(request: PlanRequest) -> int:
    """The longest context that fits the budget with one expert in flight and none kept.

    At most the model's own; 0 where nothing fits.
    """
    low, high = 0, request.spec.context_length
    while low < high:
        middle = (low + high + 1) // 2
        if _least_bytes(replace(request, context_tokens=middle)) <= request.fast_budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def _least_bytes(request: PlanRequest) -> int:
    """Bytes of the smallest placement: everything fixed, and one expert in flight."""
    layout = request.keep_layout or request.whole_layout
    low = {request.low} if request.low else set()
    return fixed_bytes(
        request.spec,
        request.context_tokens,
        layout.prefill_block_tokens,
        threads=request.compute.threads,
        encodings=layout.encodings | low,
        trunk=layout.trunk,
    ) + staging_bytes(request.spec, layout, 1)


def require_matching(request: PlanRequest) -> None:
    """Refuse profiles and layouts of another model, and what the engine does not compute with.

    Raises
    ------
    PlanMismatchError
        Naming what is whose, or what there is.
    CapabilityError
        When experts of a layer differ and the engine cannot do that.
    """
    strange = request.encodings.difference(request.engine.encodings)
    if strange:
        raise PlanMismatchError(
            f"experts in {', '.join(sorted(strange))}; this engine computes with "
            f"{', '.join(request.engine.encodings)}: choose one of these"
        )
    if request.is_mixed and not request.engine.mixed_layers:
        raise CapabilityError(
            "experts of one layer in several encodings; this engine wants those of a layer alike: "
            "choose one encoding with --quality"
        )
    if request.trunk not in request.engine.trunks:
        raise CapabilityError(
            f"the trunk in {trunk_name(request.trunk)}; this engine computes with "
            f"{', '.join(map(trunk_name, request.engine.trunks))}: choose one of these with --trunk"
        )
    kept = request.keep_layout
    if kept is not None and kept.trunk != request.trunk:
        raise PlanMismatchError(
            f"the trunk of the pack whose layout is kept is {trunk_name(kept.trunk)}, asked for "
            f"was {trunk_name(request.trunk)}; plan without --keep-layout, and pack again"
        )
    digest = request.spec.digest
    owners = [("compute profile", request.compute.model_digest, request.compute.model_name)]
    summary = request.routing.summary
    owners.append(("routing profile", summary.model_digest, summary.model_name))
    if request.keep_layout is not None:
        owners.append(("layout", request.keep_layout.model_digest, "another model"))
    for what, found, name in owners:
        if found != digest:
            raise PlanMismatchError(
                f"the {what} is of {name} ({found[:12]}), the model is {request.spec.name} "
                f"({digest[:12]}); run moepack profile for this model"
            )


def require_budget(request: PlanRequest) -> None:
    """Refuse lengths that the model or the context cannot hold, and budgets too small for both.

    Raises
    ------
    PlanMismatchError
        When the lengths do not fit one another or the model.
    BudgetTooSmallError
        When not even one expert in flight fits, naming the missing bytes.
    """
    spec = request.spec
    if request.context_tokens > spec.context_length:
        raise PlanMismatchError(
            f"a context of {request.context_tokens} tokens; {spec.name} was made for at most "
            f"{spec.context_length}: lower --context"
        )
    if request.prompt_tokens + request.new_tokens > request.context_tokens:
        raise PlanMismatchError(
            f"{request.prompt_tokens} prompt and {request.new_tokens} new tokens exceed the "
            f"context of {request.context_tokens}; raise --context, or lower --prompt or --new"
        )
    least_bytes = _least_bytes(request)
    missing_bytes = least_bytes - request.fast_budget_bytes
    if missing_bytes <= 0:
        return
    longest = max_context_tokens(request)
    remedy = f"or --context to at most {longest}" if longest else "no context fits this budget"
    raise BudgetTooSmallError(
        f"{spec.name} needs at least {format_size(least_bytes)} at a context of "
        f"{request.context_tokens}, the budget is {format_size(request.fast_budget_bytes)}: "
        f"{format_size(missing_bytes)} ({missing_bytes} bytes) are missing; set "
        f"--vram to {-(-least_bytes // MIB)}M or more, {remedy}",
        missing_bytes=missing_bytes,
    )


def host_limit_bytes(request: PlanRequest) -> int:
    """Bound on the whole process in host memory."""
    if request.ram_budget_bytes is not None:
        return request.ram_budget_bytes
    return round(DEFAULT_RAM_SHARE * request.hardware.ram_bytes)


def pinnable_bytes(request: PlanRequest) -> int:
    """What may be pinned of the host's memory, for a device's slow tier: the process is beside."""
    return max(0, host_limit_bytes(request) - request.hardware.process_base_bytes)


def ram_is_assumed(request: PlanRequest) -> bool:
    """Whether nobody said how much host memory there is: a preset's is an assumption of its own."""
    return request.ram_budget_bytes is None and not request.hardware_is_this_machine


def require_host_memory(request: PlanRequest, placement: Placement) -> str | None:
    """The host must hold the process, and with it the fast tier (CPU) or what is pinned (CUDA).

    Returns
    -------
    str or None
        What is assumed of the host memory of a machine that is not here, where nobody said how
        much it has and it is not enough for everything.

    Raises
    ------
    BudgetTooSmallError
        Naming the missing bytes.
    """
    limit_bytes = host_limit_bytes(request)
    base_bytes = request.hardware.process_base_bytes
    held, held_bytes = "the fast tier", placement.memory.total_bytes
    host = placement.host
    if host is not None:
        held, held_bytes = "what is pinned of the slow tier", host.total_bytes
    missing_bytes = base_bytes + held_bytes - limit_bytes
    if missing_bytes <= 0:
        if host is not None and host.bounces and ram_is_assumed(request):
            return (
                f"{request.hardware.name} has {format_size(request.hardware.ram_bytes)} of host "
                "memory; say with --ram what yours has"
            )
        return None
    need = (
        f"{held} takes {format_size(held_bytes)} of host memory and the process itself "
        f"{format_size(base_bytes)}, the limit is {format_size(limit_bytes)}"
    )
    if ram_is_assumed(request):
        return f"host memory that {request.hardware.name} lacks: {need}"
    raise BudgetTooSmallError(
        f"{need}: {format_size(missing_bytes)} ({missing_bytes} bytes) are missing; lower --vram "
        "or raise --ram",
        missing_bytes=missing_bytes,
    )
