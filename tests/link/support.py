"""Stores that the tests of this folder read from, and every twin of the transfer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from moepack_runtime.direct_io import Buffer, DirectFile, Wanted
from moepack_runtime.measuring_stores import ExpertsAlone
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.transfer import (
    CudaTransfer,
    HostileTransfer,
    HostTransfer,
    ThrottledTransfer,
    Transfer,
)
from moepack_runtime.transfer.pinned import PinnedSegments

from moepack.segments import SegmentId, SegmentShape, align_up

SIZE_BYTES = 5000
STORED_BYTES = align_up(SIZE_BYTES)


def segment(number: int) -> SegmentId:
    return SegmentId(number // 8, number % 8, "top")


def content(number: int) -> Buffer:
    """What segment ``number`` holds: its own pattern, padding included."""
    return np.random.default_rng(number).integers(0, 255, STORED_BYTES, dtype=np.uint8)


def number_of(segment_id: SegmentId) -> int:
    return segment_id.layer * 8 + segment_id.expert


class PatternStore(ExpertsAlone):
    """Segments made up from their number; reads can be held up, watched and made to fail."""

    def __init__(self, before_read: Callable[[SegmentId], object] = lambda _: None) -> None:
        self.before_read = before_read
        self.read: list[int] = []
        self.closed = False
        self._lock = threading.Lock()

    def shape(self, segment: SegmentId) -> SegmentShape:  # noqa: ARG002
        return SegmentShape(1, (), SIZE_BYTES, STORED_BYTES)

    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,  # noqa: ARG002
        wanted: Wanted | None = None,  # noqa: ARG002
    ) -> int:
        assert not self.closed
        with self._lock:
            self.read.append(number_of(segment))
        self.before_read(segment)
        destination[:] = content(number_of(segment))
        return STORED_BYTES

    def close(self) -> None:
        self.closed = True


class FileStore(PatternStore):
    """The same segments in a file, read past the page cache."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__()
        path.write_bytes(b"".join(content(number).tobytes() for number in range(count)))
        self.file = DirectFile(path)

    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,  # noqa: ARG002
        wanted: Wanted | None = None,
    ) -> int:
        return self.file.read_while(wanted, destination, number_of(segment) * STORED_BYTES)

    def close(self) -> None:
        self.file.close()


def host(store: SegmentStore) -> Transfer:
    return HostTransfer(store)


def throttled(store: SegmentStore) -> Transfer:
    return ThrottledTransfer(HostTransfer(store), 200e6, 20e-6)


def hostile(store: SegmentStore) -> Transfer:
    return HostileTransfer(HostTransfer(store), seed=7)


def hostile_throttled(store: SegmentStore) -> Transfer:
    return HostileTransfer(throttled(store), seed=7)


def cuda(store: SegmentStore) -> Transfer:
    """Holds the first 1,000 segments."""
    sizes = {segment(number): STORED_BYTES for number in range(1000)}
    return CudaTransfer(PinnedSegments(HostTransfer(store), sizes), torch.device("cuda"))
