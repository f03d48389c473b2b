"""Weights to 4-bit codes, each making good the errors of those before it.

Inputs are rounded in their order, every row (output) by itself. What a weight is rounded to is the
code nearest its target (:mod:`moepack.second_moments`): itself, and what the errors before it ask
for. Scale and offset of a group are searched for its targets as they are when the group begins,
from those that :mod:`moepack.rounding` finds for its weights, weighed by what is left to count. Of
each row what is kept is whatever loses less by the moments, these codes or those of the search
alone. So by that measure no row is worse than without feedback.

Errors and coefficients are integers, of 25 and 16 bits with their signs, so that their products,
summed over 16,384 inputs at most, are exact in float64 in whatever order, fused or not: a matrix
library may compute them. Everything else is done element by element, or summed in an order that
shapes decide. So the same weights and the same moments give the same codes on every machine.

8 bits are not worth it: what they lose is less than what a change of any one bit does to a model
(``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.rounding import Floats, Grid, Rounded, from_bf16, round_int4
from moepack.second_moments import Doubles, Factor

#: Errors are integers of so many units at the most, where a row's largest is about a quarter of it
#: without feedback: then sums over :data:`MOST_INPUTS` are exact.
_UNITS = 2.0**24

#: Inputs of which sums of products are exact: 15 bits, 24, and these are 53.
MOST_INPUTS = 1 << 14

#: Inputs that are rounded before those behind them are told, in products; and one by one.
_STRIDE = 64
_STEP = 16

#: What divides every group.
_SMALLEST = 32

#: Inputs whose losses are summed at once.
_STRIPE = 256

#: Codes with feedback replace those without if they gain more than the sums' own rounding.
_GAINS = 1 - 1e-6

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Moments(NamedTuple):
    """A factor, unpacked: ``coefficients`` int16 [n / width, width, width]."""

    weights: Doubles
    powers: Doubles
    coefficients: npt.NDArray[np.int16]

    @classmethod
    def of(cls, factor: Factor) -> Moments:
        """Ready for rounding; twice the bytes of the factor."""
        assert factor.width <= MOST_INPUTS, factor.width
        powers = np.ldexp(1.0, factor.exponents.astype(np.int64))
        return cls(factor.weights.astype(np.float64), powers, factor.dense())

    def strides(self, most: int) -> Iterator[tuple[int, int, int]]:
        """First input of a block, and of each stride of it the first and the one behind."""
        width = self.coefficients.shape[1]
        for begin in range(0, len(self.weights), width):
            for first in range(begin, begin + width, most):
                yield begin, first, min(first + most, begin + width)

    def rows(self, begin: int, first: int, last: int) -> Doubles:
        """Coefficients of some inputs of the block that begins there, for those up to them."""
        block = self.coefficients[begin // self.coefficients.shape[1]]
        found: Doubles = block[first - begin : last - begin, : last - begin].astype(np.float64)
        return found

    def loss(self, errors: Doubles) -> Doubles:
        """What errors, [inputs, rows] in units, count for; in units squared, [rows]."""
        total = np.zeros(errors.shape[1])
        for begin, first, last in self.strides(_STRIPE):
            left = self.rows(begin, first, last) @ errors[begin:last]
            left *= self.powers[first:last, None]
            left += errors[first:last]
            total += self.sum(left, first)
        return total

    def sum(self, left: Doubles, first: int) -> Doubles:
        """What is left of errors, of some inputs from the first on; changed."""
        np.square(left, out=left)
        left *= self.weights[first : first + len(left), None]
        found: Doubles = np.add.reduce(left, axis=0)
        return found


class _Rows:
    """Weights [inputs, rows] in units of each row, a power of two, so that nothing is rounded.

    Parameters
    ----------
    largest
        [rows]: errors that are a quarter of what an integer may be, or up to half of that.
    """

    def __init__(self, weights: Floats, largest: Doubles) -> None:
        self._weights = weights
        self._power = np.ldexp(_UNITS / 4, -np.frexp(largest)[1].astype(np.int64))
        self.shape = weights.shape

    def weights(self, first: int, last: int) -> Doubles:
        """Of some inputs."""
        return self.in_units(self._weights[first:last])

    def in_units(self, values: Doubles | Floats) -> Doubles:
        """Numbers of the rows, [..., rows]."""
        found: Doubles = np.multiply(values, self._power, dtype=np.float64)
        return found

    def plain(self, targets: Doubles) -> Floats:
        """Targets as weights are given."""
        found = np.clip(targets / self._power, -_FLOAT32_MAX, _FLOAT32_MAX)
        weights: Floats = found.astype(np.float32)
        return weights


def _as_errors(differences: Doubles) -> Doubles:
    """In whole units, and cut off where a sum might not be exact."""
    np.rint(differences, out=differences)
    np.minimum(differences, _UNITS, out=differences)
    return np.maximum(differences, -_UNITS, out=differences)


class _Codes:
    """What weights are rounded to: scale and offset of a group and row when it begins."""

    def __init__(self, rows: _Rows, moments: Moments, plain: Rounded) -> None:
        assert plain.offset is not None
        self._rows, self._counts = rows, moments.weights
        self._near = Grid(plain.scale, plain.offset)
        self._group = len(plain.codes) // len(plain.scale)
        self.codes = np.empty(plain.codes.shape, np.uint8)
        self.scale = np.empty_like(plain.scale)
        self.offset = np.empty_like(plain.offset)
        self._step = self._inverse = self._middle = np.empty(0)

    def begin(self, first: int, targets: Doubles) -> None:
        """The inputs from this one on are reached; their targets [inputs, rows], as of now."""
        number, within = divmod(first, self._group)
        if within:
            return
        targets = targets[: self._group]
        counts = self._counts[first : first + self._group]
        counts = np.broadcast_to((counts / counts.mean())[:, None], targets.shape)
        near = Grid(self._near.scale[number], self._near.offset[number])
        found = round_int4(self._rows.plain(targets), counts.astype(np.float32), near)
        assert found.offset is not None
        self.scale[number], self.offset[number] = found.scale, found.offset
        self._step = self._rows.in_units(from_bf16(found.scale))
        self._middle = self._rows.in_units(from_bf16(found.offset))
        self._inverse = _inverse(self._step)

    def nearest(self, number: int, targets: Doubles) -> Doubles:
        """Keep the codes of an input for targets [rows]; the values they stand for."""
        found = targets - self._middle
        found *= self._inverse
        np.rint(found, out=found)
        np.minimum(found, 7, out=found)
        np.maximum(found, -8, out=found)
        self.codes[number] = found + 8
        found *= self._step
        found += self._middle
        return found


def _inverse(step: Doubles) -> Doubles:
    return np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)


def _hand_on(rows: _Rows, moments: Moments, codes: _Codes) -> Doubles:
    """Round every input; what is lost, in units squared, [rows]."""
    errors = np.zeros(rows.shape)
    total = np.zeros(rows.shape[1])
    for begin, first, last in moments.strides(_STRIDE):
        of_rows = moments.rows(begin, first, last)
        # What is asked of these inputs so far, before the powers of two of their rows.
        asked = of_rows[:, : first - begin] @ errors[begin:first]
        inside = of_rows[:, first - begin :]
        powers = moments.powers[first:last, None]
        weights = rows.weights(first, last)
        left = np.empty_like(asked)
        for start in range(0, last - first, _STEP):
            end = min(start + _STEP, last - first)
            if (first + start) % _SMALLEST == 0:
                codes.begin(first + start, asked[start:] * powers[start:] + weights[start:])
            for place in range(start, end):
                target = asked[place] * powers[place]
                target += weights[place]
                values = codes.nearest(first + place, target)
                np.subtract(target, values, out=left[place])
                np.subtract(weights[place], values, out=values)
                errors[first + place] = _as_errors(values)
                asked[place + 1 : end] += inside[place + 1 : end, place, None] * values
            asked[end:] += inside[end:, start:end] @ errors[first + start : first + end]
        total += moments.sum(left, first)
        # A row whose errors were cut off was told less than there is to make good.
        total[(np.abs(errors[first:last]) >= _UNITS).any(axis=0)] = np.inf
    return total


def feed_int4(weights: Floats, plain: Rounded, moments: Moments) -> Rounded:
    """Round rows of weights to 4 bits, or leave them as they are.

    Memory: two arrays in float64 of the size of ``weights`` beside it and the result.

    Parameters
    ----------
    weights
        [inputs, rows]; finite.
    plain
        What the search makes of them: codes [inputs, rows], scale and offset [groups, rows].

    Returns
    -------
    Rounded
        The same shapes.
    """
    assert plain.offset is not None
    errors = np.empty(weights.shape)
    group = len(weights) // len(plain.scale)
    for number, (scale, offset) in enumerate(zip(plain.scale, plain.offset, strict=True)):
        inputs = slice(number * group, (number + 1) * group)
        values = (plain.codes[inputs].astype(np.float64) - 8) * from_bf16(scale)
        values += from_bf16(offset)
        np.subtract(weights[inputs], values, out=errors[inputs])
    rows = _Rows(weights, np.maximum(errors.max(axis=0), -errors.min(axis=0)))
    errors = rows.in_units(errors)
    least = moments.loss(_as_errors(errors))
    del errors
    codes = _Codes(rows, moments, plain)
    kept = ~(_hand_on(rows, moments, codes) < least * _GAINS)
    found = Rounded(codes.codes, codes.scale, codes.offset)
    for ours, before in zip(found, plain, strict=True):
        assert ours is not None
        assert before is not None
        np.copyto(ours, before, where=kept)
    return found
