"""A routed expert in a quantised encoding, and back; and a trunk's matrix.

The whole expert is rounded, then cut (:func:`moepack.segments.cut_expert_into`): packs of different
splits hold the same codes. How codes are chosen is in :mod:`moepack.rounding`, and where there are
second moments then in :mod:`moepack.feedback`; what is stored, in :mod:`moepack.encodings`.

A quantised expert is a mapping, as the source's experts are. INT8 has ``gate.weight`` int8
[F, hidden] and ``gate.scale`` uint16 [F] (bits of BF16); INT4 has ``gate.codes`` uint8 [hidden, F],
a code a byte, inputs first, and ``gate.scales`` uint16 [hidden / g, F, 2]; likewise ``up`` and
``down``. Biases stay as they are.

Peak memory beside the expert itself: its codes, a byte for each weight, its scales, and 12 MiB for
each thread; 32 MiB where errors are made good.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.encodings import ENCODINGS, Encoding, unpack_tiles
from moepack.errors import NonFiniteWeightError
from moepack.feedback import Moments, feed_int4
from moepack.rounding import Floats, Rounded, from_bf16, round_int4, round_int8
from moepack.segments import Bits, SegmentShape
from moepack.trunk import TrunkPart

MATRICES = ("gate", "up", "down")

_NUMPY: dict[str, type[np.floating[Any]]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
}

#: Weights rounded at once: their arrays (1 MiB each) stay in a core's share of the cache.
_BLOCK = 1 << 18

#: Weights whose errors are made good at once: arrays of 8 MiB, of which there are two.
_FED_BLOCK = 1 << 20

#: Rows of a block of INT4, where the matrix has as many.
_BLOCK_ROWS = 2048


class Importance(NamedTuple):
    """What a squared error of a weight counts for, by the input that it is multiplied with.

    Mean squared activations on calibration text, say; not negative, and only ratios matter.
    ``hidden`` [hidden] weighs gate and up, ``neurons`` [F] weighs down. Where there are second
    moments of either, errors of 4 bits are made good, too.
    """

    hidden: Floats
    neurons: Floats
    of_hidden: Moments | None = None
    of_neurons: Moments | None = None


class _Matrix(NamedTuple):
    """A matrix [outputs, inputs] of the source, and what its inputs count for."""

    bits: Bits
    dtype: str
    what: str
    importance: Floats | None = None
    moments: Moments | None = None

    def floats(self, rows: slice, columns: slice) -> Floats:
        """Some of its weights, inputs first: [columns, rows]."""
        bits = self.bits[rows, columns].T
        if self.dtype == "BF16":
            weights = from_bf16(np.ascontiguousarray(bits).view(np.uint16))
        else:
            with np.errstate(over="ignore"):  # of F64: refused below
                weights = bits.view(_NUMPY[self.dtype]).astype(np.float32, order="C")
        finite = np.isfinite(weights)
        if not finite.all():
            column, row = np.argwhere(~finite)[0]
            raise NonFiniteWeightError(
                f"{self.what}: {weights[column, row]} in row {row + rows.start}, column "
                f"{column + columns.start}, expected finite weights; fetch the checkpoint again, "
                "or plan without rounding it"
            )
        return weights


#: What fills the tensors of a matrix, in pieces that do not meet.
_Jobs = list[Callable[[], None]]


class _Work(NamedTuple):
    """The tensors of a matrix; what fills them; and what then makes errors good in them."""

    tensors: dict[str, Bits]
    jobs: _Jobs
    feeds: _Jobs


def quantise_expert(
    weights: Mapping[str, Bits],
    encoding: Encoding,
    dtype: str,
    what: str,
    *,
    importance: Importance | None = None,
    pool: Executor | None = None,
) -> dict[str, Bits]:
    """Round a whole expert.

    Parameters
    ----------
    weights
        By the names of ``segments.EXPERT_TENSORS``, as bit patterns of ``dtype``.
    encoding
        A quantised one.
    dtype
        Of the weights, as safetensors spells it.
    what
        How to name the expert in a message: ``layer 3, expert 17``.
    importance
        None: every weight counts the same.
    pool
        Where the work is done, in pieces; None: here. The result is the same.

    Returns
    -------
    dict
        As the module says, with the biases.

    Raises
    ------
    NonFiniteWeightError
        When a weight is NaN or infinite.
    GroupMismatchError
        When the group does not divide the expert's sizes.
    """
    width, hidden_size = weights["gate.weight"].shape
    encoding.check_fits(hidden_size, width)
    found = {name: bits for name, bits in weights.items() if name.endswith(".bias")}
    jobs: _Jobs = []
    feeds: _Jobs = []
    for matrix in MATRICES:
        bits = weights[f"{matrix}.weight"]
        source = _Matrix(bits, dtype, f"{what}: {matrix}.weight", *_of(importance, matrix))
        work = _int8(source) if encoding.group is None else _int4(source, encoding.group)
        found |= {f"{matrix}.{name}": tensor for name, tensor in work.tensors.items()}
        jobs += work.jobs
        feeds += work.feeds
    _run(jobs, pool)
    _run(feeds, pool)
    return found


def _of(importance: Importance | None, matrix: str) -> tuple[Floats | None, Moments | None]:
    """What a matrix' errors are weighed by."""
    if importance is None:
        return None, None
    if matrix == "down":
        return importance.neurons, importance.of_neurons
    return importance.hidden, importance.of_hidden


def stored_tensors(tensor: Bits, part: TrunkPart, pool: Executor | None = None) -> list[Bits]:
    """The tensors that one of the trunk is stored as, each as its bytes: uint8, flat.

    Parameters
    ----------
    tensor
        Bit patterns of ``part.source``.
    pool
        Where rounding is done, in pieces; None: here. The result is the same.

    Raises
    ------
    NonFiniteWeightError
        When a weight that is to be rounded is NaN or infinite.
    """
    info = part.source
    fits = tensor.shape == info.shape and tensor.nbytes == info.size_bytes
    assert fits, f"got {tensor.shape} {tensor.dtype}, expected {info}"
    if not part.is_rounded:
        return [np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)]
    found, jobs, _ = _int8(_Matrix(tensor, info.dtype, f"trunk tensor {info.name}"))
    _run(jobs, pool)
    return [bits.reshape(-1).view(np.uint8) for bits in (found["weight"], found["scale"])]


def _run(jobs: _Jobs, pool: Executor | None) -> None:
    for _ in (pool.map if pool is not None else map)(_call, jobs):
        pass


def _call(job: Callable[[], None]) -> None:
    job()


def _int4(matrix: _Matrix, group: int) -> _Work:
    outputs, inputs = matrix.bits.shape
    codes = np.empty((inputs // group, group, outputs), np.uint8)
    scales = np.empty((inputs // group, outputs, 2), np.uint16)
    importance = _of_mean_1(matrix.importance, (inputs // group, group))

    def fill(first_row: int, first: int, last: int) -> None:
        rows = slice(first_row, min(first_row + _BLOCK_ROWS, outputs))
        weights = matrix.floats(rows, slice(first * group, last * group))
        weights = weights.reshape(last - first, group, -1).swapaxes(0, 1)  # [g, groups, rows]
        shape = weights.shape
        counts = None
        if importance is not None:
            counts = np.broadcast_to(importance[first:last].T[:, :, None], shape).reshape(group, -1)
        rounded = round_int4(weights.reshape(group, -1), counts)
        assert rounded.offset is not None
        codes[first:last, :, rows] = rounded.codes.reshape(shape).swapaxes(0, 1)
        scales[first:last, rows, 0] = rounded.scale.reshape(shape[1:])
        scales[first:last, rows, 1] = rounded.offset.reshape(shape[1:])

    step = max(1, _BLOCK // (group * min(outputs, _BLOCK_ROWS)))
    jobs: _Jobs = [
        functools.partial(fill, row, first, min(first + step, len(codes)))
        for row in range(0, outputs, _BLOCK_ROWS)
        for first in range(0, len(codes), step)
    ]
    flat = codes.reshape(inputs, outputs)

    def feed(moments: Moments, rows: slice) -> None:
        plain = Rounded(flat[:, rows], scales[:, rows, 0], scales[:, rows, 1])
        fed = feed_int4(matrix.floats(rows, slice(0, inputs)), plain, moments)
        flat[:, rows], scales[:, rows, 0] = fed.codes, fed.scale
        scales[:, rows, 1] = fed.offset

    feeds: _Jobs = []
    if matrix.moments is not None:
        if len(matrix.moments.weights) != inputs:
            raise ValueError(f"moments of {len(matrix.moments.weights)} inputs, expected {inputs}")
        # Some rows each, of all inputs: within a row one error follows from the other.
        rows_each = max(1, _FED_BLOCK // inputs)
        feeds = [
            functools.partial(feed, matrix.moments, slice(row, min(row + rows_each, outputs)))
            for row in range(0, outputs, rows_each)
        ]
    return _Work({"codes": flat, "scales": scales}, jobs, feeds)


def _int8(matrix: _Matrix) -> _Work:
    outputs, inputs = matrix.bits.shape
    codes = np.empty((outputs, inputs), np.int8)
    scale = np.empty(outputs, np.uint16)
    importance = _of_mean_1(matrix.importance, (inputs,))
    step = max(1, _BLOCK // inputs)

    def fill(first: int) -> None:
        rows = slice(first, min(first + step, outputs))
        weights = np.ascontiguousarray(matrix.floats(rows, slice(0, inputs)).T)
        rounded = round_int8(weights, importance)
        codes[rows], scale[rows] = rounded.codes, rounded.scale

    jobs: _Jobs = [functools.partial(fill, first) for first in range(0, outputs, step)]
    return _Work({"weight": codes, "scale": scale}, jobs, [])


def _of_mean_1(importance: Floats | None, shape: tuple[int, ...]) -> Floats | None:
    """Over the last axis; where nothing counts, everything counts the same."""
    if importance is None:
        return None
    if importance.size != math.prod(shape) or not np.all(np.isfinite(importance)):
        raise ValueError(f"importance of shape {importance.shape}, expected {shape}, all finite")
    if np.any(importance < 0):
        raise ValueError("importance below 0")
    shaped = importance.astype(np.float64).reshape(shape)
    mean = shaped.mean(axis=-1, keepdims=True)
    ratios: npt.NDArray[np.float64] = np.divide(
        shaped, mean, out=np.ones_like(shaped), where=mean > 0
    )
    return ratios.astype(np.float32)


def dequantise_expert(quantised: Mapping[str, Bits], encoding: Encoding) -> dict[str, Floats]:
    """What the matrices of :func:`quantise_expert` stand for: ``gate.weight`` and so on, float32.

    A plain reference, and what measures an encoding's damage. Values are those of the format's
    formula, rounded once.
    """
    found = {}
    for matrix in MATRICES:
        if encoding.kind == "int8":
            codes, scale = quantised[f"{matrix}.weight"], quantised[f"{matrix}.scale"]
            found[f"{matrix}.weight"] = codes * from_bf16(scale)[:, None]
        else:
            codes, scales = quantised[f"{matrix}.codes"], quantised[f"{matrix}.scales"]
            found[f"{matrix}.weight"] = _int4_values(codes, scales)
    return found


def dequantise_segment(payload: Bits, shape: SegmentShape) -> dict[str, Floats]:
    """What the matrices of a stored segment stand for, its neurons alone.

    Parameters
    ----------
    payload
        uint8: at least the ``size_bytes`` of the segment.
    """
    stored = {
        tensor.name: payload[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        .view({"I8": np.int8, "U8": np.uint8}.get(tensor.dtype, np.uint16))
        .reshape(tensor.shape)
        for tensor in shape.tensors
        if not tensor.name.endswith(".bias")
    }
    if "down.codes" not in stored:
        return dequantise_expert(stored, ENCODINGS["INT8"])
    both, down = (
        _int4_values(unpack_tiles(codes.view(np.uint8), len(codes)), stored[f"{matrix}.scales"])
        for matrix in ("gate_up", "down")
        for codes in (stored[f"{matrix}.codes"],)
    )
    gate, up = np.split(both, 2)
    return {"gate.weight": gate, "up.weight": up, "down.weight": down}


def _int4_values(codes: Bits, scales: Bits) -> Floats:
    """[outputs, inputs] from codes [inputs, outputs] and scales [groups, outputs, 2]."""
    scale, offset = from_bf16(scales[:, None, :, 0]), from_bf16(scales[:, None, :, 1])
    grouped = codes.reshape(len(scales), -1, codes.shape[1]).astype(np.float32)
    return ((grouped - 8) * scale + offset).reshape(codes.shape).T
