"""What the files of a checkpoint say: JSON, safetensors headers and indexes, parsed with suspicion.

Headers are read without the safetensors library, because hub files are read by range requests
and experts by slices of a tensor. The rules are the format's own: an 8-byte little-endian length,
a JSON object, then the data, which the tensors cover without holes, overlaps or a remainder.

Bytes in, records out: nothing here opens a file (:mod:`moepack.source_files`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from moepack.errors import DamagedCheckpointError, UnsupportedEncodingError
from moepack.records import record

LENGTH_BYTES = 8

#: The safetensors library opens no longer header.
MAX_HEADER_BYTES = 100_000_000

#: Bits of one element of every dtype that safetensors knows.
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@record
class TensorHeader:
    """A tensor of a checkpoint.

    Attributes
    ----------
    dtype : str
        As safetensors spells it.
    shape : tuple of int
    file : str
        The shard that holds it.
    offset_bytes, size_bytes : int
        Its place in that file, counted from the file's start.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    size_bytes: int

    def entry(self, index: int) -> TensorHeader:
        """One entry of the first dimension, a contiguous run of bytes."""
        size_bytes = self.size_bytes // self.shape[0]
        offset_bytes = self.offset_bytes + index * size_bytes
        return TensorHeader(self.dtype, self.shape[1:], self.file, offset_bytes, size_bytes)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object; ``NaN``, infinities and names that are used twice are refused.

    Raises
    ------
    DamagedCheckpointError
        When the text is anything else.
    """
    try:
        data = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as failure:
        raise damaged(what, f"not JSON ({failure})", "a JSON object") from None
    if not isinstance(data, dict):
        raise damaged(what, f"a JSON {type(data).__name__}", "a JSON object")
    return data


def header_bytes(prefix: bytes, file_bytes: int, what: str) -> int:
    """Length of a shard's JSON header, from the first 8 bytes of the file.

    Raises
    ------
    DamagedCheckpointError
        When no header of that length can be in a file of ``file_bytes``.
    """
    if len(prefix) < LENGTH_BYTES:
        raise damaged(what, f"{file_bytes} bytes", "at least a header's length of 8 bytes")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(what, f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise damaged(what, f"{file_bytes} bytes in all", f"a header of {length} bytes first")
    return length


def parse_header(header: bytes, file: str, file_bytes: int, what: str) -> dict[str, TensorHeader]:
    """Every tensor of a shard, from its JSON header.

    Parameters
    ----------
    header
        The JSON, without the length before it.
    file
        Name of the shard, which goes into the result.
    file_bytes
        Size of the whole shard.
    what
        How messages name the shard.

    Raises
    ------
    DamagedCheckpointError
        When the header is not one, or does not describe a file of that size: offsets outside it,
        tensors that overlap, holes between them, sizes that contradict shapes.
    UnsupportedEncodingError
        For a dtype of which not even the size is known.
    """
    start = LENGTH_BYTES + len(header)
    headers = {
        name: _parse_entry(name, entry, file, start, what)
        for name, entry in parse_json(header, what).items()
        if name != "__metadata__"
    }
    end = start
    for name in sorted(headers, key=lambda name: _place(headers[name])):
        tensor = headers[name]
        if tensor.offset_bytes != end:
            kind = "overlaps the tensor before it" if tensor.offset_bytes < end else "leaves a hole"
            got = f"tensor {name} at {tensor.offset_bytes - start} of the data, which {kind}"
            raise damaged(what, got, f"it at {end - start}")
        end += tensor.size_bytes
    if end != file_bytes:
        kind = "truncated" if end > file_bytes else "followed by bytes of no tensor"
        raise damaged(what, f"{file_bytes} bytes: {kind}", f"{end} bytes by its header")
    return headers


def parse_index(text: bytes, what: str) -> dict[str, str]:
    """Tensor to shard, from a ``model.safetensors.index.json``.

    Raises
    ------
    DamagedCheckpointError
        When it is no index, or names a file outside the model's folder.
    """
    weight_map = parse_json(text, what).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise damaged(what, "no weight_map", "a map from tensors to shards")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            got = f"{file!r} for tensor {tensor}"
            raise damaged(what, got, "the name of a .safetensors file in the model's folder")
    return dict(weight_map)


def is_plain_name(file: str) -> bool:
    """Whether a shard's name stays in its folder."""
    return (
        file.endswith(".safetensors")
        and not file.startswith(".")
        and not any(sign in file for sign in ("/", "\\", ":", "\0"))
    )


def check_index(
    weight_map: Mapping[str, str], headers: Mapping[str, TensorHeader], what: str
) -> None:
    """Refuse an index that disagrees with the shards.

    Raises
    ------
    DamagedCheckpointError
        Naming the first tensor that is not where the index says, or that the index lacks.
    """
    for name, file in weight_map.items():
        if name not in headers or headers[name].file != file:
            raise damaged(what, f"tensor {name} is not in {file}", "it there, by the index")
    for name in headers:
        if name not in weight_map:
            raise damaged(what, f"tensor {name} in {headers[name].file}", "it in the index")


def damaged(what: str, got: str, expected: str) -> DamagedCheckpointError:
    """An error that says what is wrong with a file of the model."""
    return DamagedCheckpointError(f"{what}: {got}; expected {expected}; download the model again")


def _place(tensor: TensorHeader) -> tuple[int, int]:
    return tensor.offset_bytes, tensor.size_bytes


def _parse_entry(name: str, entry: object, file: str, start: int, what: str) -> TensorHeader:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
            **others,
        } if not others and all(type(number) is int for number in (*shape, begin, end)):
            pass
        case _:
            raise damaged(what, f"tensor {name} is {entry!r:.80}", "dtype, shape and data_offsets")
    if dtype not in _DTYPE_BITS:
        raise UnsupportedEncodingError(
            f"{what}: tensor {name} is stored in {dtype}; expected BF16, F16 or F32; use a copy of"
            " the model in bfloat16"
        )
    if min((*shape, begin), default=0) < 0 or begin > end:
        got = f"tensor {name} of shape {shape} at {begin} to {end}"
        raise damaged(what, got, "no negative sizes")
    size_bytes = -(-math.prod(shape) * _DTYPE_BITS[dtype] // 8)
    if end - begin != size_bytes:
        got = f"tensor {name} of {end - begin} bytes"
        raise damaged(what, got, f"{size_bytes} for {dtype} of shape {shape}")
    return TensorHeader(dtype, tuple(shape), file, start + begin, size_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is used twice")
    return found


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")
