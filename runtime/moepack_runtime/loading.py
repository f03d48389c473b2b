"""Opening an engine: the right store and the right transfer for a placement."""

from __future__ import annotations

from pathlib import Path

import torch

from moepack.budget import layer_segment
from moepack.formats import PackedModel, check_plan_fits
from moepack.model_spec import ModelSpec
from moepack.plan import DeviceKind, Layout, Placement, Plan
from moepack.segments import PARTS, SegmentId
from moepack_runtime.capabilities import require_fit
from moepack_runtime.engine import Engine
from moepack_runtime.memory import resident_bytes
from moepack_runtime.store import CheckMode, CheckpointStore, ExpertSource, PackStore, SegmentStore
from moepack_runtime.transfer import HostTransfer, ThrottledTransfer, Transfer


def open_packed(
    folder: Path,
    plan: Plan,
    *,
    check: CheckMode = CheckMode.FIRST,
    link: tuple[float, float] | None = None,
) -> Engine:
    """Open a packed folder under a plan.

    Parameters
    ----------
    link
        (bytes per second, latency in seconds): throttle the link to this.

    Raises
    ------
    PlanMismatchError
        When the pack's layout is not the plan's, naming the layers that differ.
    PackError, TransferError, DeviceError, OutOfMemoryError, BudgetTooSmallError, CapabilityError
        When the pack is not sound, or the plan cannot be carried out here.
    """
    process_base_bytes = resident_bytes()
    packed = PackedModel.open(folder)
    spec = packed.manifest.spec
    check_plan_fits(plan, packed.manifest, str(folder))
    require_fit(spec, plan.layout, plan.placement)
    store = PackStore(packed)
    return _open(spec, plan.layout, plan.placement, store, check, link, process_base_bytes)


def open_checkpoint(
    source: ExpertSource, spec: ModelSpec, layout: Layout, placement: Placement
) -> Engine:
    """Open a plain checkpoint as if it had been packed with ``layout``; see :func:`open_packed`."""
    process_base_bytes = resident_bytes()
    require_fit(spec, layout, placement)
    store = CheckpointStore(source, spec, layout)
    return _open(spec, layout, placement, store, CheckMode.NEVER, None, process_base_bytes)


def _open(
    spec: ModelSpec,
    layout: Layout,
    placement: Placement,
    store: SegmentStore,
    check: CheckMode,
    link: tuple[float, float] | None,
    process_base_bytes: int,
) -> Engine:
    torch.set_num_threads(placement.threads)  # of the process: torch knows no other
    transfer = open_transfer(spec, layout, store, placement.device, check=check)
    if link is not None:
        transfer = ThrottledTransfer(transfer, *link)
    try:
        return Engine(
            spec,
            layout,
            placement,
            store=store,
            transfer=transfer,
            process_base_bytes=process_base_bytes,
        )
    except BaseException:
        transfer.close()
        raise


def open_transfer(
    spec: ModelSpec,
    layout: Layout,
    store: SegmentStore,
    device: DeviceKind,
    *,
    check: CheckMode = CheckMode.FIRST,
) -> Transfer:
    """The link of a kind of device: disk to RAM, or pinned RAM to VRAM.

    Raises
    ------
    DeviceError, OutOfMemoryError, TransferError, DamagedSegmentError
        On CUDA, where every segment is read into pinned RAM here.
    """
    disk = HostTransfer(store, check=check)
    if device == "cpu":
        return disk
    from moepack_runtime.transfer.cuda import CudaTransfer, PinnedSegments

    stored_bytes = {
        SegmentId(cut.layer, expert, part): shape.stored_bytes
        for cut in layout.layers
        for part in PARTS
        if (shape := layer_segment(spec, cut, part)) is not None
        for expert in range(spec.moe(cut.layer).num_experts)
    }
    return CudaTransfer(PinnedSegments(disk, stored_bytes), torch.device(device))
