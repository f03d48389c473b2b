"""A plain checkpoint as a store: its experts cut, and rounded, as they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from typing_extensions import override

from moepack.budget import layer_segment
from moepack.calibration import Calibration, calibration_for
from moepack.encodings import encoding
from moepack.errors import PlanMismatchError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.quantise import quantise_expert, stored_tensors
from moepack.segments import (
    BASE,
    LOW,
    PARTS,
    Bits,
    Part,
    SegmentId,
    SegmentShape,
    cut_expert,
)
from moepack.trunk import require_trunk, trunk_parts
from moepack_runtime.direct_io import Buffer, Wanted
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import (
    CheckMode,
    SegmentStore,
    allocate_trunk,
    loading_trunk,
    trunk_step,
)

_CPU = torch.device("cpu")


class ExpertSource(Protocol):
    """A checkpoint, as far as a store needs one: bit patterns under canonical names."""

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        """One whole routed expert, under the names of :data:`moepack.segments.EXPERT_TENSORS`."""

    def trunk_tensor(self, name: str) -> Bits:
        """One trunk tensor, in its shape."""


class CheckpointStore(SegmentStore):
    """A plain checkpoint whose experts are cut for a layout as they are asked for.

    For running without a pack, and to compare packs against: a layer that the layout wants
    quantised is rounded as packing would round it, every time that an expert is asked for. There
    are no checksums to compare with, so ``check`` makes no difference. One thread reads at a time.
    Peak memory: two whole experts beyond the destinations (a top and a bottom are asked for one
    after the other), and one more with what rounding takes.

    Parameters
    ----------
    calibration
        What rounding is weighed by, where the layout names one.

    Raises
    ------
    PlanMismatchError
        When the layout asks for another dtype than the model has, or for another calibration.
    UnknownEncodingError, GroupMismatchError
        When its experts, or its trunk, cannot be stored as the layout wants.
    NonFiniteWeightError
        While reading, when a weight that is to be rounded is NaN or infinite.
    """

    def __init__(
        self,
        source: ExpertSource,
        spec: ModelSpec,
        layout: Layout,
        calibration: Calibration | None = None,
    ) -> None:
        require_trunk(layout.trunk)
        self._calibration = calibration_for(spec, layout, calibration)
        self._source = source
        self._spec = spec
        self._trunk = layout.trunk
        self._cuts = {(cut.layer, BASE): cut for cut in layout.layers}
        self._cuts |= {(cut.layer, LOW): cut for cut in layout.low_layers}
        self._shapes: dict[tuple[int, Part, str], SegmentShape] = {}
        for cut in self._cuts.values():
            for name in cut.classes:
                if not encoding(name).quantised and name != spec.dtype:
                    raise PlanMismatchError(
                        f"layer {cut.layer} is planned as {name}, the checkpoint holds "
                        f"{spec.dtype}; expected that, or a quantised encoding; plan again"
                    )
                for part in PARTS:
                    shape = layer_segment(spec, cut, part, name)
                    if shape is not None:
                        self._shapes[cut.layer, part, name] = shape
        self._recent: OrderedDict[tuple[int, int, str], Mapping[str, Bits]] = OrderedDict()
        self._lock = threading.Lock()

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        cut = self._cuts.get((segment.layer, segment.variant))
        if cut is not None:
            name = cut.encoding_of(segment.expert)
            shape = self._shapes.get((segment.layer, segment.part, name))
            if shape is not None:
                return shape
        raise PlanMismatchError(f"the layout has no segment {segment}; plan again")

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        shape = self.shape(segment)
        with self._lock:
            weights = self._expert(segment.layer, segment.expert, segment.variant)
            bits = cut_expert(weights, shape, segment.part)
        destination[: shape.size_bytes] = np.frombuffer(bits, np.uint8)
        return shape.stored_bytes

    def _expert(self, layer: int, expert: int, variant: str) -> Mapping[str, Bits]:
        weights = self._recent.pop((layer, expert, variant), None)
        if weights is None:
            weights = self._source.expert(layer, expert)
            stored = encoding(self._cuts[layer, variant].encoding_of(expert))
            if stored.quantised:
                what = f"layer {layer}, expert {expert}"
                importance = None
                if self._calibration is not None:
                    importance = self._calibration.importance(layer, expert)
                weights = quantise_expert(
                    weights, stored, self._spec.dtype, what, importance=importance
                )
        self._recent[layer, expert, variant] = weights
        if len(self._recent) > 2:
            self._recent.popitem(last=False)
        return weights

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device = _CPU,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        step = trunk_step(self._spec, self._trunk)
        with loading_trunk(progress, self._spec, self._trunk):
            rooms = allocate_trunk(self._spec, self._trunk, device)
            for (info, flat, tensor), source in zip(rooms, self._trunk_bits(), strict=True):
                # Through memory of ours: torch takes no array that may only be read.
                for done in range(0, info.size_bytes, step.nbytes):
                    count = min(step.nbytes, info.size_bytes - done)
                    step.numpy()[:count] = source[done : done + count]
                    flat[done : done + count].copy_(step[:count])
                    progress.advance(count)
                tensors[info.name] = tensor
        return tensors

    def _trunk_bits(self) -> Iterator[Bits]:
        """The bytes of every stored tensor, in their order."""
        for part in trunk_parts(self._spec, self._trunk):
            yield from stored_tensors(self._source.trunk_tensor(part.source.name), part)

    @override
    def close(self) -> None:
        self._recent.clear()
