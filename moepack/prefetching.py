"""What the ranks of a prediction bring, and what they lack: the probabilities of fetching ahead.

See :mod:`moepack.cost` for the terms and the shapes; ``D`` counts ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moepack.cost import Array, Held, Lacks
from moepack.plan import PrefetchMode


class Ahead(NamedTuple):
    """What is fetched before the routing is known.

    Attributes
    ----------
    mode : {"bottoms", "all"}
        Which parts of a predicted expert are fetched.
    gap_s : float
        Compute between the experts of the layer before and this layer's routing.
    accuracy : [D]
        A(r): how likely the expert predicted at rank r is activated.
    held : Held, each [D] or [D, S]
        Q(r): how likely its parts are resident.
    guess_s : float
        What guessing costs the compute, behind the routing of the layer before.
    """

    mode: PrefetchMode
    gap_s: float
    accuracy: Array
    held: Held
    guess_s: float = 0.0

    def lacks(self) -> Lacks:
        """What the expert of each rank lacks and is fetched for, each [D, S]."""
        top, bottom = (
            values if values.ndim == 2 else values[:, None]
            for values in (np.asarray(chance, dtype=np.float64) for chance in self.held[:2])
        )
        both = 1.0 - top if self.mode == "all" else np.zeros_like(top)
        both_disk = self.held.both_disk
        if both_disk is not None and self.mode != "all":
            both_disk = np.zeros_like(both_disk)
        return Lacks(top - np.minimum(top, bottom), both, self.held.bottom_disk, both_disk)


class Brought(NamedTuple):
    """Where an activated expert stands once m = 0, 1 ... D ranks have been fetched.

    Attributes
    ----------
    covered : [D + 1, K + 1]
        How likely so many of the K experts have been brought, or were there and predicted.
    lacks : Lacks, each [D + 1, S]
        What each of the others lacks.
    """

    covered: Array
    lacks: Lacks

    def mean_lacks(self) -> Lacks:
        """What an activated expert lacks, covered or not, each [D + 1, S]."""
        top_k = self.covered.shape[1] - 1
        others = 1.0 - (self.covered @ np.arange(top_k + 1.0))[:, None] / top_k
        return self.lacks.each(lambda lack: others * lack)

    def any_lacks(self) -> Array:
        """How likely any of the K experts lacks something, [D + 1, S]."""
        top_k = self.covered.shape[1] - 1
        whole = 1.0 - np.minimum(self.lacks.bottom + self.lacks.both, 1.0)
        others = np.arange(top_k, -1, -1.0)
        none = np.einsum("dk,dsk->ds", self.covered, whole[..., None] ** others)
        return np.asarray(1.0 - none)

    def first(self, ranks: int) -> Brought:
        """The same for no more than so many ranks."""
        return Brought(self.covered[: ranks + 1], self.lacks.each(lambda lack: lack[: ranks + 1]))


def nothing_brought(lacks: Lacks, top_k: int) -> Brought:
    """Loading on demand: D = 0."""
    return Brought(_covered(np.zeros(0), top_k), lacks.each(lambda lack: lack[None]))


def brought(before: Lacks, ahead: Ahead, top_k: int) -> Brought:
    """What m ranks bring.

    R(m) of the K experts, the sum of ``A(r)`` over r <= m on average, are among the first m ranks:
    each rank is right or wrong by itself. Of what is held, of what lacks its bottom and of what
    lacks everything the ranks together find the same share, their recall, and rank r brings that of
    it which ``A(r)`` and ``Q(r)`` say; without that constraint ``sum A (1 - Q)`` soon is more than
    is lacking at all, since experts that are held are predicted better too. Where bottoms alone
    are fetched, nothing counts as covered, as an expert without its top stays without it.
    """
    accuracy = np.asarray(ahead.accuracy, dtype=np.float64)
    recall = min(1.0, float(accuracy.sum()) / top_k)
    only_bottom, both, bottom_disk, both_disk = ahead.lacks()

    def left(share: Array, of_rank: Array) -> Array:
        found = np.cumsum(accuracy[:, None] * of_rank, axis=0)
        found = np.concatenate([np.zeros((1, found.shape[1])), found])
        return share * (1.0 - recall * found / np.where(found[-1] > 0.0, found[-1], 1.0))

    bottom = left(before.bottom, only_bottom)
    if ahead.mode == "bottoms":
        lacks = Lacks(bottom, np.broadcast_to(before.both, bottom.shape))
        if before.bottom_disk is not None and before.both_disk is not None:
            assert bottom_disk is not None, "of a rank, too, it is known what RAM lacks"
            lacks = lacks._replace(
                bottom_disk=np.minimum(left(before.bottom_disk, bottom_disk), bottom),
                both_disk=np.broadcast_to(before.both_disk, bottom.shape),
            )
        return Brought(_covered(np.zeros(len(accuracy)), top_k), lacks)
    everything = left(before.both, both)
    ready = left(1.0 - before.bottom - before.both, 1.0 - only_bottom - both)
    total = bottom + everything + ready
    total = np.where(total > 0.0, total, 1.0)
    lacks = Lacks(bottom / total, everything / total)
    if before.bottom_disk is not None and before.both_disk is not None:
        assert bottom_disk is not None, "of a rank, too, it is known what RAM lacks"
        assert both_disk is not None, "of a rank, too, it is known what RAM lacks"
        lacks = lacks._replace(
            bottom_disk=np.minimum(left(before.bottom_disk, bottom_disk) / total, lacks.bottom),
            both_disk=np.minimum(left(before.both_disk, both_disk) / total, lacks.both),
        )
    return Brought(_covered(accuracy, top_k), lacks)


def _covered(accuracy: Array, top_k: int) -> Array:
    """How likely 0 ... K of the first 0, 1 ... D ranks are right, [D + 1, K + 1]."""
    chances = np.zeros((len(accuracy) + 1, top_k + 1))
    chances[0, 0] = 1.0
    for rank, right in enumerate(accuracy):
        chances[rank + 1] = chances[rank] * (1.0 - right)
        chances[rank + 1, 1:] += chances[rank, :-1] * right
        chances[rank + 1, -1] += chances[rank, -1] * right  # no more than K can be
    return chances
