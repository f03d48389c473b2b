"""Fitting a routing model to figures: the method of moments, by simulation.

Texts are drawn from the model, their figures are compared with the recorded ones, and the free
parameters are moved until the weighted squares of the differences are least. Every trial draws
from the same seeds, so that the differences change smoothly and the fit is the same every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from moepack.routing_figures import FIGURES, RoutedTexts
from moepack.routing_model import FitFigure, FitSample, RoutingModel
from moepack.routing_sampler import sample_texts

#: ``each``: at every depth by itself. ``together``: one factor for all depths, 1 for the start.
Freedom = Literal["each", "together"]
Spread = Literal["popularity", "text", "context"]

#: First seed of the draws that trials are made of; the figures that are reported are of others.
_TRIAL_SEED = 1 << 20

_LARGEST_SPREAD = 6.0
_CONTEXT_TOKENS = (1.0, 64.0)

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """A figure to be met.

    Attributes
    ----------
    depths : tuple of float
        Depths that it is an average over, the first included, the last too where it is 1.
    weight : float
        Of its difference; with 0 it is reported and not fitted to.
    """

    figure: str
    depths: tuple[float, float]
    value: float
    weight: float = 1.0


def fit_routing(
    start: RoutingModel,
    targets: Sequence[Target],
    sample: FitSample,
    *,
    free: Mapping[Spread, Freedom],
    free_tokens: bool = True,
    trial_draws: int = 2,
    trials: int = 20,
) -> RoutingModel:
    """The model whose figures are nearest to the targets.

    Parameters
    ----------
    start
        Where the search begins; what is not free stays as it is here.
    sample
        What is drawn for the report.
    free
        Spreads to be found.
    free_tokens
        Whether ``context_tokens`` is to be found too.
    trial_draws
        Draws of a trial.
    trials
        At most so many steps.

    Returns
    -------
    RoutingModel
        ``start`` with its parameters, rounded to three digits, and its ``sample`` and ``fit``.
    """
    trial = dataclasses.replace(sample, draws=trial_draws)
    wanted = [(target.figure, target.depths) for target in targets]
    recorded = np.array([target.value for target in targets])
    weights = np.array([target.weight for target in targets])

    def differences(values: Vector) -> Vector:
        model = _with(start, free, free_tokens, values)
        return np.asarray(weights * (drawn_figures(model, wanted, trial, _TRIAL_SEED) - recorded))

    def slopes(values: Vector) -> Vector:
        base = differences(values)
        columns = []
        for index, value in enumerate(values):
            step = max(0.05, 0.1 * value)
            moved = values.copy()
            moved[index] += step
            columns.append((differences(moved) - base) / step)
        return np.column_stack(columns)

    first, lowest, highest = _search_space(start, free, free_tokens)
    found = least_squares(
        differences, first, jac=slopes, bounds=(lowest, highest), max_nfev=trials, x_scale="jac"
    )
    model = _with(start, free, free_tokens, found.x)
    fitted = drawn_figures(model, wanted, sample)
    return dataclasses.replace(
        model,
        sample=sample,
        fit=tuple(
            FitFigure(target.figure, *target.depths, round(target.value, 4), round(float(value), 4))
            for target, value in zip(targets, fitted, strict=True)
        ),
    )


def band_average(values: npt.NDArray[np.floating], depths: tuple[float, float]) -> float:
    """The average of one number for each layer over a range of depths."""
    depth = np.arange(len(values)) / max(1, len(values) - 1)
    first, last = depths
    inside = (depth >= first) & ((depth < last) | (depth == 1) & (last == 1))
    return float(values[inside].mean())


def drawn_figures(
    model: RoutingModel,
    wanted: Sequence[tuple[str, tuple[float, float]]],
    sample: FitSample,
    first_seed: int = 0,
) -> Vector:
    """Figures, by name and depths, of traces drawn from a model: averages over the draws."""
    total = np.zeros(len(wanted))
    for draw in range(sample.draws):
        texts = RoutedTexts(sample_texts(model, sample, first_seed + draw), sample.experts)
        known = {name: FIGURES[name](texts) for name in {name for name, _ in wanted}}
        total += [band_average(known[name], depths) for name, depths in wanted]
    return np.asarray(total / sample.draws)


def _search_space(
    start: RoutingModel, free: Mapping[Spread, Freedom], free_tokens: bool
) -> tuple[Vector, Vector, Vector]:
    """Start, lower and upper bounds of the values that :func:`_with` takes."""
    first: list[float] = []
    for name, freedom in free.items():
        first += getattr(start, name) if freedom == "each" else [1.0]
    bounds = [(0.0, _LARGEST_SPREAD)] * len(first)
    if free_tokens:
        first.append(start.context_tokens)
        bounds.append(_CONTEXT_TOKENS)
    lowest, highest = np.array(bounds).T
    return np.array(first), lowest, highest


def _with(
    start: RoutingModel, free: Mapping[Spread, Freedom], free_tokens: bool, values: Vector
) -> RoutingModel:
    rest = [float(value) for value in values]
    changed: dict[str, tuple[float, ...]] = {}
    for name, freedom in free.items():
        old: tuple[float, ...] = getattr(start, name)
        if freedom == "each":
            new, rest = rest[: len(old)], rest[len(old) :]
        else:
            new, rest = [rest[0] * value for value in old], rest[1:]
        changed[name] = tuple(round(value, 3) for value in new)
    tokens = round(rest[0], 3) if free_tokens else start.context_tokens
    return dataclasses.replace(
        start,
        popularity=changed.get("popularity", start.popularity),
        text=changed.get("text", start.text),
        context=changed.get("context", start.context),
        context_tokens=tokens,
    )
