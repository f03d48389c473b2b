"""Segments whose 4-bit codes are rearranged, on arrival in RAM, for torch's kernel that is here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from moepack.encodings import TILE_ROWS, encoding
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.segments import SegmentId, SegmentShape, SegmentTensor
from moepack_runtime import int4_fragments, int4_tiles
from moepack_runtime.direct_io import Buffer, Wanted
from moepack_runtime.int4_tiles import memory_tile_rows
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, SegmentStore

_CPU = torch.device("cpu")


#: Rearranges a matrix of codes where it lies; beside it, the number of its outputs.
Rebuild = Callable[[npt.NDArray[np.uint8], int], None]


class RebuildingStore(SegmentStore):
    """Another store, some of whose tensors of codes arrive as a kernel reads them.

    In the reader's thread, once a segment has been compared with its checksum, and where it was
    read to: it takes as many bytes as before.

    Parameters
    ----------
    rebuilt
        Of a segment's shape, the tensors that are rebuilt.
    """

    def __init__(
        self,
        inner: SegmentStore,
        rebuild: Rebuild,
        rebuilt: Callable[[SegmentShape], Iterable[SegmentTensor]],
    ) -> None:
        self._inner = inner
        self._rebuild = rebuild
        self._rebuilt = functools.cache(rebuilt)  # there are few shapes

    @override
    def shape(self, segment: SegmentId) -> SegmentShape:
        return self._inner.shape(segment)

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        read_bytes = self._inner.read_into(segment, destination, check, wanted)
        shape = self.shape(segment)
        if read_bytes == shape.stored_bytes:
            for tensor in self._rebuilt(shape):
                end_bytes = tensor.offset_bytes + tensor.size_bytes
                self._rebuild(destination[tensor.offset_bytes : end_bytes], tensor.shape[0])
        return read_bytes

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
    if _has_codes(layout) and memory_tile_rows(_CPU) != TILE_ROWS:
        return RebuildingStore(store, int4_tiles.rebuild, _codes)
    return store


def for_device(
    store: SegmentStore, spec: ModelSpec, layout: Layout, device: torch.device
) -> SegmentStore:
    """The same for a device's kernel, by :mod:`moepack_runtime.int4_fragments`."""
    if not _has_codes(layout):
        return store

    def rebuilt(shape: SegmentShape) -> list[SegmentTensor]:
        lying = int4_fragments.in_memory(shape, spec.dtype, device)
        return [tensor for tensor in lying.tensors if tensor.name.endswith(int4_fragments.SUFFIX)]

    return RebuildingStore(store, int4_fragments.rebuild, rebuilt)


def _has_codes(layout: Layout) -> bool:
    return any(encoding(name).kind == "int4" for name in layout.encodings)


def _codes(shape: SegmentShape) -> list[SegmentTensor]:
    return [tensor for tensor in shape.tensors if tensor.name.endswith(".codes")]
