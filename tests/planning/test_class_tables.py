"""What mixed layers' caches hold: all at once, as the engine's own caches do step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.class_tables import ClassTables
from moepack.layout import LayerLayout
from moepack.mixed_residency import layer_cache
from moepack.plan import POLICIES, LayerPlacement, Policy
from moepack.trace import NO_PREDICTION, LayerShape, Trace
from tests.support.caches import half_life_of, half_lives, random_rankings, shapes, traces
from tests.support.mixed import slots_drawn, with_slots

Cuts = Sequence[LayerLayout]

NAMES = ("BF16", "INT8", "INT4_G32")


def cut_of(shape: LayerShape, random: Random) -> LayerLayout:
    """Any encodings; whole experts are tops or bottoms."""
    names = tuple(random.choice(NAMES) for _ in range(shape.num_experts))
    split = random.choice((0, 32))
    first = next(name for name in NAMES if name in names)
    return LayerLayout(shape.layer, split, 32, 32, first, names if len({*names}) > 1 else ())


def placed(
    cut: LayerLayout, hot: tuple[int, ...], policy: Policy, half_life: float, random: Random
) -> LayerPlacement:
    place = LayerPlacement(
        cut.layer, 0, 0, 0, policy, hot, half_life_tokens=half_life_of(policy, half_life)
    )
    return with_slots(cut, place, slots_drawn(cut, random)) if cut.encodings else place


def tables_of(
    trace: Trace, layers: Sequence[LayerShape], hot: Sequence[tuple[int, ...]], cuts: Cuts
) -> ClassTables:
    return ClassTables(trace, layers, hot, cuts, lambda: (5.0,) * len(layers))


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@settings(max_examples=40)
def test_they_hold_what_the_runtimes_caches_hold(policy: Policy, data: st.DataObject) -> None:
    """Classes of any size with any slots, fewer than a token uses as well."""
    layers = data.draw(shapes())
    trace = data.draw(traces(layers))
    random = Random(data.draw(st.integers(0, 2**32 - 1)))
    hot = [tuple(each) for each in random_rankings(layers, np.random.default_rng(1))]
    cuts = [cut_of(shape, random) for shape in layers]
    if not any(cut.encodings for cut in cuts):
        return
    tables = tables_of(trace, layers, hot, cuts)
    for _ in range(2):
        places = [
            placed(cut, ranking, policy, data.draw(half_lives), random)
            for cut, ranking in zip(cuts, hot, strict=True)
        ]
        found = tables.held(places)
        assert [*found] == [row for row, cut in enumerate(cuts) if cut.encodings]
        for row, (activated, predicted) in found.items():
            cache = layer_cache(cuts[row], places[row], "top" if cuts[row].split else "bottom")
            for now, ids in enumerate(trace.ids[:, row, : layers[row].top_k].tolist()):
                assert activated[now, : len(ids)].tolist() == [cache.holds(each) for each in ids]
                assert not activated[now, len(ids) :].any()
                guesses = trace.predicted[now, row].tolist()
                expected = [each != NO_PREDICTION and cache.holds(each) for each in guesses]
                assert predicted[now].tolist() == expected
                cache.step([ids])


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp"])
@given(data=st.data())
@settings(max_examples=25)
def test_curves_count_what_slots_hold_on_what_was_fitted(
    policy: Policy, data: st.DataObject
) -> None:
    """Where no token uses more than there are slots, as many hits as the caches have."""
    layers = data.draw(shapes(layers=1))
    trace = data.draw(traces(layers))
    trace = replace(trace, part=np.zeros_like(trace.part))
    random = Random(data.draw(st.integers(0, 2**32 - 1)))
    hot = [tuple(each) for each in random_rankings(layers, np.random.default_rng(1))]
    cut = cut_of(layers[0], random)
    if not cut.encodings:
        return
    tables = tables_of(trace, layers, hot, [cut])
    curves = tables.curves(0, policy)
    of_class = np.array(cut.class_of(layers[0].num_experts))
    ids = trace.ids[:, 0, : layers[0].top_k]
    assert [each.members for each in curves] == [*cut.class_sizes(layers[0].num_experts).values()]
    assert sum(each.activations for each in curves) == pytest.approx(layers[0].top_k)
    for its, curve in enumerate(curves):
        used = (of_class[ids] == its).sum(axis=1)
        assert curve.activations == pytest.approx(used.mean())
        for slots in range(int(used.max(initial=0)), curve.members + 1):
            counts = [slots if its == other else 0 for other in range(len(curves))]
            place = LayerPlacement(cut.layer, 0, 0, 0, policy, hot[0])
            activated, predicted = tables.held([with_slots(cut, place, counts)])[0]
            assert curve.hits[slots] == pytest.approx(activated.sum() / len(ids))
            known = np.maximum(1, (trace.predicted[:, 0] != NO_PREDICTION).sum(axis=0))
            assert curve.predicted[:, slots] == pytest.approx(predicted.sum(axis=0) / known)
