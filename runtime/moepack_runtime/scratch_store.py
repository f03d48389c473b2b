"""A store for measuring: a few experts in one file, which stand for all of their layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from typing_extensions import override

from moepack.segments import SegmentId, SegmentShape, cut_expert
from moepack_runtime.direct_io import Buffer, DirectFile
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, ExpertSource, SegmentStore


class ScratchStore(SegmentStore):
    """Whole experts of one layer, laid out and read as in a packed folder.

    Expert ``e`` is read where expert ``e mod count`` lies. Peak memory: one expert.

    Parameters
    ----------
    path
        Written here; the caller removes it.
    shape
        Of a whole expert of ``layer``.

    Raises
    ------
    OSError
        When the file cannot be written.
    """

    def __init__(
        self, path: Path, source: ExpertSource, layer: int, shape: SegmentShape, count: int
    ) -> None:
        self._shape = shape
        self._count = count
        with path.open("wb") as out:
            for expert in range(count):
                payload = cut_expert(source.expert(layer, expert), shape, "top")
                out.write(payload.ljust(shape.stored_bytes, b"\0"))
            out.flush()
        self._file = DirectFile(path)

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._shape

    @override
    def read_into(self, segment: SegmentId, destination: Buffer, check: CheckMode) -> None:
        place = segment.expert % self._count
        block = np.asarray(destination)[: self._shape.stored_bytes]
        self._file.read_into(block, place * self._shape.stored_bytes)

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
        self._file.close()
