"""A routing profile whose trace cannot be is refused, naming what is wrong with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moepack.errors import ProfileError
from moepack.routing import RoutingProfile, load_routing, make_profile
from moepack.trace import NO_PREDICTION, LayerShape, Trace
from tests.support.caches import random_trace

LAYERS = (LayerShape(1, 6, 2), LayerShape(3, 8, 3))


def profile_of(trace: Trace, *, with_hit_rates: bool = False) -> RoutingProfile:
    return make_profile(
        trace,
        model_name="drawn",
        model_digest="d" * 64,
        recorded_utc="2026-01-01T00:00:00+00:00",
        how="drawn at random",
        sources=(),
        layers=LAYERS,
        with_hit_rates=with_hit_rates,
    )


@pytest.fixture
def trace() -> Trace:
    return random_trace(LAYERS, 50, np.random.default_rng(1))


@pytest.mark.parametrize("with_hit_rates", [False, True])
def test_a_profile_survives_its_files(trace: Trace, tmp_path: Path, with_hit_rates: bool) -> None:
    profile = profile_of(trace, with_hit_rates=with_hit_rates)
    profile.save(tmp_path)
    again = load_routing(tmp_path)
    assert again.summary == profile.summary
    assert len(again.summary.hit_rates) == (len(LAYERS) if with_hit_rates else 0)
    assert again.layers == LAYERS
    for name in ("ids", "weights", "predicted", "sequence", "part"):
        assert np.array_equal(getattr(again.trace, name), getattr(trace, name))


@pytest.mark.parametrize(
    ("array", "where", "value", "message"),
    [
        ("ids", (4, 0, 1), 6, "layer 1 names expert 6 of 6"),
        ("ids", (4, 1, slice(0, 2)), 5, "layer 3 names an expert twice for one token"),
        ("predicted", (9, 1, 0), 8, "layer 3 names expert 8 of 8"),
        ("part", 3, 7, "a part numbered 7, expected at most 2"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(
    trace: Trace, tmp_path: Path, array: str, where: object, value: int, message: str
) -> None:
    damaged = getattr(trace, array).copy()
    damaged[where] = value
    profile_of(dataclasses.replace(trace, **{array: damaged})).save(tmp_path)
    with pytest.raises(ProfileError, match=message):
        load_routing(tmp_path)


def test_absent_predictions_are_no_experts(trace: Trace, tmp_path: Path) -> None:
    assert (trace.predicted == NO_PREDICTION).any()
    profile_of(trace).save(tmp_path)
    load_routing(tmp_path)
