"""Kernels for one token's experts, in Triton: this file alone needs it, and is imported lazily.

Every segment is an address; its tensors lie at offsets from there that are constants of the
compiled kernel. A program computes a few neurons (or a few outputs) of one segment over all of its
inputs, in steps of fixed width and in float32, so that bits depend on the token and the segment.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _address(
    number: tl.tensor,
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    a4: tl.tensor,
    a5: tl.tensor,
    a6: tl.tensor,
    a7: tl.tensor,
) -> tl.tensor:
    """The one of that number."""
    found = tl.where(number == 1, a1, a0)
    found = tl.where(number == 2, a2, found)
    found = tl.where(number == 3, a3, found)
    found = tl.where(number == 4, a4, found)
    found = tl.where(number == 5, a5, found)
    found = tl.where(number == 6, a6, found)
    return tl.where(number == 7, a7, found)


@triton.jit
def _dense(
    weights: tl.tensor, rows: tl.tensor, inputs: tl.tensor, INPUTS: tl.constexpr, STEP: tl.constexpr
) -> tl.tensor:
    """Rows of a matrix, floats or 8-bit codes, times inputs: float32 [rows]."""
    total = tl.zeros([rows.shape[0], STEP], tl.float32)
    for first in tl.static_range(0, INPUTS, STEP):
        columns = first + tl.arange(0, STEP)
        inside = columns < INPUTS
        places = tl.max_contiguous(rows[:, None] * INPUTS + columns[None, :], (1, STEP))
        values = tl.load(weights + places, mask=inside[None, :], other=0).to(tl.float32)
        x = tl.load(inputs + columns, mask=inside, other=0).to(tl.float32)
        total += values * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def _fragments(
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
) -> tl.tensor:
    """The same of 4-bit codes in fragments; see :mod:`moepack_runtime.int4_fragments`.

    Every 32 inputs of a row are 16 bytes, whose nibbles are 8 inputs apart.
    """
    total = tl.zeros([rows.shape[0], PAIRS], tl.float32)
    byte = tl.arange(0, 16)
    within = byte % 2 * 16 + byte // 4 * 2 + byte // 2 % 2
    of_row = rows // 8 * (INPUTS * 4) + rows % 8 * 16
    for first in tl.static_range(0, INPUTS // 32, PAIRS):
        pairs = first + tl.arange(0, PAIRS)
        inside = pairs < INPUTS // 32
        places = of_row[:, None, None] + pairs[None, :, None] * 128 + byte[None, None, :]
        packed = tl.load(codes + places, mask=inside[None, :, None], other=0)
        lowest = inputs + pairs[:, None] * 32 + within[None, :]
        low_x = tl.load(lowest, mask=inside[:, None], other=0).to(tl.float32)
        high_x = tl.load(lowest + 8, mask=inside[:, None], other=0).to(tl.float32)
        low = ((packed & 15).to(tl.float32) - 8.0) * low_x[None, :, :]
        high = ((packed >> 4).to(tl.float32) - 8.0) * high_x[None, :, :]
        groups = pairs * 32 // GROUP
        of_group = scales + (groups[None, :] * OUTPUTS + rows[:, None]) * 2
        scale = tl.load(of_group, mask=inside[None, :], other=0).to(tl.float32)
        offset = tl.load(of_group + 1, mask=inside[None, :], other=0).to(tl.float32)
        total += tl.sum(low + high, 2) * scale + tl.sum(low_x + high_x, 1)[None, :] * offset
    return tl.sum(total, 1)


@triton.jit
def _rows_times(
    address: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    MATRIX: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Rows of the matrix at an offset, in whatever it is stored, and their bias; -1: none."""
    matrix = address + MATRIX
    if CODES == "int4":
        codes = matrix.to(tl.pointer_type(tl.uint8))
        scales = (address + SCALES).to(tl.pointer_type(tl.bfloat16))
        found = _fragments(codes, scales, rows, inputs, OUTPUTS, INPUTS, GROUP, STEP // 32)
    elif CODES == "int8":
        codes = matrix.to(tl.pointer_type(tl.int8))
        scales = (address + SCALES).to(tl.pointer_type(tl.bfloat16))
        found = _dense(codes, rows, inputs, INPUTS, STEP) * tl.load(scales + rows).to(tl.float32)
    else:
        found = _dense(matrix.to(tl.pointer_type(DTYPE)), rows, inputs, INPUTS, STEP)
    if BIAS >= 0:
        found += tl.load((address + BIAS).to(tl.pointer_type(DTYPE)) + rows).to(tl.float32)
    return found


@triton.jit
def first_products(
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    a4: tl.tensor,
    a5: tl.tensor,
    a6: tl.tensor,
    a7: tl.tensor,
    token: tl.tensor,
    active: tl.tensor,
    HIDDEN: tl.constexpr,
    NEURONS: tl.constexpr,
    MATRIX: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Gate, up and activation: token [hidden] to active float32 [segments, neurons]."""
    segment = tl.program_id(1)
    address = _address(segment, a0, a1, a2, a3, a4, a5, a6, a7)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = _rows_times(
        address, rows, token,
        MATRIX, SCALES, BIAS, 2 * NEURONS, HIDDEN, CODES, GROUP, STEP, DTYPE,
    )  # fmt: skip
    up = _rows_times(
        address, rows + NEURONS, token,
        MATRIX, SCALES, BIAS, 2 * NEURONS, HIDDEN, CODES, GROUP, STEP, DTYPE,
    )  # fmt: skip
    if KIND == "silu":
        found = gate / (1.0 + tl.exp(-gate)) * up
    elif KIND == "gelu":
        found = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:  # clamped_swiglu
        # Not tl.minimum: that of a NaN and a number is the number, and torch's clamp keeps the NaN.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        found = (up + 1.0) * (gate / (1.0 + tl.exp(-gate * ALPHA)))
    tl.store(active + segment * NEURONS + rows, found)


@triton.jit(do_not_specialize=["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"])
def second_products(
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    a4: tl.tensor,
    a5: tl.tensor,
    a6: tl.tensor,
    a7: tl.tensor,
    active: tl.tensor,
    outputs: tl.tensor,
    p0: tl.int32,
    p1: tl.int32,
    p2: tl.int32,
    p3: tl.int32,
    p4: tl.int32,
    p5: tl.int32,
    p6: tl.int32,
    p7: tl.int32,
    HIDDEN: tl.constexpr,
    NEURONS: tl.constexpr,
    MATRIX: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Down: active [segments, neurons] to the segments' rows of outputs [.., hidden]."""
    segment = tl.program_id(1)
    address = _address(segment, a0, a1, a2, a3, a4, a5, a6, a7)
    place = _address(segment, p0, p1, p2, p3, p4, p5, p6, p7)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = _rows_times(
        address, rows, active + segment * NEURONS,
        MATRIX, SCALES, BIAS, HIDDEN, NEURONS, CODES, GROUP, STEP, DTYPE,
    )  # fmt: skip
    tl.store(outputs + place * HIDDEN + rows, found.to(outputs.dtype.element_ty))


@triton.jit
def add_rows(
    residual: tl.tensor,
    shared: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Weight rows [experts * parts, hidden], add them in their order and behind ``shared``.

    The sum is rounded once and added to the residual stream.
    """
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < HIDDEN
    total = tl.zeros([WIDTH], tl.float32)
    if SHARED:
        total += tl.load(shared + columns, mask=inside, other=0).to(tl.float32)
    for expert in tl.static_range(EXPERTS):
        weight = tl.load(weights + expert)
        for part in tl.static_range(PARTS):
            row = rows + (expert * PARTS + part) * HIDDEN
            total += weight * tl.load(row + columns, mask=inside, other=0).to(tl.float32)
    before = tl.load(residual + columns, mask=inside, other=0)
    added = before.to(tl.float32) + total.to(before.dtype).to(tl.float32)
    tl.store(residual + columns, added.to(before.dtype), mask=inside)
