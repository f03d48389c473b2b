"""A store for measuring: quantised experts whose codes stand for nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from moepack.budget import layer_segment
from moepack.model_spec import ModelSpec
from moepack.plan import Layout
from moepack.segments import PARTS, Part, SegmentId, SegmentShape
from moepack_runtime.direct_io import Buffer
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, SegmentStore

# 2**-8 in BF16, so that no product overflows: what one takes depends on no code, but infinities
# and denormal numbers are slow.
_SCALE = 0x3B80


class MadeUpStore(SegmentStore):
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
    def read_into(self, segment: SegmentId, destination: Buffer, check: CheckMode) -> None:
        payload = self._payloads[self.shape(segment)]
        destination[: len(payload)] = payload

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        return {}

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
