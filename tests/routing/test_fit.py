from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moepack.routing_fit import Target, band_average, drawn_figures, fit_routing
from moepack.routing_model import FitSample, RoutingModel

SAMPLE = FitSample(layers=5, experts=32, top_k=4, text_tokens=(120, 120), draws=6)
FIGURES = [
    (name, depths)
    for name in ("reuse by the next token", "lru 50 %", "lfu 50 %", "usage entropy", "segment F1")
    for depths in ((0.0, 0.5), (0.5, 1.0))
]


def model(
    popularity: tuple[float, float], text: tuple[float, float], context: tuple[float, float]
) -> RoutingModel:
    return RoutingModel(
        version=1,
        name="made-up",
        how="made up",
        depths=(0.0, 1.0),
        popularity=popularity,
        text=text,
        context=context,
        context_tokens=3.0,
        first_recall=(),
        recall=0.5,
    )


TRUE = model((0.2, 0.5), (0.3, 0.9), (0.4, 1.2))
START = model((0.4, 0.4), (0.6, 0.6), (0.8, 0.8))


def targets(weight: float = 1.0) -> list[Target]:
    # Of other seeds than any that the fit draws from.
    values = drawn_figures(TRUE, FIGURES, SAMPLE, first_seed=5000)
    pairs = zip(FIGURES, values, strict=True)
    return [Target(name, depths, float(value), weight) for (name, depths), value in pairs]


@pytest.mark.slow
def test_a_fit_finds_a_model_with_the_figures_of_the_one_that_made_them() -> None:
    fitted = fit_routing(
        dataclasses.replace(START, popularity=TRUE.popularity),
        targets(),
        SAMPLE,
        free={"text": "each", "context": "each"},
        trial_draws=6,
        trials=6,
    )
    for line in fitted.fit:
        assert line.fitted == pytest.approx(line.recorded, abs=0.025), line.name
    assert max(abs(v - w) for v, w in zip(fitted.context, TRUE.context, strict=True)) < 0.5
    assert [(line.name, line.depths) for line in fitted.fit] == FIGURES
    assert fitted.sample == SAMPLE
    again = drawn_figures(fitted, FIGURES, SAMPLE)
    assert again == pytest.approx([line.fitted for line in fitted.fit], abs=1e-4)


def test_a_fit_is_the_same_every_time_and_moves_only_what_is_free() -> None:
    def fit() -> RoutingModel:
        return fit_routing(
            START, targets()[:4], SAMPLE, free={"context": "together"}, free_tokens=False, trials=3
        )

    fitted = fit()
    assert fitted == fit()
    assert fitted.context[0] == fitted.context[1] != START.context[0]
    assert dataclasses.replace(fitted, context=START.context, sample=None, fit=()) == START


def test_a_figure_without_weight_is_reported_and_not_fitted_to() -> None:
    aim = [Target("reuse by the next token", (0.0, 1.0), 0.3), Target("lru 50 %", (0.0, 1.0), 0, 0)]
    fitted = fit_routing(
        START, aim, SAMPLE, free={"context": "together"}, free_tokens=False, trial_draws=4
    )
    assert fitted.fit[0].fitted == pytest.approx(0.3, abs=0.02)
    assert fitted.fit[1].fitted > 0.5


@pytest.mark.parametrize(
    ("depths", "expected"),
    [((0.0, 1.0), 2.0), ((0.0, 0.25), 0.0), ((0.25, 0.75), 1.5), ((1.0, 1.0), 4.0)],
)
def test_a_band_of_layers_has_its_first_and_not_its_last_but_for_the_last_of_all(
    depths: tuple[float, float], expected: float
) -> None:
    assert band_average(np.arange(5.0), depths) == expected
