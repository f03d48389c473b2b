"""How a checkpoint stores its tensors: as they are, in FP8 with scales for blocks, or in MXFP4.

A quantised tensor lies in a checkpoint as two, codes and scales. Here, from ``config.json`` and the
headers alone, the two become one *stored tensor* of the shape and dtype that transformers gives it
in memory; :mod:`moepack.families` sees nothing else.

FP8 (``quant_method`` "fp8", as DeepSeek-V3 and Qwen3 publish it): ``X`` in F8_E4M3, and
``X_scale_inv`` with a scale for each block of ``weight_block_size``. Which tensors are quantised is
told by their dtype; ``modules_to_not_convert`` says no more, and is not read.

MXFP4 (GPT-OSS): ``X_blocks`` [experts, rows, groups, 16] and ``X_scales`` [experts, rows, groups],
both U8. Transformers holds the experts transposed, [experts, 32 * groups, rows].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moepack import dequantise, source_files, source_headers
from moepack.dequantise import MXFP4_GROUP, MXFP4_GROUP_BYTES, NUMPY_DTYPES, SCALE_DTYPES
from moepack.errors import (
    DamagedCheckpointError,
    MissingTensorError,
    TensorMismatchError,
    UnsupportedEncodingError,
)
from moepack.families.config import MAX_SIZE, Config
from moepack.records import record
from moepack.segments import Bits
from moepack.source_headers import TensorHeader

#: How the methods that are read are called in ``quantization_config``.
METHODS = ("fp8", "mxfp4")

#: The dtypes that a model can be dequantised to, as ``config.json`` calls them.
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_FP8 = "F8_E4M3"
_FP8_SCALES = "_scale_inv"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"

Method = Literal["plain", "fp8", "mxfp4"]


@record
class StoredTensor:
    """A tensor as the model has it, and what of it lies in the files.

    Attributes
    ----------
    name : str
    dtype, shape
        As the model has it; dtype as safetensors spells it.
    method : {"plain", "fp8", "mxfp4"}
    data : TensorHeader
        The tensor as it is, or its codes.
    scales : TensorHeader or None
    block : tuple of int
        Height and width of what shares a scale in FP8.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: Method
    data: TensorHeader
    scales: TensorHeader | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def parts(self) -> tuple[TensorHeader, ...]:
        """What lies in the files."""
        return (self.data,) if self.scales is None else (self.data, self.scales)

    @property
    def size_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.size_bytes for part in self.parts)

    def entry(self, index: int) -> StoredTensor:
        """One entry of the first dimension: an expert."""
        return StoredTensor(
            name=f"{self.name}[{index}]",
            dtype=self.dtype,
            shape=self.shape[1:],
            method=self.method,
            data=self.data.entry(index),
            scales=None if self.scales is None else self.scales.entry(index),
            block=self.block,
        )

    def read(self, folder: Path) -> Bits:
        """Bit patterns in the dtype and the shape that the model has.

        Peak memory: the result; where it is quantised, its codes and scales as well, and what
        :mod:`moepack.dequantise` says. A matrix from MXFP4 is a transposed view.

        Raises
        ------
        DamagedCheckpointError
            When a shard cannot be read, or a scale or a weight is infinite or no number.
        """
        if self.scales is None:
            return _read(folder, self.data, NUMPY_DTYPES[self.dtype])
        codes = _read(folder, self.data, "u1")
        scales = _read(folder, self.scales, NUMPY_DTYPES.get(self.scales.dtype, "u1"))
        try:
            if self.method == "mxfp4":
                return dequantise.mxfp4_weights(codes, scales, self.dtype).T
            values = dequantise.scale_values(scales, self.scales.dtype)
            return dequantise.fp8_weights(codes, values, self.block, self.dtype)
        except DamagedCheckpointError as failure:
            what = f"{folder / self.data.file}: tensor {self.name}"
            raise source_headers.damaged(what, str(failure), "finite numbers") from None


@record
class SourceSize:
    """What of a model lies in a checkpoint's files.

    Attributes
    ----------
    encoding : str
        How the routed experts are stored: a dtype, ``FP8`` or ``MXFP4``.
    size_bytes : int
        Bytes of every tensor that the model needs.
    """

    encoding: str
    size_bytes: int


def stored_tensors(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], what: str
) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, as the model has it.

    Parameters
    ----------
    config
        The parsed ``config.json``.
    headers
        Every tensor of the files.
    what
        How messages name the model.

    Raises
    ------
    UnsupportedEncodingError
        The method of quantisation is not one of :data:`METHODS`, or a variety that is not read.
    MissingTensorError
        Codes without scales, or scales without codes.
    TensorMismatchError
        Codes or scales of a shape or dtype that the method does not have.
    DamagedCheckpointError
        ``quantization_config`` is not what it should be.
    """
    reader = Config(config, {}, f"{what}: config.json")
    section = _quantisation(reader)
    if section is None:
        return dict(_plain(headers, set()))
    if section.value("quant_method") == "mxfp4":
        return dict(_mxfp4_tensors(headers, _dtype(reader), what))
    return dict(_fp8_tensors(headers, _block(section), _dtype(reader), what))


def _quantisation(config: Config) -> Config | None:
    """What the config says of quantisation, of a method that is read."""
    keys = ("quantization_config", "compression_config")
    key = next((key for key in keys if config.value(key)), None)
    if key is None:
        return None
    section = config.section(key, {"fmt": "e4m3", "expert_dtype": "fp8"})
    method = section.value("quant_method")
    if method not in METHODS:
        raise UnsupportedEncodingError(
            f"{config.what}: the weights are quantised ({str(method or key).upper()}); expected one"
            f" of {', '.join(METHODS)}, or none; use a copy of the model in bfloat16"
        )
    return section


def _block(section: Config) -> tuple[int, int]:
    """Height and width of FP8's blocks."""
    for key, wanted in (("fmt", "e4m3"), ("expert_dtype", "fp8")):
        if section.value(key) != wanted:
            raise UnsupportedEncodingError(
                f"{section.what}: FP8 with {key} = {section.value(key)!r}; expected {wanted!r}; use"
                " a copy of the model in bfloat16"
            )
    block = section.integers("weight_block_size")
    if not block:
        raise UnsupportedEncodingError(
            f"{section.what}: FP8 without a weight_block_size; expected scales for blocks, as in"
            " [128, 128]; use a copy of the model in bfloat16"
        )
    if len(block) != 2 or not 1 <= min(block) <= max(block) <= MAX_SIZE:
        raise section.damaged(f"weight_block_size = {list(block)}", "a height and a width")
    return block[0], block[1]


def _dtype(config: Config) -> str:
    """What quantised tensors become: what the config says that the model is, else bfloat16."""
    name = config.value("dtype") or config.value("torch_dtype") or "bfloat16"
    if name not in tuple(_DTYPES):
        raise UnsupportedEncodingError(
            f"{config.what}: the model's dtype is {name!r}; expected one of {', '.join(_DTYPES)},"
            " to make of quantised weights"
        )
    return _DTYPES[name]


def _fp8_tensors(
    headers: Mapping[str, TensorHeader], block: tuple[int, int], dtype: str, what: str
) -> Iterator[tuple[str, StoredTensor]]:
    used = set()
    for name, header in headers.items():
        if header.dtype != _FP8:
            continue
        scales = _partner(name + _FP8_SCALES, name, headers, what)
        if len(header.shape) < 2:
            raise _mismatch(what, name, header, "a matrix")
        tiles = (-(-header.shape[-2] // block[0]), -(-header.shape[-1] // block[1]))
        _check_scales(what, name + _FP8_SCALES, scales, SCALE_DTYPES, (*header.shape[:-2], *tiles))
        used |= {name, name + _FP8_SCALES}
        yield name, StoredTensor(name, dtype, header.shape, "fp8", header, scales, block)
    yield from _plain(headers, used)


def _mxfp4_tensors(
    headers: Mapping[str, TensorHeader], dtype: str, what: str
) -> Iterator[tuple[str, StoredTensor]]:
    used = set()
    for blocks, header in headers.items():
        name = blocks.removesuffix(_MXFP4_BLOCKS)
        if blocks.endswith(_MXFP4_SCALES) and header.dtype == "U8":
            _partner(blocks.removesuffix(_MXFP4_SCALES) + _MXFP4_BLOCKS, blocks, headers, what)
        if name == blocks:
            continue
        scales = _partner(name + _MXFP4_SCALES, blocks, headers, what)
        if header.dtype != "U8" or len(header.shape) != 4 or header.shape[3] != MXFP4_GROUP_BYTES:
            raise _mismatch(what, blocks, header, "U8 of shape [experts, rows, groups, 16]")
        experts, rows, groups, _ = header.shape
        _check_scales(what, name + _MXFP4_SCALES, scales, ("U8",), (experts, rows, groups))
        shape = (experts, groups * MXFP4_GROUP, rows)
        used |= {blocks, name + _MXFP4_SCALES}
        yield name, StoredTensor(name, dtype, shape, "mxfp4", header, scales)
    yield from _plain(headers, used)


def _plain(
    headers: Mapping[str, TensorHeader], used: set[str]
) -> Iterator[tuple[str, StoredTensor]]:
    for name, header in headers.items():
        if name not in used:
            yield name, StoredTensor(name, header.dtype, header.shape, "plain", header)


def _partner(name: str, of: str, headers: Mapping[str, TensorHeader], what: str) -> TensorHeader:
    """The other one of codes and scales."""
    if name in headers:
        return headers[name]
    raise MissingTensorError(
        f"{what}: no tensor {name}; expected it beside {of}, which cannot be read without; download"
        " the model again"
    )


def _check_scales(
    what: str, name: str, scales: TensorHeader, dtypes: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    if scales.dtype not in dtypes or scales.shape != shape:
        raise _mismatch(what, name, scales, f"{' or '.join(dtypes)} of shape {list(shape)}")


def _mismatch(what: str, name: str, header: TensorHeader, expected: str) -> TensorMismatchError:
    return TensorMismatchError(
        f"{what}: tensor {name} is {header.dtype} of shape {list(header.shape)}; expected"
        f" {expected}, by the method of quantisation; use the config that belongs to these weights"
    )


def _read(folder: Path, header: TensorHeader, dtype: str) -> Bits:
    raw = source_files.read_range(folder / header.file, header.offset_bytes, header.size_bytes)
    return np.frombuffer(raw, dtype).reshape(header.shape)
