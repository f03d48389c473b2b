"""Safetensors files made by hand, right or wrong in any way that a test needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "uint8": "U8", "float64": "F64"}


def write_file(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """A correct file; uint16 counts as bfloat16."""
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(with_header(json.dumps(entries).encode(), data))


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header and data, whose length may lie."""
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def read_file(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of a float32 or float16 file, by the safetensors library."""
    from safetensors.numpy import load_file

    return dict(load_file(path))
