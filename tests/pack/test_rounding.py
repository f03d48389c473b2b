"""Rounding to 4 and 8 bits, against naive rounding written as loops over single weights."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.rounding import ROUNDING, Rounded, from_bf16, round_int4, round_int8, to_bf16
from tests.pack import plain_rounding as plain

Floats = npt.NDArray[np.float32]

#: How groups of weights may look: a drawer of values, by name.
KINDS = ("normal", "heavy", "shifted", "few values", "constant", "zero", "spike", "bf16", "tiny")


def weights_of(kind: str, shape: tuple[int, ...], seed: int) -> Floats:
    random = np.random.default_rng(seed)
    normal = random.standard_normal(shape)
    match kind:
        case "heavy":
            values = normal / random.uniform(0.05, 1, shape)
        case "shifted":
            values = normal * 0.1 + 37
        case "few values":
            values = random.integers(-2, 3, shape) / 4
        case "constant":
            values = np.full(shape, random.standard_normal())
        case "zero":
            values = np.zeros(shape)
        case "spike":
            values = np.where(random.random(shape) < 0.03, 50 * normal, normal * 1e-3)
        case "bf16":
            return from_bf16(to_bf16((normal * 0.02).astype(np.float32)))
        case "tiny":
            values = normal * 1e-20
        case _:
            values = normal * 0.02
    return values.astype(np.float32)


def int4_values(rounded: Rounded) -> npt.NDArray[np.float64]:
    assert rounded.offset is not None
    scale = from_bf16(rounded.scale).astype(np.float64)
    return (rounded.codes.astype(np.float64) - 8) * scale + from_bf16(rounded.offset)


def check_not_worse(
    weights: Floats, counts: Floats, found: npt.NDArray[np.float64], *naive: list[float]
) -> None:
    """No group loses more than under any naive rounding, but for the last bits of the sums."""
    exact = [float(weight) for weight in weights]
    ratios = [float(count) for count in counts]
    ours = plain.loss(exact, ratios, [float(value) for value in found])
    size = plain.loss(exact, ratios, [0.0] * len(exact))
    for values in naive:
        assert ours <= plain.loss(exact, ratios, values) + 1e-12 * size


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from([32, 64]), st.integers(0, 99), st.booleans())
def test_no_group_of_int4_is_worse_than_naive(
    kind: str, group: int, seed: int, weighted: bool
) -> None:
    weights = weights_of(kind, (group, 3), seed)
    counts = np.ones_like(weights)
    if weighted:
        counts = np.random.default_rng(seed).exponential(1, weights.shape).astype(np.float32)
        counts /= counts.mean(axis=0)
    rounded = round_int4(weights, counts if weighted else None)
    assert rounded.codes.max() <= 15
    for column, found in enumerate(int4_values(rounded).T):
        one = weights[:, column]
        exact = [float(weight) for weight in one]
        naive = plain.naive_int4(exact), plain.naive_symmetric_int4(exact)
        check_not_worse(one, counts[:, column], found, *naive)


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from([4, 96, 192]), st.integers(0, 99), st.booleans())
def test_no_row_of_int8_is_worse_than_naive(
    kind: str, inputs: int, seed: int, weighted: bool
) -> None:
    weights = weights_of(kind, (3, inputs), seed)
    counts = np.ones(inputs, np.float32)
    if weighted:
        counts = np.random.default_rng(seed).exponential(1, inputs).astype(np.float32)
        counts /= counts.mean()
    rounded = round_int8(weights, counts if weighted else None)
    values = rounded.codes * from_bf16(rounded.scale).astype(np.float64)[:, None]
    for row, found in zip(weights, values, strict=True):
        naive = plain.naive_int8([float(weight) for weight in row])
        check_not_worse(row, counts, found, naive)


@pytest.mark.parametrize(("group", "least", "most"), [(32, 0.77, 0.81), (64, 0.80, 0.84)])
def test_on_gaussian_weights_int4_loses_a_fifth_less_than_min_max(
    group: int, least: float, most: float
) -> None:
    """What the module says; 0.77 and 0.81 are what many more starts reach."""
    weights = weights_of("bf16", (group, 400), 1)
    ours = np.square(weights - int4_values(round_int4(weights))).sum()
    naive = sum(
        plain.loss(list(map(float, one)), [1.0] * group, plain.naive_int4(list(map(float, one))))
        for one in weights.T
    )
    assert least < ours / naive < most


def test_a_group_that_is_symmetric_already_comes_back_exactly() -> None:
    """As GPTQ and the like leave it: multiples of a scale, and no offset."""
    codes = np.random.default_rng(3).integers(-7, 8, (32, 50))
    codes[0] = -8
    weights = (codes * 0.375).astype(np.float32)
    np.testing.assert_array_equal(int4_values(round_int4(weights)), weights)


def test_weights_that_count_more_are_hit_better() -> None:
    weights = weights_of("normal", (32, 200), 5)
    counts = np.where(np.arange(32)[:, None] < 4, 7.0, 1 / 7).astype(np.float32)
    counts = np.broadcast_to(counts, weights.shape)
    alike, weighted = (
        np.square(weights - int4_values(round_int4(weights, given)))[:4].sum()
        for given in (None, counts)
    )
    assert weighted < 0.5 * alike


@given(st.integers(0, 50), st.floats(-90, 90))
def test_powers_of_two_change_nothing_but_the_exponents(seed: int, power: float) -> None:
    """So nothing over- or underflows on the way."""
    weights = weights_of("bf16", (32, 5), seed)
    factor = np.float32(2.0 ** round(power))
    once, scaled = round_int4(weights), round_int4(weights * factor)
    np.testing.assert_array_equal(once.codes, scaled.codes)
    np.testing.assert_array_equal(from_bf16(once.scale) * factor, from_bf16(scaled.scale))


def test_codes_change_only_with_the_number_of_the_search() -> None:
    """Packs link layers of the same number: another search must have another."""
    weights = np.zeros((32, 64), np.float32)
    for factor in (2654435761, 2246822519, 3266489917):  # sums of three: nearly a bell curve
        parts = np.arange(1, weights.size + 1, dtype=np.uint64) * np.uint64(factor) >> np.uint64(9)
        weights += (parts % np.uint64(65536)).astype(np.float32).reshape(weights.shape) - 32767.5
    rounded = round_int4(weights), round_int8(weights.T.copy())
    found = [
        zlib.crc32(item.codes.tobytes()) ^ zlib.crc32(item.scale.tobytes()) for item in rounded
    ]
    assert {ROUNDING: found} == {1: [3867533002, 482032076]}


def test_the_largest_floats_stay_finite() -> None:
    largest = np.finfo(np.float32).max
    weights = np.where(np.random.default_rng(0).random((32, 9)) < 0.5, largest, -largest)
    for values in (int4_values(round_int4(weights)), int4_values(round_int4(np.abs(weights)))):
        assert np.isfinite(values).all()
    rounded = round_int8(weights.T.copy())
    assert np.isfinite(from_bf16(rounded.scale)).all()


@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127
    )
)
def test_bf16_is_the_nearest_ties_to_even(value: float) -> None:
    found = from_bf16(to_bf16(np.array([value], np.float32)))
    assert float(found[0]) == plain.bf16(value)
