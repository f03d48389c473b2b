"""The recorded routing of some tokens, and the parts that it is split into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

#: Stands in the predicted ranking where no prediction exists (the first token of a sequence).
NO_PREDICTION = np.iinfo(np.uint16).max

RoutingPart = Literal["fit", "select", "test"]
ROUTING_PARTS: tuple[RoutingPart, ...] = ("fit", "select", "test")

#: Share of each text that goes to *fit* and to *select*; the rest is *test*.
PART_SHARES = (0.6, 0.2)

Ids = npt.NDArray[np.uint16]


class LayerShape(NamedTuple):
    """One layer of a trace: its number in the decoder, its experts, and how many a token uses."""

    layer: int
    num_experts: int
    top_k: int


@dataclass(frozen=True, eq=False)
class Trace:
    """The recorded routing. ``L`` counts the layers that have experts, in the decoder's order.

    Attributes
    ----------
    ids : uint16 [tokens, L, K]
        Experts of each token, in the order of the scores that chose them: in descending weight,
        but where a family corrects the scores that choose by a bias.
    weights : float16 [tokens, L, K]
        Their routing weights.
    predicted : uint16 [tokens, L, 2K]
        The ranking that the layer's router gave one layer earlier (for the first layer: on the
        previous token's last layer); :data:`NO_PREDICTION` where there is none.
    sequence : uint32 [tokens]
        Number of the sequence that a token belongs to.
    part : uint8 [tokens]
        Index into :data:`ROUTING_PARTS`.
    """

    ids: Ids
    weights: npt.NDArray[np.float16]
    predicted: Ids
    sequence: npt.NDArray[np.uint32]
    part: npt.NDArray[np.uint8]

    def take(self, rows: slice | npt.NDArray[np.integer]) -> Trace:
        """The trace of some tokens alone."""
        return Trace(
            self.ids[rows],
            self.weights[rows],
            self.predicted[rows],
            self.sequence[rows],
            self.part[rows],
        )

    def unpredicted(self) -> Trace:
        """The same without predictions."""
        return replace(self, predicted=self.predicted[:, :, :0])

    def halved_fit(self) -> Trace:
        """The *fit* tokens alone, the second half of each text's relabelled *select*."""
        fit = self.part == ROUTING_PARTS.index("fit")
        rows = np.flatnonzero(fit)
        begins = fit & ~np.concatenate([[False], fit[:-1]])
        text = np.cumsum(begins)[rows]  # 1, 2 ...: a text's *fit* tokens are one run
        lengths = np.bincount(text)
        place = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[text]
        late = place >= (lengths[text] + 1) // 2
        return replace(self.take(rows), part=late.astype(np.uint8))


def part_of_tokens(count: int) -> npt.NDArray[np.uint8]:
    """Which part each of ``count`` consecutive tokens of one text belongs to, uint8 [count]."""
    fit = round(count * PART_SHARES[0])
    select = round(count * PART_SHARES[1])
    return np.repeat(
        np.arange(3, dtype=np.uint8), [fit, min(select, count - fit), max(0, count - fit - select)]
    )


def activation_counts(
    trace: Trace, index: int, num_experts: int, top_k: int, part: RoutingPart
) -> npt.NDArray[np.int64]:
    """Activations of every expert of a layer in one part, int64 [experts].

    Parameters
    ----------
    index
        Of the layer on the trace's layer axis.
    """
    ids = trace.ids[trace.part == ROUTING_PARTS.index(part), index, :top_k]
    return np.bincount(ids.ravel(), minlength=num_experts)


def hot_ranking(counts: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Experts by their counts, most used first; ties to the lower id."""
    return tuple(np.argsort(-counts, kind="stable").tolist())


def hot_rankings(
    trace: Trace, layers: Sequence[LayerShape], part: RoutingPart = "fit"
) -> list[tuple[int, ...]]:
    """The hot ranking of every layer of a trace, learnt from one part."""
    return [
        hot_ranking(activation_counts(trace, index, layer.num_experts, layer.top_k, part))
        for index, layer in enumerate(layers)
    ]
