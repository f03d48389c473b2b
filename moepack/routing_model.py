"""A model of how a model routes: a handful of numbers from which a trace can be drawn.

For planning before anything has been run. Every expert of a layer has a score, and a token takes
the experts with the ``top_k`` largest (derived)::

    score = popularity + text + context + noise

All four are normal with mean 0. Popularity is drawn once for an expert; text once for every text;
context is a first-order autoregressive process over the tokens of a text, so that its correlation
falls to 1/e in ``context_tokens``; noise is drawn for every token, and its standard deviation is
the unit of the others. The prediction for a layer ranks the same scores under more noise, as much
as makes the stated share of the experts found.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.records import record
from moepack.yaml_files import to_yaml_text

ROUTING_MODEL_VERSION = 1

# Many times the largest; a file beyond is something else.
_MAX_FILE_BYTES = 1 << 20

_HEADER = "# How a model routes, in a few numbers. What they mean is in moepack/routing_model.py.\n"


@record
class FitFigure:
    """One figure as it was recorded or published, and as traces drawn from the model have it.

    It is an average over the layers from ``first_depth`` on and before ``last_depth``, or up to the
    last where that is 1; depths as in :class:`RoutingModel`.
    """

    name: str
    first_depth: float
    last_depth: float
    recorded: float
    fitted: float

    @property
    def depths(self) -> tuple[float, float]:
        """Both depths."""
        return self.first_depth, self.last_depth


@record
class FitSample:
    """What is drawn to compare with what was recorded: so many times texts of these lengths.

    Draw i has the seed i.
    """

    layers: int
    experts: int
    top_k: int
    text_tokens: tuple[int, ...]
    draws: int


@record
class RoutingModel:
    """How a model routes.

    Attributes
    ----------
    name : str
    how : str
        What it was fitted to, and what is assumed.
    depths : tuple of float
        Where ``popularity``, ``text`` and ``context`` are given: 0 is the first layer with
        experts, 1 the last; linear between, level beyond.
    popularity, text, context : tuple of float
        Standard deviations of the parts of a score, in those of its noise.
    context_tokens : float
        In which the correlation of the context falls to 1/e.
    first_recall : tuple of float
        Share of a token's experts among as many predicted, in the first layers, one by one.
    recall : float
        The same in all later layers. At or below top-k / experts the prediction is blind.
    sources : dict
        For each parameter where it comes from.
    sample : FitSample or None
        What the fitted figures are of.
    fit : tuple of FitFigure
    """

    version: int
    name: str
    how: str
    depths: tuple[float, ...]
    popularity: tuple[float, ...]
    text: tuple[float, ...]
    context: tuple[float, ...]
    context_tokens: float
    first_recall: tuple[float, ...]
    recall: float
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    sample: FitSample | None = None
    fit: tuple[FitFigure, ...] = ()

    def __post_init__(self) -> None:
        if not self.depths or list(self.depths) != sorted({*self.depths}):
            raise ValueError(f"depths are {self.depths}, expected one or more, ascending")
        if self.depths[0] < 0 or self.depths[-1] > 1:
            raise ValueError(f"depths are {self.depths}, expected none outside 0 to 1")
        for name in ("popularity", "text", "context"):
            spread = getattr(self, name)
            if len(spread) != len(self.depths):
                raise ValueError(f"{name} has {len(spread)} numbers for {len(self.depths)} depths")
            if not all(0 <= value < math.inf for value in spread):
                raise ValueError(f"{name} is {spread}, expected numbers of 0 or more")
        if not 0 < self.context_tokens < math.inf:
            raise ValueError(f"context_tokens is {self.context_tokens}, expected more than 0")
        if not all(0 <= share <= 1 for share in (*self.first_recall, self.recall)):
            raise ValueError("a recall is not between 0 and 1")

    def save(self, path: Path) -> None:
        """Write as YAML, atomically.

        Raises
        ------
        OutputError
            When it cannot be written.
        """
        data = records.to_data(self)
        sources = data.pop("sources")
        # One line for each figure of the fit, and one (or more) for each source.
        text = to_yaml_text(data) + (to_yaml_text({"sources": sources}, flow=False))
        write_atomically(path, (_HEADER + text).encode())


def load_routing_model(path: Path) -> RoutingModel:
    """Read a routing preset.

    Raises
    ------
    ProfileError
        When it cannot be read, or a field is wrong, naming it.
    """
    return records.load_yaml(
        RoutingModel,
        path,
        what="routing preset",
        error=ProfileError,
        remedy="copy one with moepack preset copy",
        version=ROUTING_MODEL_VERSION,
        limit_bytes=_MAX_FILE_BYTES,
    )
