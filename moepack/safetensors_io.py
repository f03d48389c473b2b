"""Headers of safetensors files: written with aligned blocks, read with suspicion.

The library's own ``save_file`` orders tensors by dtype and name, so a packed shard's header is
written here. What is written is an ordinary safetensors file: a little-endian 64-bit header
length, the JSON header (padded with spaces, which the format allows), then the data without holes.

A shard is a row of *blocks*. The tensors of a block are adjacent; each block starts on a 4 KiB
boundary of the file and is filled up to the next one by an explicit U8 tensor ``__pad__.N``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moepack.errors import DeclaredSizeError, PackFormatError, TruncatedShardError
from moepack.segments import align_up
from moepack.units import format_size

#: Tensors of this name fill a block up to the alignment and hold zeros.
PAD_PREFIX = "__pad__."

#: The safetensors library opens no longer header.
MAX_HEADER_BYTES = 100_000_000

_LENGTH_BYTES = 8


class SizedTensor(Protocol):
    """What has a place in a shard: ``model_spec.TensorInfo``, ``segments.SegmentTensor``."""

    @property
    def name(self) -> str:
        """As the header spells it."""

    @property
    def dtype(self) -> str:
        """Likewise."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Likewise."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""


class TensorSpan(NamedTuple):
    """A tensor as a header lists it; ``begin_bytes`` and ``end_bytes`` count from the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int
    end_bytes: int


class ShardDraft(NamedTuple):
    """A shard before its data is known.

    Attributes
    ----------
    header : bytes
        The first bytes of the file, up to the data: a multiple of 4 KiB.
    offsets_bytes : tuple of int
        Where each block starts in the file.
    size_bytes : int
        Size of the whole file.
    """

    header: bytes
    offsets_bytes: tuple[int, ...]
    size_bytes: int


def draft_shard(blocks: Iterable[Iterable[SizedTensor]], metadata: Mapping[str, str]) -> ShardDraft:
    """Place blocks one after another and write the header for them."""
    spans: list[TensorSpan] = []
    starts_bytes: list[int] = []
    end_bytes = 0
    pads = 0
    for block in blocks:
        starts_bytes.append(end_bytes)
        for tensor in block:
            begin_bytes, end_bytes = end_bytes, end_bytes + tensor.size_bytes
            spans.append(
                TensorSpan(tensor.name, tensor.dtype, tensor.shape, begin_bytes, end_bytes)
            )
        gap_bytes = align_up(end_bytes) - end_bytes
        if gap_bytes:
            begin_bytes, end_bytes = end_bytes, end_bytes + gap_bytes
            spans.append(
                TensorSpan(f"{PAD_PREFIX}{pads}", "U8", (gap_bytes,), begin_bytes, end_bytes)
            )
            pads += 1
    header = encode_header(spans, metadata)
    offsets_bytes = tuple(len(header) + start_bytes for start_bytes in starts_bytes)
    return ShardDraft(header, offsets_bytes, len(header) + end_bytes)


def encode_header(spans: Iterable[TensorSpan], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file whose data starts on the alignment."""
    document: dict[str, object] = {"__metadata__": dict(metadata)}
    for span in spans:
        document[span.name] = {
            "dtype": span.dtype,
            "shape": span.shape,
            "data_offsets": (span.begin_bytes, span.end_bytes),
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    padded = text.ljust(align_up(_LENGTH_BYTES + len(text)) - _LENGTH_BYTES)
    return len(padded).to_bytes(_LENGTH_BYTES, "little") + padded


def read_header(path: Path) -> bytes:
    """The first bytes of a file, length and JSON, up to where the data starts.

    Raises
    ------
    DeclaredSizeError
        When the file declares a header longer than the format allows.
    TruncatedShardError
        When the file ends inside its header.
    """
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        if len(length) < _LENGTH_BYTES:
            raise TruncatedShardError(
                f"{path}: {len(length)} bytes, expected at least a header; pack again"
            )
        size_bytes = int.from_bytes(length, "little")
        if size_bytes > MAX_HEADER_BYTES:
            raise DeclaredSizeError(
                f"{path}: declares a header of {format_size(size_bytes)}, expected at most "
                f"{format_size(MAX_HEADER_BYTES)}; pack again"
            )
        text = file.read(size_bytes)
        if len(text) < size_bytes:
            raise TruncatedShardError(
                f"{path}: ends inside its header of {size_bytes} bytes; pack again"
            )
    return length + text


def parse_header(header: bytes, path: Path) -> tuple[TensorSpan, ...]:
    """Every tensor of a header, in the order of the data.

    Parameters
    ----------
    header
        From :func:`read_header`.
    path
        For messages.

    Raises
    ------
    PackFormatError
        When the header is not one, names a tensor twice, or leaves a hole in the data.
    """
    try:
        document = json.loads(header[_LENGTH_BYTES:], object_pairs_hook=_unique)
        if not isinstance(document, dict):
            raise ValueError("expected a map of tensors")
        spans = sorted(_spans(document), key=lambda span: (span.begin_bytes, span.end_bytes))
    except (ValueError, RecursionError) as failure:
        raise PackFormatError(f"{path}: not a safetensors header: {failure}; pack again") from None
    end_bytes = 0
    for span in spans:
        if span.begin_bytes != end_bytes or span.end_bytes < end_bytes:
            raise PackFormatError(
                f"{path}: tensor {span.name} is at {span.begin_bytes}..{span.end_bytes} of the "
                f"data, expected it to start at {end_bytes}; pack again"
            )
        end_bytes = span.end_bytes
    return tuple(spans)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is used twice")
    return found


def _spans(document: Mapping[str, Any]) -> Iterator[TensorSpan]:
    for name, entry in document.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(
                entry
            ) == 3 and all(type(number) is int for number in (*shape, begin, end)):
                yield TensorSpan(name, dtype, tuple(shape), begin, end)
            case _:
                raise ValueError(f"tensor {name} is not dtype, shape and data_offsets")
