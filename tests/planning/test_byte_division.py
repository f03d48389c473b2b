"""Dividing bytes: against brute force, and within the bound where there are too many for that."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack import byte_division
from moepack.byte_division import Frontier, divide


def frontier(options: list[tuple[int, float]]) -> Frontier:
    """One layer of (bytes, seconds), of which some may undercut others; one has 0 bytes."""
    kept: list[tuple[int, float]] = []
    for size, seconds in sorted(options):
        if not kept or seconds < kept[-1][1]:
            kept.append((size, seconds))
    sizes, times = (list(values) for values in zip(*kept, strict=True))
    places = np.arange(len(kept))
    return Frontier(np.array(sizes, dtype=np.int64), np.array(times), places, places)


def drawn(rng: np.random.Generator, layers: int, options: int, step: int) -> list[Frontier]:
    """Layers with falling gains, a few of them out of turn, in slots of their own size."""
    found = []
    for _ in range(layers):
        slot = step * int(rng.integers(1, 8))
        falls = np.sort(rng.random(options))[::-1] ** 2 * rng.uniform(0.5, 1.5, options) * slot
        times = falls.sum() - np.cumsum([0.0, *falls])
        pairs = zip(range(0, slot * (options + 1), slot), times.tolist(), strict=True)
        found.append(frontier(list(pairs)))
    return found


def taken(layers: list[Frontier], places: np.typing.ArrayLike) -> tuple[int, float]:
    """Bytes and seconds of a division."""
    pairs = list(zip(layers, np.asarray(places).tolist(), strict=True))
    used = sum(int(each.bytes[place]) for each, place in pairs)
    return used, sum(float(each.seconds[place]) for each, place in pairs)


def best_s(layers: list[Frontier], budget_bytes: int) -> float:
    """Of every division that there is."""
    every = itertools.product(*(range(len(each.bytes)) for each in layers))
    found = (taken(layers, places) for places in every)
    return min(seconds for used, seconds in found if used <= budget_bytes)


seconds = st.sampled_from([0.0, 1.0, 2.0, 5.0, 5.5]) | st.floats(0.0, 10.0)
options = st.lists(st.tuples(st.integers(0, 12), seconds), max_size=6)
layers_of = st.lists(st.builds(lambda some: frontier([(0, 10.0), *some]), options), min_size=1)


@given(layers=layers_of.filter(lambda layers: len(layers) <= 4), budget_bytes=st.integers(0, 50))
@settings(max_examples=300)
def test_no_division_at_all_is_better(layers: list[Frontier], budget_bytes: int) -> None:
    found = divide(layers, budget_bytes)
    used, total_s = taken(layers, found.places)
    assert used <= budget_bytes
    assert total_s == pytest.approx(best_s(layers, budget_bytes), abs=1e-9)
    assert found.bound_s <= total_s + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_no_division_of_slots_is_better(seed: int) -> None:
    layers = drawn(np.random.default_rng(seed), 5, 7, 1000)
    full = sum(int(each.bytes[-1]) for each in layers)
    for step in range(0, 21, 3):
        budget_bytes = full * step // 20
        _, total_s = taken(layers, divide(layers, budget_bytes).places)
        assert total_s == pytest.approx(best_s(layers, budget_bytes), rel=1e-12)


@given(layers=layers_of, budget_bytes=st.integers(0, 60))
def test_more_bytes_are_never_dearer(layers: list[Frontier], budget_bytes: int) -> None:
    less, more = (
        taken(layers, divide(layers, size).places)[1] for size in (budget_bytes, budget_bytes + 1)
    )
    assert more <= less + 1e-9


def test_many_layers_are_divided_within_a_part_in_two_thousand_of_the_bound() -> None:
    layers = drawn(np.random.default_rng(1), 94, 128, 4096)
    full = sum(int(each.bytes[-1]) for each in layers)
    for share in (0.01, 0.1, 0.3, 0.6, 0.9):
        found = divide(layers, int(full * share))
        used, total_s = taken(layers, found.places)
        assert used <= full * share
        assert found.bound_s <= total_s <= found.bound_s * 1.0005


def test_a_search_that_is_cut_short_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = drawn(np.random.default_rng(2), 40, 60, 1)
    full = sum(int(each.bytes[-1]) for each in layers)
    whole = [divide(layers, full * step // 10) for step in range(11)]
    monkeypatch.setattr(byte_division, "MOST_OPTIONS", 3)
    monkeypatch.setattr(byte_division, "MOST_PARTIAL", 8)
    for step, found in enumerate(whole):
        short = divide(layers, full * step // 10)
        (used, short_s), (_, best) = taken(layers, short.places), taken(layers, found.places)
        assert used <= full * step // 10
        assert best - 1e-9 <= short_s <= best * 1.002 + 1e-9


def test_layers_that_are_alike_and_everything_fitting() -> None:
    one = frontier([(size, 1.0 / (1 + size)) for size in range(9)])
    assert divide([one] * 5, 100).places.tolist() == [8] * 5
    assert sorted(divide([one] * 4, 10).places.tolist()) == [2, 2, 3, 3]
    assert divide([one] * 4, 0).places.tolist() == [0] * 4
