"""Packing: a checkpoint and a plan become a packed folder.

Streams (see :mod:`moepack.shard_writer` for the peak memory), resumes
(:mod:`moepack.work_folder`), and leaves either the whole folder or none. A layer that an earlier
pack of the same weights holds in the same cut is linked instead of written, after its bytes have
been checked: damage is not carried from pack to pack.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from moepack import records
from moepack.atomic import output_error, write_atomically
from moepack.budget import layer_segment, require_low_copies
from moepack.calibration import Calibration, calibration_for
from moepack.encodings import encoding
from moepack.errors import (
    CapabilityError,
    DiskFullError,
    EncodingError,
    OutputError,
    PackFormatError,
    PlanMismatchError,
)
from moepack.formats import PackedModel, check_plan_fits
from moepack.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    AuxiliaryEntry,
    Manifest,
    encode_manifest,
)
from moepack.model_spec import ModelSpec
from moepack.plan import Plan
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record
from moepack.reuse import find_donor, find_donors, link_unit
from moepack.safetensors_io import read_header
from moepack.shard_writer import Source, write_unit
from moepack.shards import Unit, draft_units
from moepack.trunk import require_trunk
from moepack.units import format_size
from moepack.work_folder import WorkFolder

#: Room asked for beyond the shards: the manifest, the plan, the journal.
_MARGIN_BYTES = 16 << 20


@record
class PackReport:
    """What packing did. Written, linked and resumed bytes add up to the shards' size."""

    folder: str
    size_bytes: int
    written_bytes: int
    linked_bytes: int
    resumed_bytes: int
    duration_s: float


@record
class DiskSpace:
    """What a pack takes at most (nothing of it linked or resumed), and what the disk has."""

    needed_bytes: int
    free_bytes: int


def disk_space(spec: ModelSpec, plan: Plan, out: Path) -> DiskSpace:
    """Bytes that packing to ``out`` needs, and bytes free there.

    Raises
    ------
    PlanMismatchError, CapabilityError, EncodingError
        When this model cannot be packed so: see :func:`check_plan_for`.
    ReadOnlyError, OutputError
        When the place cannot be reached.
    """
    check_plan_for(spec, plan)
    needed_bytes = sum(unit.size_bytes for unit in draft_units(spec, plan.layout))
    try:
        free_bytes = _free_bytes(out)
    except OSError as failure:
        raise output_error(out, failure) from failure
    except RuntimeError as failure:
        raise OutputError(f"{failure}; expected a place that can be written") from None
    return DiskSpace(needed_bytes + _MARGIN_BYTES, free_bytes)


def pack(
    source: Source,
    plan: Plan,
    out: Path,
    *,
    progress: Progress = NO_PROGRESS,
    reuse: Path | None = None,
    calibration: Calibration | None = None,
) -> PackReport:
    """Write the packed folder of a plan.

    Parameters
    ----------
    out
        Appears, or is replaced, in one step; it may exist if it is a packed folder or empty.
    reuse
        An earlier pack, whose whole layers of the same cut are linked; the folder at ``out`` is
        always considered. Where neither is a pack of these weights, everything is written.
    calibration
        What rounding is weighed by, where the plan's layout names one.

    Raises
    ------
    PlanMismatchError
        When the plan was made for another model, or is rounded by another calibration.
    CapabilityError
        When the plan asks for another dtype than the checkpoint's.
    EncodingError
        When the plan asks for an encoding that is not there, or that experts do not fit.
    NonFiniteWeightError
        When a weight that is to be rounded is NaN or infinite.
    DiskFullError
        When the disk lacks room, before anything is written or, if others fill it, later.
    ReadOnlyError
        When the place is not writable.
    OutputInUseError
        When another process packs to the same place.
    OutputError
        When ``out`` exists and is something else.
    """
    started_s = time.perf_counter()
    check_plan_for(source.spec, plan)
    calibration = calibration_for(source.spec, plan.layout, calibration)
    _check_spec(source.spec)
    out = out.resolve()
    units = draft_units(source.spec, plan.layout)
    try:
        with WorkFolder.hold(
            out, model_digest=source.spec.digest, weights_digest=source.weights_digest
        ) as work:
            donors = find_donors(source, out, reuse)
            resumed_bytes = _resume(work, units)
            linked_bytes = _fill(
                source, work, units, donors, calibration, plan.layout.trunk, progress
            )
            size_bytes = sum(unit.size_bytes for unit in units)
            _write_rest(source, plan, work, units)
            PackedModel.open(work.folder)  # nothing is published that would not open
            work.publish()
    except OSError as failure:
        raise _named(failure, out) from failure
    return PackReport(
        folder=str(out),
        size_bytes=size_bytes,
        written_bytes=size_bytes - linked_bytes - resumed_bytes,
        linked_bytes=linked_bytes,
        resumed_bytes=resumed_bytes,
        duration_s=time.perf_counter() - started_s,
    )


def replace_plan(folder: Path, plan: Plan) -> None:
    """Give a packed folder another plan of the same layout.

    Raises
    ------
    PlanMismatchError
        When the plan needs other bytes than the folder holds.
    OutputError
        When the file cannot be written.
    """
    check_plan_fits(plan, PackedModel.open(folder).manifest, str(folder))
    write_atomically(folder / PLAN_FILE, _plan_bytes(plan))


def check_plan_for(spec: ModelSpec, plan: Plan) -> None:
    """Refuse a plan that was not made for this model.

    Raises
    ------
    PlanMismatchError
        When model, layers or widths differ.
    CapabilityError
        When a layer is to be stored in another dtype than the checkpoint's.
    EncodingError
        When it is to be stored in an encoding that is not there, or that its experts do not fit;
        or the trunk in one that is not there.
    """
    if not plan.model_digest == plan.layout.model_digest == spec.digest:
        raise PlanMismatchError(
            f"the plan is for model {plan.model_digest[:12]} ({plan.model_name}), this one is "
            f"{spec.digest[:12]} ({spec.name}); plan this model first"
        )
    if tuple(cut.layer for cut in plan.layout.layers) != spec.moe_layers:
        raise PlanMismatchError(
            f"the plan cuts layers {[cut.layer for cut in plan.layout.layers]}, the model has "
            f"experts in {list(spec.moe_layers)}; plan again"
        )
    require_trunk(plan.layout.trunk)
    for cut in plan.layout.layers:
        width = spec.moe(cut.layer).intermediate_size
        if cut.width != width or not 0 <= cut.split <= width:
            raise PlanMismatchError(
                f"the plan cuts layer {cut.layer} at {cut.split} of {cut.width}, its experts are "
                f"{width} wide; plan again"
            )
        experts = spec.moe(cut.layer).num_experts
        if cut.encodings and len(cut.encodings) != experts:
            raise PlanMismatchError(
                f"the plan stores {len(cut.encodings)} experts of layer {cut.layer}, the model has "
                f"{experts}; plan again"
            )
        for name in cut.classes:
            try:
                stored = encoding(name)
                layer_segment(spec, cut, "top", name)
            except EncodingError as failure:
                raise type(failure)(f"the plan's layer {cut.layer}: {failure}") from None
            if not stored.quantised and name != spec.dtype:
                raise CapabilityError(
                    f"the plan stores layer {cut.layer} as {name}, the checkpoint holds "
                    f"{spec.dtype}; packing keeps that or quantises it: plan again"
                )
    try:
        require_low_copies(spec, plan.layout)
    except EncodingError as failure:
        raise type(failure)(f"the plan's low copies: {failure}") from None


def _check_spec(spec: ModelSpec) -> None:
    """The spec survives the manifest: else the folder would not open, after hours of packing."""
    read = records.decode(ModelSpec, records.encode(spec), what="spec", error=PackFormatError)
    assert read.digest == spec.digest, "a field of the spec is not of its declared type"


def _resume(work: WorkFolder, units: Iterable[Unit]) -> int:
    """Keep what an interrupted pack finished for this layout, remove the rest; bytes kept."""
    kept = [unit for unit in units if unit.name in work.finished and _is_there(work, unit)]
    work.keep([unit.name for unit in kept])
    return sum(unit.size_bytes for unit in kept)


def _is_there(work: WorkFolder, unit: Unit) -> bool:
    """Whether a finished unit is of this layout and its files are as they were left."""
    if work.finished[unit.name].shards != tuple(shard.entry for shard in unit.shards):
        return False
    for shard in unit.shards:
        path = work.folder / shard.path
        if not path.is_file() or path.stat().st_size != shard.draft.size_bytes:
            return False
        if read_header(path) != shard.draft.header:
            return False
    return True


def _fill(
    source: Source,
    work: WorkFolder,
    units: Iterable[Unit],
    donors: Iterable[PackedModel],
    calibration: Calibration | None,
    trunk: str,
    progress: Progress,
) -> int:
    """Link or write every unit that is not finished; bytes linked."""
    missing = [unit for unit in units if unit.name not in work.finished]
    found = {unit.name: find_donor(unit, donors) for unit in missing}
    _check_room(work, sum(unit.size_bytes for unit in missing if found[unit.name] is None))
    linked_bytes = 0
    progress.start(f"pack {source.spec.name}", sum(unit.size_bytes for unit in missing))
    try:
        for unit in missing:
            donor = found[unit.name]
            linked = link_unit(donor, unit, work.folder, progress) if donor is not None else None
            if linked is not None:
                linked_bytes += unit.size_bytes
            work.record(
                linked or write_unit(source, unit, work.folder, progress, calibration, trunk)
            )
    finally:
        progress.done()
    return linked_bytes


def _check_room(work: WorkFolder, needed_bytes: int) -> None:
    free_bytes = _free_bytes(work.out)
    if needed_bytes + _MARGIN_BYTES > free_bytes:
        raise DiskFullError(
            f"{work.out}: packing needs {format_size(needed_bytes + _MARGIN_BYTES)}, "
            f"{format_size(free_bytes)} are free; free some space or choose another disk"
        )


def _free_bytes(out: Path) -> int:
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _write_rest(source: Source, plan: Plan, work: WorkFolder, units: Iterable[Unit]) -> None:
    """Auxiliary files, plan and, last, the manifest."""
    auxiliary = []
    for path in sorted(source.auxiliary_files, key=lambda path: path.name):
        data = path.read_bytes()
        _write(work.folder / path.name, data)
        digest = hashlib.sha256(data).hexdigest()
        auxiliary.append(AuxiliaryEntry(path.name, len(data), digest))
    finished = [work.finished[unit.name] for unit in units]
    manifest = Manifest(
        spec=dataclasses.replace(source.spec, name=""),
        weights_digest=source.weights_digest,
        layout=plan.layout,
        layout_digest=plan.layout.digest,
        shards=tuple(shard for unit in finished for shard in unit.shards),
        trunk=tuple(tensor for unit in finished for tensor in unit.trunk),
        groups=tuple(group for unit in finished for group in unit.groups),
        auxiliary=tuple(auxiliary),
    )
    _write(work.folder / PLAN_FILE, _plan_bytes(plan))
    _write(work.folder / MANIFEST_FILE, encode_manifest(manifest))


def _plan_bytes(plan: Plan) -> bytes:
    return records.encode(plan, indent=1).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _named(failure: OSError, out: Path) -> Exception:
    error = output_error(Path(failure.filename or out), failure)
    if isinstance(error, DiskFullError):
        return DiskFullError(
            f"{out}: the disk is full ({format_size(_free_bytes(out))} free); free some space and "
            "pack again: what is finished is kept"
        )
    return error
