"""What quantised weights are, in loops over single weights: the oracle of the tests.

Nothing here is shared with moepack: numbers are Python's, BF16 goes through ``struct``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence


def bf16(value: float) -> float:
    """The nearest BF16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    low, bits = bits & 0xFFFF, bits >> 16
    if low > 0x8000 or (low == 0x8000 and bits & 1):
        bits += 1
    return bf16_of(bits)


def bf16_of(bits: int) -> float:
    """The value of sixteen bits."""
    (value,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(value)


def loss(weights: Sequence[float], counts: Sequence[float], values: Sequence[float]) -> float:
    """Squared error, weighted."""
    return math.fsum(
        count * (weight - value) ** 2
        for weight, count, value in zip(weights, counts, values, strict=True)
    )


def naive_int4(weights: Sequence[float]) -> list[float]:
    """One group on a grid of 16 from its least to its largest weight."""
    low, high = min(weights), max(weights)
    scale = bf16((high - low) / 15)
    offset = bf16(low + 8 * scale)
    if scale == 0:
        return [offset for _ in weights]
    codes = [min(15, max(0, round((weight - offset) / scale) + 8)) for weight in weights]
    return [(code - 8) * scale + offset for code in codes]


def naive_symmetric_int4(weights: Sequence[float]) -> list[float]:
    """One group on a grid of 15 around zero."""
    scale = bf16(max(map(abs, weights)) / 7)
    if scale == 0:
        return [0.0 for _ in weights]
    return [min(7, max(-7, round(weight / scale))) * scale for weight in weights]


def naive_int8(weights: Sequence[float]) -> list[float]:
    """One row on a grid of 255 around zero."""
    scale = bf16(max(map(abs, weights)) / 127)
    if scale == 0:
        return [0.0 for _ in weights]
    return [min(127, max(-127, round(weight / scale))) * scale for weight in weights]


def int4_from_bytes(stored: bytes, outputs: int, inputs: int, group: int) -> list[list[float]]:
    """A matrix from the bytes of its ``codes`` and ``scales``, as the format chapter says."""
    codes, scales = stored[: outputs * inputs // 2], stored[outputs * inputs // 2 :]
    assert len(scales) == 4 * outputs * inputs // group

    def value(row: int, column: int) -> float:
        first = row // 64 * 64
        rows, r = min(64, outputs - first), row - first
        if rows == 64:
            byte, high = column * 32 + r % 32, r >= 32
        else:
            byte, high = column * rows // 2 + r // 2, r % 2 == 1
        pair = codes[first * inputs // 2 + byte]
        code = pair >> 4 if high else pair & 15
        place = 4 * (column // group * outputs + row)
        scale, offset = struct.unpack("<HH", scales[place : place + 4])
        return (code - 8) * bf16_of(scale) + bf16_of(offset)

    return [[value(row, column) for column in range(inputs)] for row in range(outputs)]


def int8_from_bytes(codes: bytes, scales: bytes, outputs: int, inputs: int) -> list[list[float]]:
    """A matrix from the bytes of its ``weight`` and ``scale``."""
    factors = [bf16_of(bits) for bits in struct.unpack(f"<{outputs}H", scales)]
    whole = struct.unpack(f"<{outputs * inputs}b", codes)
    return [
        [code * factors[row] for code in whole[row * inputs : (row + 1) * inputs]]
        for row in range(outputs)
    ]
