"""Weights to codes: which scale (and offset) loses least, found by alternating least squares.

For given codes the best scale and offset are a linear regression; for a given scale and offset the
best code is the nearest. Taking turns ends in a local minimum that depends on the start, so several
starts are tried, and for each group of weights the best is kept:

INT4, value = (code - 8) * scale + offset, for each group of inputs of a row
    1. from the range of the group, two turns;
    2. from there 15 starts: the scale times 0.82 to 1 (the range clipped), the grid shifted by a
       quarter and half a step; of each, what regression makes of its codes is compared;
    3. the best of them, rounded to BF16; its regression, rounded to BF16; two grids without an
       offset, the largest weight at code 0 or 15; and naive min/max: compared by their true errors.
INT8, value = code * scale, for each row
    The range, what regression makes of it, and the range times 0.98 to 0.8, likewise.

What is compared in the end is the error of what is stored, with scale and offset in BF16, so no
group is worse than under naive rounding, from min/max or symmetric. On Gaussian weights the squared
error is 0.79 (groups of 32) and 0.82 (of 64) of that of min/max; 64 starts reach 0.77 and 0.81 in
three times as long.

Every sum adds in an order that the shapes alone decide, and nothing is fused: the same weights give
the same codes on every machine.

Source: derived; the alternation is Lloyd's (IEEE Trans. Inf. Theory 28, 1982) with the levels held
on a grid, and several starts are llama.cpp's ``make_qkx2_quants`` in spirit.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

#: Which search this is: another one, which gives other codes, has another number.
ROUNDING = 1

#: Likewise with a calibration, by which errors are made good, too (:mod:`moepack.feedback`).
CALIBRATED_ROUNDING = 2

#: Starts of the search around the first fit: factors on the scale, and shifts in steps.
_FACTORS = (0.82, 0.88, 0.94, 1.0)
_SHIFTS = (-0.5, -0.25, 0.0, 0.25)

#: Factors on the range of a row of INT8.
_RANGES = (0.98, 0.96, 0.94, 0.9, 0.85, 0.8)

#: A candidate replaces what is there if it gains more than the errors' own rounding.
_GAINS = np.float32(1 - 1e-5)

#: The largest finite BF16.
_BF16_MAX = np.float32(3.3895314e38)

#: Sums over a long row are taken over so many columns in float32, then in float64.
_FOLD = 64


class Rounded(NamedTuple):
    """Groups of weights as codes, with the bits of their scales and offsets in BF16.

    INT4: ``codes`` uint8 [inputs of a group, groups], 0 to 15; ``scale``, ``offset`` uint16
    [groups]. INT8: ``codes`` int8 [rows, inputs]; ``scale`` uint16 [rows]; no offset.
    """

    codes: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    scale: npt.NDArray[np.uint16]
    offset: npt.NDArray[np.uint16] | None


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest BF16, ties to even. Finite values."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> Floats:
    """The values, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _near_bf16(values: Floats) -> Floats:
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).view(np.float32)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for a group without a range."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


class _Scaled(NamedTuple):
    """Weights times a power of two for each group, so that squares stay in the range of floats."""

    weights: Floats
    exponents: npt.NDArray[np.int32]

    def back(self, values: Floats) -> npt.NDArray[np.uint16]:
        """Bits of a scale or an offset, for weights as they were."""
        with np.errstate(over="ignore"):
            return to_bf16(np.clip(np.ldexp(values, self.exponents), -_BF16_MAX, _BF16_MAX))

    def there(self, bits: npt.NDArray[np.uint16]) -> Floats:
        """A scale or an offset of weights as they were, for these."""
        with np.errstate(over="ignore"):
            return np.clip(np.ldexp(from_bf16(bits), -self.exponents), -_BF16_MAX, _BF16_MAX)


def _scaled(weights: Floats, axis: int) -> _Scaled:
    largest = np.maximum(weights.max(axis=axis), -weights.min(axis=axis))
    exponents = np.clip(np.frexp(largest)[1], -100, 128)
    return _Scaled(weights * np.expand_dims(np.ldexp(np.float32(1), -exponents), axis), exponents)


class _Int4Search:
    """The best grid found so far for every group of a block of weights."""

    def __init__(self, weights: Floats, importance: Floats | None) -> None:
        self._weights = weights  # [inputs of a group, groups]
        self._importance = importance  # the same, of mean 1
        low, high = weights.min(axis=0), weights.max(axis=0)
        self._extreme = np.where(-low > high, low, high)
        scale = _near_bf16((high - low) / 15)
        self.naive = scale, _near_bf16(low + 8 * scale)
        self.mean = self._sum(weights) / np.float32(len(weights))
        self._centred = weights - self.mean
        self._weighted = self._centred if importance is None else self._centred * importance
        self._codes = np.empty_like(weights)
        self._work = np.empty_like(weights)
        self._gain = np.zeros_like(low)
        self.scale = scale.copy()
        self.centre = self.naive[1] - self.mean  # the offset, of centred weights

    def _sum(self, values: Floats) -> Floats:
        """Over the inputs of each group, weighted."""
        if self._importance is not None:
            values = values * self._importance
        total: Floats = np.add.reduce(values, axis=0)
        return total

    def round(self, weights: Floats, scale: Floats, offset: Floats) -> Floats:
        """The nearest codes, less 8."""
        inverse = _inverse(scale)
        np.multiply(weights, inverse, out=self._codes)
        self._codes -= offset * inverse
        np.rint(self._codes, out=self._codes)
        return np.clip(self._codes, -8, 7, out=self._codes)

    def attempt(self, scale: Floats, centre: Floats) -> None:
        """Keep what regression makes of these codes where it explains more than the best so far.

        Weights are centred, so the slope is cov / var and explains cov^2 / var of their squares.
        """
        codes = self.round(self._centred, scale, centre)
        size = np.float32(len(codes))
        if self._importance is None:
            total = np.add.reduce(codes, axis=0)
            squares = np.add.reduce(np.square(codes, out=self._work), axis=0)
        else:
            total = np.add.reduce(np.multiply(codes, self._importance, out=self._work), axis=0)
            self._work *= codes
            squares = np.add.reduce(self._work, axis=0)
        codes *= self._weighted
        covariance = np.add.reduce(codes, axis=0)
        mean = total / size
        variance = np.maximum(squares - total * mean, np.float32(1e-6))
        slope = covariance / variance
        gain = slope * covariance
        better = gain > self._gain
        np.copyto(self._gain, gain, where=better)
        np.copyto(self.scale, slope, where=better)
        np.copyto(self.centre, -slope * mean, where=better)

    def look_around(self) -> None:
        """From the range of each group: two turns, and 15 starts from there."""
        for _ in range(2):
            self.attempt(self.scale.copy(), self.centre.copy())
        step, centre = self.scale.copy(), self.centre.copy()
        for factor, shift in itertools.product(_FACTORS, _SHIFTS):
            # The middle of the grid, code 7.5, stays where it is but for the shift.
            scale = step * np.float32(factor)
            self.attempt(scale, centre + (scale - step) / 2 + scale * np.float32(shift))

    def best(self) -> tuple[Floats, Floats]:
        """Scale and offset, in BF16, for weights as they were."""
        scale = _near_bf16(self.scale)
        return scale, _near_bf16(self.centre + self.mean)

    def symmetric(self, code: int) -> tuple[Floats, Floats]:
        """No offset, and the weight that is farthest from zero at this code."""
        scale = _near_bf16(self._extreme / np.float32(code))
        return scale, np.zeros_like(scale)

    def error(self, scale: Floats, offset: Floats) -> Floats:
        """Squared error of each group as it would be stored."""
        values = self.round(self._weights, scale, offset)
        values *= scale
        values += offset
        values -= self._weights
        values *= values
        return self._sum(values)


class Grid(NamedTuple):
    """Scale and offset of some groups, bits of BF16: uint16 [groups]."""

    scale: npt.NDArray[np.uint16]
    offset: npt.NDArray[np.uint16]


def round_int4(
    weights: Floats, importance: Floats | None = None, near: Grid | None = None
) -> Rounded:
    """Round groups of weights to 4 bits.

    Memory: 4 arrays of the size of ``weights`` (6 with ``importance``) beside it and the result.

    Parameters
    ----------
    weights
        [inputs of a group, groups]; finite. Groups are last, for long runs of equal work.
    importance
        The same shape: what a squared error counts for each input, of mean 1 in every group.
    near
        A grid that suits weights much like these: one more start, in place of the 15.
    """
    scaled = _scaled(weights, axis=0)
    search = _Int4Search(scaled.weights, importance)
    if near is None:
        search.look_around()
    else:
        scale, offset = (scaled.there(bits) for bits in near)
        search.attempt(scale, offset - search.mean)
        search.attempt(search.scale.copy(), search.centre.copy())
    first = search.best()
    search.attempt(first[0], first[1] - search.mean)
    scale, offset = search.naive
    least = search.error(scale, offset)
    candidates = [first, search.best()]
    if near is None:
        candidates += [search.symmetric(-8), search.symmetric(7)]
    for candidate in candidates:
        error = search.error(*candidate)
        better = error < least * _GAINS
        np.copyto(least, error, where=better)
        np.copyto(scale, candidate[0], where=better)
        np.copyto(offset, candidate[1], where=better)
    codes = search.round(scaled.weights, scale, offset)
    codes += 8
    return Rounded(codes.astype(np.uint8), scaled.back(scale), scaled.back(offset))


class _Int8Search:
    """The best scale found so far for every row of a block of weights."""

    def __init__(self, weights: Floats, importance: Floats | None) -> None:
        self._weights = weights  # [rows, inputs]
        self._importance = importance  # [inputs]
        self._codes = np.empty_like(weights)
        low, high = weights.min(axis=1), weights.max(axis=1)
        self.range = np.maximum(high, -low) + np.float32(0)  # no scale is -0
        # Codes go to -128 on one side only: there goes the larger end.
        self.one_sided = np.where(-low > high, low, high) / -128
        self.scale = _near_bf16(self.range / 127)
        self._least = self._error(self.scale)

    def round(self, scale: Floats) -> Floats:
        """The nearest codes."""
        np.multiply(self._weights, _inverse(scale)[:, None], out=self._codes)
        np.rint(self._codes, out=self._codes)
        return np.clip(self._codes, -128, 127, out=self._codes)

    def attempt(self, scale: Floats) -> None:
        """Keep this scale, in BF16, where it loses less than the best so far."""
        scale = _near_bf16(scale)
        error = self._error(scale)
        better = error < self._least * _GAINS
        np.copyto(self._least, error, where=better)
        np.copyto(self.scale, scale, where=better)

    def regression(self) -> Floats:
        """The scale that suits the codes of the best one best."""
        codes = self.round(self.scale)
        squares = self._sum(np.square(codes))
        products = self._sum(codes * self._weights)
        slope = np.divide(products, squares, out=np.zeros_like(products), where=squares != 0)
        return slope.astype(np.float32)

    def _error(self, scale: Floats) -> npt.NDArray[np.float64]:
        values = self.round(scale)
        values *= scale[:, None]
        values -= self._weights
        values *= values
        return self._sum(values)

    def _sum(self, values: Floats) -> npt.NDArray[np.float64]:
        """Over each row, weighted; ``values`` may change."""
        if self._importance is not None:
            values *= self._importance
        rows, inputs = values.shape
        folded = values.reshape(rows, -1, math.gcd(inputs, _FOLD))
        partial = np.add.reduce(folded, axis=1).T.astype(np.float64)
        total: npt.NDArray[np.float64] = np.add.reduce(partial, axis=0)
        return total


def round_int8(weights: Floats, importance: Floats | None = None) -> Rounded:
    """Round rows of weights to 8 bits.

    Memory: 3 arrays of the size of ``weights`` beside it and the result.

    Parameters
    ----------
    weights
        [rows, inputs]; finite.
    importance
        [inputs]: what a squared error counts for each input, of mean 1.
    """
    scaled = _scaled(weights, axis=1)
    search = _Int8Search(scaled.weights, importance)
    search.attempt(search.one_sided)
    for factor in _RANGES:
        search.attempt(search.range * np.float32(factor / 127))
    search.attempt(search.regression())
    codes = search.round(search.scale)
    return Rounded(codes.astype(np.int8), scaled.back(search.scale), None)
