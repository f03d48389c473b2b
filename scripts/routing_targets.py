"""What presets are fitted to: recipes, and the figures of the recordings.

The recordings are other people's (their licences are stated beside them) and stay where they are;
only figures are taken from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack.routing_figures import FIGURES, RoutedTexts
from moepack.routing_fit import Freedom, Spread, Target, band_average, fit_routing
from moepack.routing_model import ROUTING_MODEL_VERSION, FitSample, RoutingModel

THIRDS = ((0.0, 0.25), (0.25, 0.75), (0.75, 1.0))
ALL_LAYERS = (0.0, 1.0)
DEPTHS = (0.0, 0.5, 1.0)
EACH: dict[Spread, Freedom] = {"popularity": "each", "text": "each", "context": "each"}

#: Weights of the figures that recorded traces give; what plans depend on most counts twice.
TRACE_WEIGHTS = {
    "reuse by the next token": 2.0,
    "reuse after 2 to 4 tokens": 1.0,
    "reuse after 8 to 16 tokens": 1.0,
    "segment F1": 2.0,
    "lru 25 %": 2.0,
    "lru 50 %": 2.0,
    "lru 75 %": 1.0,
    "lfu 25 %": 2.0,
    "lfu 50 %": 2.0,
    "lfu 75 %": 1.0,
    "usage entropy": 2.0,
    "reuse in another text": 0.5,
}

OWN_FIRST = (
    "assumption: what moepack's shipped model was measured to have in its first layers; the "
    "recordings hold no predictions"
)
SEGMENTS = "segment F1 of arXiv 2505.16056, table 1"


@dataclass(frozen=True)
class Stage:
    """One fit; a later stage begins where the one before it ended."""

    sample: FitSample
    targets: Sequence[Target]
    free: dict[Spread, Freedom]
    free_tokens: bool = False
    trial_draws: int = 2


@dataclass(frozen=True)
class Recipe:
    """A preset: where the fit begins, with all of its provenance, and its stages."""

    start: RoutingModel
    stages: tuple[Stage, ...] = ()

    def make(self) -> RoutingModel:
        """Fit it; the figures that it lists are those of the last stage."""
        model = self.start
        for stage in self.stages:
            model = fit_routing(
                model,
                stage.targets,
                stage.sample,
                free=stage.free,
                free_tokens=stage.free_tokens,
                trial_draws=stage.trial_draws,
            )
        return model


def start(
    name: str,
    how: str,
    *,
    sources: dict[str, str],
    depths: tuple[float, ...] = DEPTHS,
    spreads: tuple[float, float, float] = (0.3, 0.7, 0.7),
    first_recall: tuple[float, ...],
    recall: float,
) -> RoutingModel:
    """Where a fit begins: the same popularity, text and context at all depths."""
    popularity, text, context = ((value,) * len(depths) for value in spreads)
    return RoutingModel(
        version=ROUTING_MODEL_VERSION,
        name=name,
        how=how,
        depths=depths,
        popularity=popularity,
        text=text,
        context=context,
        context_tokens=2.0,
        first_recall=first_recall,
        recall=recall,
        sources=sources,
    )


def clean_texts(path: Path) -> tuple[list[npt.NDArray[np.uint8]], int]:
    """The texts of a recorded trace, each up to where decoding begins to repeat itself."""
    with np.load(path) as arrays:
        experts = int(arrays["num_experts"])
        if "clean_prefix" not in arrays:
            return [arrays["trace"]], experts
        lengths = zip(arrays["prompts"].tolist(), arrays["clean_prefix"].tolist(), strict=True)
        return [arrays[name][:length] for name, length in lengths if length], experts


def trace_targets(
    texts: Sequence[npt.NDArray[Any]],
    experts: int,
    figures: Sequence[str] = tuple(TRACE_WEIGHTS),
    bands: Sequence[tuple[float, float]] = THIRDS,
) -> list[Target]:
    """Figures of recorded texts over bands of layers."""
    routed = RoutedTexts(texts, experts)
    return [
        Target(name, band, band_average(FIGURES[name](routed), band), TRACE_WEIGHTS[name])
        for name in figures
        for band in bands
    ]


def thirds(figure: str, values: npt.NDArray[np.floating], weight: float = 1.0) -> list[Target]:
    """The averages over the thirds of one number for each layer, or three numbers as they are."""
    if len(values) != len(THIRDS):
        values = np.array([band_average(values, band) for band in THIRDS])
    return at(THIRDS, figure, values.tolist(), weight)


def at(
    bands: Sequence[tuple[float, float]], figure: str, values: Sequence[float], weight: float
) -> list[Target]:
    """A figure's values over some ranges of depths."""
    pairs = zip(bands, values, strict=True)
    return [Target(figure, band, value, weight) for band, value in pairs]


def layer_entropies(path: Path, key: str) -> npt.NDArray[np.float64]:
    """Usage entropy of each layer, of all counts or on average over the domains."""
    counts = json.loads(path.read_text())[key]
    tables = [counts] if key == "counts" else list(counts.values())
    found = []
    for table in tables:
        shares = np.array(table, dtype=np.float64)
        shares /= shares.sum(axis=1, keepdims=True)
        logs = np.log(np.where(shares > 0, shares, 1.0))
        found.append(-(shares * logs).sum(axis=1) / np.log(shares.shape[1]))
    return np.asarray(np.mean(found, axis=0))
