"""Stores that the tests of this folder read from."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from moepack_runtime.direct_io import Buffer
from moepack_runtime.store import CheckMode, SegmentStore

from moepack.segments import SegmentId, SegmentShape, align_up


def segment(number: int) -> SegmentId:
    return SegmentId(number // 8, number % 8, "top")


def content(segment_id: SegmentId, size_bytes: int) -> Buffer:
    """What the segment holds: its own pattern, never 0xFF throughout."""
    number = segment_id.layer * 8 + segment_id.expert
    return np.arange(number, number + size_bytes, dtype=np.int64).astype(np.uint8)


class PatternStore(SegmentStore):
    """Segments made up from their number; reads can be held up, watched and made to fail."""

    def __init__(
        self,
        size_bytes: int = 5000,
        *,
        before_read: Callable[[SegmentId], None] = lambda _: None,
    ) -> None:
        self.size_bytes = size_bytes
        self.before_read = before_read
        self.read: list[SegmentId] = []
        self.closed = 0
        self._lock = threading.Lock()

    def shape(self, segment: SegmentId) -> SegmentShape:  # noqa: ARG002
        return SegmentShape(1, (), self.size_bytes, align_up(self.size_bytes))

    def read_into(self, segment: SegmentId, destination: Buffer, check: CheckMode) -> None:  # noqa: ARG002
        with self._lock:
            self.read.append(segment)
        self.before_read(segment)
        destination[: self.size_bytes] = content(segment, self.size_bytes)

    def load_trunk(self, check: CheckMode = CheckMode.FIRST) -> dict[str, torch.Tensor]:  # noqa: ARG002
        return {}

    def close(self) -> None:
        self.closed += 1
