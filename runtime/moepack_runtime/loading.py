"""Opening an engine: the right store and the right transfer for a placement."""

from __future__ import annotations

import torch

from moepack import machine
from moepack.budget import stored_bytes
from moepack.calibration import Calibration
from moepack.errors import BudgetTooSmallError
from moepack.formats import PackedModel, check_plan_fits
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import DeviceKind, Placement, Plan
from moepack.ram_tier import RamTier, ram_tier
from moepack.segments import PARTS, SegmentId
from moepack.units import format_size
from moepack_runtime.capabilities import require_fit, require_own
from moepack_runtime.checkpoint_store import CheckpointStore, ExpertSource
from moepack_runtime.engine import Engine
from moepack_runtime.memory import forget_peak_resident, resident_bytes
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.rebuilding import for_device, for_processor
from moepack_runtime.store import CheckMode, PackStore, SegmentStore
from moepack_runtime.transfer import HostTransfer, ThrottledTransfer, Transfer
from moepack_runtime.transfer.host import DEFAULT_READERS


def open_packed(
    packed: PackedModel,
    plan: Plan,
    *,
    check: CheckMode = CheckMode.FIRST,
    link: tuple[float, float] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Engine:
    """Open an engine over a packed folder, under a plan.

    Parameters
    ----------
    link
        (bytes per second, latency in seconds): throttle the link to this.
    progress
        Of the trunk, and of the experts that the fast tier begins with.

    Raises
    ------
    PlanMismatchError
        When the pack's layout is not the plan's, naming the layers that differ.
    CapabilityError, DeviceError, OutOfMemoryError, BudgetTooSmallError
        When the plan cannot be carried out here.
    TransferError, DamagedSegmentError
        When the trunk or a segment does not arrive whole.
    """
    process_base_bytes = _before_loading()
    spec = packed.spec
    require_own(plan)
    check_plan_fits(plan, packed.manifest, str(packed.folder))
    require_fit(spec, plan.layout, plan.placement)
    store = PackStore(packed)
    return _open(
        spec, plan.layout, plan.placement, store, check, link, process_base_bytes, progress
    )


def open_checkpoint(
    source: ExpertSource,
    spec: ModelSpec,
    layout: Layout,
    placement: Placement,
    *,
    progress: Progress = NO_PROGRESS,
    calibration: Calibration | None = None,
) -> Engine:
    """Open a plain checkpoint as if it had been packed with ``layout``; see :func:`open_packed`.

    Parameters
    ----------
    calibration
        What rounding is weighed by, where the layout names one.
    """
    process_base_bytes = _before_loading()
    require_fit(spec, layout, placement)
    store = CheckpointStore(source, spec, layout, calibration)
    return _open(
        spec, layout, placement, store, CheckMode.NEVER, None, process_base_bytes, progress
    )


def _before_loading() -> int:
    """What the process takes without a model; its peak begins here."""
    forget_peak_resident()
    return resident_bytes()


def _open(
    spec: ModelSpec,
    layout: Layout,
    placement: Placement,
    store: SegmentStore,
    check: CheckMode,
    link: tuple[float, float] | None,
    process_base_bytes: int,
    progress: Progress = NO_PROGRESS,
) -> Engine:
    opened: SegmentStore | Transfer = store
    try:
        tier = require_host_memory(spec, layout, placement, process_base_bytes)
        torch.set_num_threads(placement.threads)  # of the process: torch knows no other
        opened = transfer = open_transfer(
            spec,
            layout,
            store,
            placement.device,
            check=check,
            readers=placement.readers,
            tier=tier,
            progress=progress,
        )
        if link is not None:
            transfer = ThrottledTransfer(transfer, *link)
        return Engine(
            spec,
            layout,
            placement,
            store=store,
            transfer=transfer,
            check=check,
            process_base_bytes=process_base_bytes,
            progress=progress,
        )
    except BaseException:
        opened.close()
        raise


def open_transfer(
    spec: ModelSpec,
    layout: Layout,
    store: SegmentStore,
    device: DeviceKind,
    *,
    check: CheckMode = CheckMode.FIRST,
    readers: int = DEFAULT_READERS,
    tier: RamTier | None = None,
    progress: Progress = NO_PROGRESS,
) -> Transfer:
    """The link of a kind of device: disk to RAM, or pinned RAM to VRAM.

    Parameters
    ----------
    tier
        What pinned RAM holds of a device's slow tier, and how the rest gets past it; None: it
        holds everything.

    Raises
    ------
    DeviceError, OutOfMemoryError, TransferError, DamagedSegmentError
        On CUDA, where the segments that RAM holds are read into it here.
    """
    if device == "cpu":
        return HostTransfer(for_processor(store, layout), check=check, readers=readers)
    from moepack_runtime.transfer.cuda import CudaTransfer
    from moepack_runtime.transfer.pinned import PinnedSegments

    place = torch.device(device)
    store = for_device(store, spec, layout, place)
    disk = HostTransfer(store, check=check, readers=readers)
    if tier is None:
        tier = RamTier(_all_segments(spec, layout))
    pinned = PinnedSegments(
        disk, tier.held, bounces=tier.bounces, bounce_bytes=tier.bounce_bytes, progress=progress
    )
    try:
        return CudaTransfer(pinned, place)
    except BaseException:
        pinned.close()
        raise


def _all_segments(spec: ModelSpec, layout: Layout) -> dict[SegmentId, int]:
    return {
        SegmentId(cut.layer, expert, part): sizes_bytes[cut.encoding_of(expert)]
        for cut in layout.layers
        for part in PARTS
        if stored_bytes(spec, cut, part)
        for sizes_bytes in ({name: stored_bytes(spec, cut, part, name) for name in cut.classes},)
        for expert in range(spec.moe(cut.layer).num_experts)
    }


def require_host_memory(
    spec: ModelSpec, layout: Layout, placement: Placement, process_base_bytes: int
) -> RamTier | None:
    """Refuse what the host cannot hold: the system would not refuse, it would kill.

    Returns
    -------
    RamTier or None
        What of the slow tier pinned RAM holds; None where there is no device.

    Raises
    ------
    BudgetTooSmallError
        Naming the missing bytes.
    """
    limit_bytes = machine.ram_bytes()
    if placement.ram_budget_bytes is not None:
        limit_bytes = min(limit_bytes, placement.ram_budget_bytes)
    tier = None
    if placement.device == "cpu":
        held, held_bytes = "the fast tier", placement.memory.total_bytes
    else:
        left_bytes = limit_bytes - process_base_bytes
        if placement.host is not None:  # no more than was planned, whatever there is
            left_bytes = min(left_bytes, placement.host.pinned_bytes)
        tier = ram_tier(spec, layout, placement.layers, left_bytes, readers=placement.readers)
        held, held_bytes = "the pinned slow tier", tier.total_bytes
    missing_bytes = process_base_bytes + held_bytes - limit_bytes
    if missing_bytes > 0:
        raise BudgetTooSmallError(
            f"{held} takes {format_size(held_bytes)} of host memory and the process itself "
            f"{format_size(process_base_bytes)}, the limit is {format_size(limit_bytes)}: "
            f"{missing_bytes} bytes are missing; plan again with a smaller --vram or larger --ram",
            missing_bytes=missing_bytes,
        )
    return tier
