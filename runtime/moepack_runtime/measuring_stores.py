"""Stores for measuring: routed experts without the model around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from moepack.budget import layer_segment
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.segments import PARTS, Part, SegmentId, SegmentShape, cut_expert
from moepack_runtime.checkpoint_store import ExpertSource
from moepack_runtime.direct_io import Buffer, DirectFile, Wanted
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, SegmentStore

# 2**-8 in BF16, so that no product overflows: what one takes depends on no code, but infinities
# and denormal numbers are slow.
_SCALE = 0x3B80


class ExpertsAlone(SegmentStore):
    """A store that has no trunk."""

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        return {}


class ScratchStore(ExpertsAlone):
    """Whole experts of some layers, laid out and read as in a packed folder.

    Expert ``e`` is read where expert ``e mod count`` of its layer lies. Peak memory: one expert.

    Parameters
    ----------
    path
        Written here; the caller removes it.
    shape
        Of a whole expert of any of ``layers``.

    Raises
    ------
    OSError
        When the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        source: ExpertSource,
        layers: Sequence[int],
        shape: SegmentShape,
        count: int,
    ) -> None:
        self._shape = shape
        self._count = count
        self._first = {layer: place * count for place, layer in enumerate(layers)}
        with path.open("wb") as out:
            for layer in layers:
                for expert in range(count):
                    payload = cut_expert(source.expert(layer, expert), shape, "top")
                    out.write(payload.ljust(shape.stored_bytes, b"\0"))
            out.flush()
        self._file = DirectFile(path)

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._shape

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        place = self._first[segment.layer] + segment.expert % self._count
        block = np.asarray(destination)[: self._shape.stored_bytes]
        return self._file.read_while(wanted, block, place * self._shape.stored_bytes)

    @override
    def close(self) -> None:
        self._file.close()


class MadeUpStore(ExpertsAlone):
    """Segments of any layout in quantised encodings: random codes, one scale, no biases.

    What a product takes does not depend on them, and rounding real experts takes a thousand times
    as long. Peak memory: one segment of every shape.
    """

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self._shapes: dict[tuple[int, Part], SegmentShape] = {}
        self._payloads: dict[SegmentShape, npt.NDArray[np.uint8]] = {}
        for cut in layout.layers:
            for part in PARTS:
                shape = layer_segment(spec, cut, part)
                if shape is not None:
                    self._shapes[cut.layer, part] = shape
                    if shape not in self._payloads:
                        self._payloads[shape] = _payload(shape)

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._shapes[segment.layer, segment.part]

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        shape = self.shape(segment)
        payload = self._payloads[shape]
        destination[: len(payload)] = payload
        return shape.stored_bytes

    @override
    def close(self) -> None:
        self._payloads.clear()


def _payload(shape: SegmentShape) -> npt.NDArray[np.uint8]:
    payload = np.zeros(shape.size_bytes, np.uint8)
    rng = np.random.default_rng(0)
    for tensor in shape.tensors:
        room = payload[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if tensor.dtype in ("I8", "U8"):
            room[:] = rng.integers(0, 256, len(room), dtype=np.uint8)
        elif ".scale" in tensor.name:
            room.view(np.uint16)[:] = _SCALE
    return payload
