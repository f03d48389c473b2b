"""Segments whose 4-bit codes are rearranged, on arrival, for torch's kernel on this processor."""

from __future__ import annotations

import torch
from typing_extensions import override

from moepack.encodings import TILE_ROWS, encoding
from moepack.plan import Layout
from moepack.segments import SegmentId, SegmentShape
from moepack_runtime.direct_io import Buffer
from moepack_runtime.int4_tiles import memory_tile_rows, rebuild
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, SegmentStore

_CPU = torch.device("cpu")


class RebuildingStore(SegmentStore):
    """Another store, whose codes arrive in the tiles that :mod:`int4_tiles` says for a processor.

    In the reader's thread, once a segment has been compared with its checksum, and where it was
    read to: it takes as many bytes as before.
    """

    def __init__(self, inner: SegmentStore) -> None:
        self._inner = inner

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._inner.shape(segment)

    @override
    def read_into(self, segment: SegmentId, destination: Buffer, check: CheckMode) -> None:
        self._inner.read_into(segment, destination, check)
        for tensor in self.shape(segment).tensors:
            if tensor.name.endswith(".codes"):
                end_bytes = tensor.offset_bytes + tensor.size_bytes
                rebuild(destination[tensor.offset_bytes : end_bytes], tensor.shape[0])

    @override
    def load_trunk(
        self,
        check: CheckMode = CheckMode.FIRST,
        device: torch.device = _CPU,
        progress: Progress = NO_PROGRESS,
    ) -> dict[str, torch.Tensor]:
        return self._inner.load_trunk(check, device, progress)

    @override
    def close(self) -> None:
        self._inner.close()


def for_processor(store: SegmentStore, layout: Layout) -> SegmentStore:
    """The store itself, or with its segments rebuilt where torch reads other tiles than packs have.

    What is found is logged once, by :func:`moepack_runtime.int4_tiles.torch_tile_rows`.
    """
    has_codes = any(encoding(name).kind == "int4" for name in layout.encodings)
    if has_codes and memory_tile_rows(_CPU) != TILE_ROWS:
        return RebuildingStore(store)
    return store
