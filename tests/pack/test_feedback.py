"""Errors made good: against GPTQ as its paper has it, loops over integers, and all codes."""

from __future__ import annotations

import hashlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.encodings import encoding
from moepack.feedback import Moments, feed_int4
from moepack.quantise import Importance, dequantise_expert, quantise_expert
from moepack.rounding import Rounded, from_bf16, round_int4, to_bf16
from moepack.second_moments import Factor, factorised
from tests.pack.test_quantise import expert_of
from tests.pack.test_rounding import KINDS, weights_of

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


def inputs_of(tokens: int, size: int, seed: int) -> Doubles:
    """Inputs that have something in common, some of them larger than others."""
    random = np.random.default_rng(seed)
    causes = random.standard_normal((tokens, max(1, size // 4)))
    mixed = causes @ random.standard_normal((causes.shape[1], size)) / math.sqrt(causes.shape[1])
    alone = random.standard_normal((tokens, size)) / 2
    found: Doubles = (mixed + alone) * random.uniform(0.3, 3, size)
    return found


def factor_of(size: int, seed: int, *, tokens: int = 400, width: int | None = None) -> Factor:
    inputs = inputs_of(tokens, size, seed)
    width = width or size
    blocks = [
        inputs[:, first : first + width].T @ inputs[:, first : first + width]
        for first in range(0, size, width)
    ]
    return factorised(np.stack(blocks) / tokens, tokens)


def exactly_made(size: int, seed: int, width: int) -> Factor:
    """A factor in which no library had a part: the same on every machine."""
    random = np.random.default_rng(seed)
    shape = (size // width, width * (width - 1) // 2)
    return Factor(
        (random.integers(1, 64, size) / 16).astype(np.float32),
        random.integers(-21, -17, size).astype(np.int8),
        random.integers(-32767, 32768, shape).astype(np.int16),
    )


def second_moments(factor: Factor) -> Doubles:
    """H = M^T D M, of what is stored."""
    size, width = len(factor.weights), factor.width
    lower = np.eye(size)
    for number, entries in enumerate(factor.coefficients):
        places = iter(entries.tolist())
        for row in range(width):
            for column in range(row):
                i, k = number * width + row, number * width + column
                lower[i, k] = next(places) * 2.0 ** int(factor.exponents[i])
    found: Doubles = lower.T @ np.diag(factor.weights.astype(np.float64)) @ lower
    return found


def lost(weights: npt.NDArray[np.floating], values: Doubles, moments: Doubles) -> Doubles:
    """e^T H e of each row; weights and values [inputs, rows]."""
    errors = weights.astype(np.float64) - values
    found: Doubles = (errors * (moments @ errors)).sum(axis=0)
    return found


def searched(weights: Floats, group: int) -> Rounded:
    inputs, rows = weights.shape
    groups = weights.reshape(-1, group, rows).swapaxes(0, 1).reshape(group, -1)
    found = round_int4(np.ascontiguousarray(groups))
    assert found.offset is not None
    codes = found.codes.reshape(group, -1, rows).swapaxes(0, 1).reshape(inputs, rows)
    return Rounded(codes, found.scale.reshape(-1, rows), found.offset.reshape(-1, rows))


def values_of(found: Rounded) -> Doubles:
    assert found.offset is not None
    group = len(found.codes) // len(found.scale)
    scale, offset = (
        np.repeat(from_bf16(bits).astype(np.float64), group, axis=0)
        for bits in (found.scale, found.offset)
    )
    values: Doubles = (found.codes.astype(np.float64) - 8) * scale + offset
    return values


def grids(found: Rounded, row: int) -> list[tuple[float, float]]:
    """Scale and offset of every input of a row."""
    assert found.offset is not None
    group = len(found.codes) // len(found.scale)
    pairs = zip(from_bf16(found.scale[:, row]), from_bf16(found.offset[:, row]), strict=True)
    return [(float(scale), float(offset)) for scale, offset in pairs for _ in range(group)]


def nearest(weight: float, scale: float, offset: float) -> int:
    return min(max(round((weight - offset) / scale), -8), 7)


def gptq(row: Floats, grid: list[tuple[float, float]], moments: Doubles) -> list[int]:
    """Algorithm 1 of arXiv 2210.17323, for one row: the inverse's factor, as it stands there."""
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    left = row.astype(np.float64).copy()
    codes = []
    for column, (scale, offset) in enumerate(grid):
        codes.append(nearest(left[column], scale, offset))
        error = (left[column] - codes[-1] * scale - offset) / upper[column, column]
        left[column:] -= error * upper[column, column:]
    return [code + 8 for code in codes]


@pytest.mark.parametrize("group", [32, 64])
def test_codes_are_those_of_gptq(group: int) -> None:
    weights = weights_of("normal", (192, 20), 4)
    factor = factor_of(192, 7)
    plain = searched(weights, group)
    found = feed_int4(weights, plain, Moments.of(factor))
    moments = second_moments(factor)
    assert (found.codes != plain.codes).any(axis=0).all()
    differ = 0
    for row in range(20):
        codes = gptq(weights[:, row], grids(found, row), moments)
        differ += int((found.codes[:, row] != codes).sum())
    assert differ <= 2, "but where two codes are as near"


@pytest.mark.parametrize(("size", "group"), [(96, 32), (192, 64), (128, 64)])
def test_what_int4_loses_is_a_good_deal_less(size: int, group: int) -> None:
    weights = weights_of("normal", (size, 64), 1)
    factor = factor_of(size, 3)
    moments = second_moments(factor)
    plain = searched(weights, group)
    found = feed_int4(weights, plain, Moments.of(factor))
    before = lost(weights, values_of(plain), moments).sum()
    assert lost(weights, values_of(found), moments).sum() < 0.7 * before


def by_integers(
    row: list[float], unit: float, found: Rounded, number: int, factor: Factor
) -> list[int]:
    """What the module says of a row, in Python's integers and floats."""
    width = factor.width
    codes: list[int] = []
    errors: list[int] = []
    places = [iter(entries.tolist()) for entries in factor.coefficients]
    for i, (weight, (scale, offset)) in enumerate(zip(row, grids(found, number), strict=True)):
        begin = i - i % width
        asked = sum(next(places[i // width]) * errors[k] for k in range(begin, i))
        target = weight / unit + float(asked) * 2.0 ** int(factor.exponents[i])
        code = round((target - offset / unit) * (1 / (scale / unit)))
        codes.append(min(max(code, -8), 7) + 8)
        errors.append(round(weight / unit - ((codes[-1] - 8) * (scale / unit) + offset / unit)))
    return codes


@pytest.mark.parametrize("width", [64, 192])
def test_codes_are_what_integers_make_them(width: int) -> None:
    """To the bit: sums are exact, so no order and no library can change them."""
    weights = weights_of("bf16", (192, 12), 2)
    factor = exactly_made(192, 5, width)
    plain = searched(weights, 32)
    found = feed_int4(weights, plain, Moments.of(factor))
    largest = np.abs(weights - values_of(plain)).max(axis=0)
    fed = 0
    for row in range(12):
        if (found.codes[:, row] == plain.codes[:, row]).all():
            continue
        fed += 1
        unit = 2.0 ** (int(np.frexp(largest[row])[1]) - 22)
        made = by_integers(weights[:, row].tolist(), unit, found, row, factor)
        assert found.codes[:, row].tolist() == made
    assert fed > 6


def test_codes_are_the_same_on_every_machine() -> None:
    """What was found on one: of weights and moments in which no library had a part."""
    weights = weights_of("bf16", (256, 40), 9)
    digest = hashlib.sha256()
    for width in (64, 256):
        moments = Moments.of(exactly_made(256, 6, width))
        for group in (32, 64):
            for array in feed_int4(weights, searched(weights, group), moments):
                assert array is not None
                digest.update(array.tobytes())
    assert digest.hexdigest() == "db884224ca604e8fe4b4b0426fc707f1937014d5398c5c5f2d8fc422365aecf1"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([32, 96, 192]), st.integers(0, 99), st.booleans())
def test_no_row_is_worse_than_without(kind: str, size: int, seed: int, blocks: bool) -> None:
    weights = weights_of(kind, (size, 6), seed)
    factor = factor_of(size, seed, width=32 if blocks else None)
    moments, second = Moments.of(factor), second_moments(factor)
    whole = lost(weights, np.zeros(weights.shape), second)
    plain = searched(weights, 32)
    found = feed_int4(weights, plain, moments)
    before, after = (lost(weights, values_of(each), second) for each in (plain, found))
    assert (after <= before * (1 + 1e-6) + 1e-12 * whole).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_codes_is_seldom_missed(seed: int) -> None:
    """Of three codes around each of the last four weights, whose grid and errors are as found.

    Those before them are what they are: nobody knows what will be asked of them.
    """
    weights = weights_of("normal", (32, 40), seed)
    factor = factor_of(32, seed)
    second = second_moments(factor)
    found = feed_int4(weights, searched(weights, 32), Moments.of(factor))
    ours = lost(weights, values_of(found), second)
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=4))).T
    missed = []
    for row in range(40):
        scale, offset = grids(found, row)[0]
        codes = np.repeat(found.codes[:, [row]].astype(np.float64), 81, axis=1)
        codes[-4:] = np.clip(codes[-4:] + steps, 0, 15)
        values = (codes - 8) * scale + offset
        best = lost(np.repeat(weights[:, [row]], 81, axis=1), values, second).min()
        assert best <= ours[row] * (1 + 1e-9)
        missed.append(ours[row] / best)
    assert np.median(missed) < 1.05


def test_without_anything_in_common_errors_are_left_as_they_are() -> None:
    weights = weights_of("normal", (64, 30), 1)
    plain = searched(weights, 32)
    found = feed_int4(weights, plain, Moments.of(factorised(np.eye(64)[None], 1 << 20)))
    before, after = (np.square(weights - values_of(each)).sum(axis=0) for each in (plain, found))
    assert (after <= before).all()
    assert (after > 0.98 * before).all()


@pytest.mark.parametrize("name", ["INT4_G32", "INT4_G64"])
def test_an_expert_is_made_good_matrix_by_matrix_and_threads_change_nothing(name: str) -> None:
    item, expert = encoding(name), expert_of(192, 128)
    factors = factor_of(192, 1), factor_of(128, 2, width=64)
    means = Importance(np.ones(192, np.float32), np.ones(128, np.float32))
    fed = means._replace(of_hidden=Moments.of(factors[0]), of_neurons=Moments.of(factors[1]))
    found = quantise_expert(expert, item, "BF16", "it", importance=fed)
    with ThreadPoolExecutor(3) as pool:
        again = quantise_expert(expert, item, "BF16", "it", importance=fed, pool=pool)
    for tensor, bits in found.items():
        np.testing.assert_array_equal(bits, again[tensor])
    plain = dequantise_expert(quantise_expert(expert, item, "BF16", "it", importance=means), item)
    values = dequantise_expert(found, item)
    for matrix, factor in zip(("gate", "up", "down"), (factors[0], *factors), strict=True):
        weights = from_bf16(expert[f"{matrix}.weight"].view(np.uint16)).T
        second = second_moments(factor)
        before, after = (
            lost(weights, each[f"{matrix}.weight"].T.astype(np.float64), second).sum()
            for each in (plain, values)
        )
        assert after < 0.8 * before


def test_8_bits_are_left_as_they_are() -> None:
    item, expert = encoding("INT8"), expert_of(192, 128)
    means = Importance(np.ones(192, np.float32), np.ones(128, np.float32))
    fed = means._replace(of_hidden=Moments.of(factor_of(192, 1)))
    plain = quantise_expert(expert, item, "BF16", "it", importance=means)
    for tensor, bits in quantise_expert(expert, item, "BF16", "it", importance=fed).items():
        np.testing.assert_array_equal(bits, plain[tensor])


def test_zeros_stay_zeros() -> None:
    weights = np.zeros((64, 3), np.float32)
    found = feed_int4(weights, searched(weights, 32), Moments.of(factor_of(64, 1)))
    assert not values_of(found).any()


def test_moments_of_other_sizes_are_refused() -> None:
    wrong = Moments.of(factor_of(64, 1))
    means = Importance(np.ones(192, np.float32), np.ones(128, np.float32), wrong)
    with pytest.raises(ValueError, match="moments of 64 inputs, expected 192"):
        quantise_expert(expert_of(192, 128), encoding("INT4_G32"), "BF16", "it", importance=means)


def test_weights_as_large_as_there_are_stay_finite() -> None:
    weights = from_bf16(to_bf16(weights_of("normal", (64, 8), 3) * np.float32(1e38) * 30))
    assert np.isfinite(weights).all()
    found = feed_int4(weights, searched(weights, 32), Moments.of(factor_of(64, 2)))
    assert np.isfinite(values_of(found)).all()
