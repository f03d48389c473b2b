"""What is known of a model's routing, tabulated for planning: who is held by a cache of any size.

One recorded trace, the ranking of *fit* that every cache starts from, and everything that follows
from the two, each computed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.belady import belady_ranks
from moepack.cache_curves import (
    Curves,
    cross_fitted_hit_curves,
    predicted_cached,
    prediction_accuracy,
)
from moepack.class_tables import ClassTables
from moepack.half_lives import fitted_half_lives
from moepack.lane_clock import Flags
from moepack.layout import LayerLayout
from moepack.plan import Policy, SharedPool
from moepack.pool_hits import pool_masks
from moepack.routing import RoutingProfile
from moepack.small_caches import stepped_hits
from moepack.stack_ranks import Ranks, StackRanks, stack_ranks
from moepack.trace import ROUTING_PARTS, LayerShape, RoutingPart, Trace, activation_counts

#: For each layer every expert, hottest first.
Rankings = tuple[tuple[int, ...], ...]


class Cache(NamedTuple):
    """Slots of one layer and who stays in them; ``row`` counts the layers with experts."""

    row: int
    policy: Policy
    slots: int
    half_life_tokens: float | None = None


class RoutingTables:
    """The tables of one routing profile. ``L`` counts the layers that have experts.

    Attributes
    ----------
    layers : tuple of LayerShape
    hot : tuple of tuple of int
        Per layer every expert, in the order from which caches start: most used in *fit* first.
    """

    def __init__(self, profile: RoutingProfile) -> None:
        self._profile = profile
        self._others: dict[Rankings, RoutingTables] = {}
        self.trace: Trace = profile.trace
        self.layers = tuple(
            LayerShape(entry.layer, entry.num_experts, entry.top_k)
            for entry in profile.summary.layers
        )
        self.hot = tuple(profile.hot_ranking(shape.layer) for shape in self.layers)
        self._ranks: dict[Policy, StackRanks] = {}
        self._fit_curves: dict[Policy, Curves] = {}
        self._fit_cached: dict[Policy, Curves] = {}
        self._stepped: dict[Cache, tuple[Flags, Flags]] = {}
        self._decaying: dict[tuple[int, float], tuple[Ranks, Ranks]] = {}
        self._pools: dict[SharedPool, tuple[Flags, Flags]] = {}
        self._classes: dict[tuple[tuple[str, ...], ...], ClassTables] = {}

    def starting(self, hot: Rankings) -> RoutingTables:
        """The same with caches that start from other rankings: a plan may be older than these."""
        if hot == self.hot:
            return self
        if hot not in self._others:
            other = RoutingTables(self._profile)
            other.hot = hot
            self._others[hot] = other
        return self._others[hot]

    def tokens(self, part: RoutingPart) -> npt.NDArray[np.intp]:
        """Which tokens of the trace belong to a part, in order."""
        return np.flatnonzero(self.trace.part == ROUTING_PARTS.index(part))

    @cached_property
    def valid(self) -> Flags:
        """Which of K places each layer uses, bool [L, K]."""
        places = np.arange(self.trace.ids.shape[2])
        return places < np.array([shape.top_k for shape in self.layers])[:, None]

    @cached_property
    def shares(self) -> tuple[npt.NDArray[np.float64], ...]:
        """Share of each expert in the activations of *fit*, by layer, [N].

        With one activation added to each: nothing is impossible.
        """
        counts = [
            activation_counts(self.trace, index, shape.num_experts, shape.top_k, "fit") + 1.0
            for index, shape in enumerate(self.layers)
        ]
        return tuple(count / count.sum() for count in counts)

    @cached_property
    def half_lives(self) -> tuple[float, ...]:
        """Of each layer, for ``lfu_decay``; see :func:`moepack.half_lives.fitted_half_lives`."""
        return fitted_half_lives(self.trace, self.layers)

    def half_life(self, index: int, policy: Policy) -> float | None:
        """What a policy needs beside its name in a layer."""
        return self.half_lives[index] if policy == "lfu_decay" else None

    def _half_lives(self, policy: Policy) -> tuple[float, ...]:
        return self.half_lives if policy == "lfu_decay" else ()

    def ranks(self, policy: Policy) -> StackRanks:
        """Stack positions under a policy; see :func:`moepack.stack_ranks.stack_ranks`."""
        if policy not in self._ranks:
            self._ranks[policy] = stack_ranks(
                self.trace, self.layers, self.hot, policy, self._half_lives(policy)
            )
            self._keep_decaying(self._ranks[policy], range(len(self.layers)))
        return self._ranks[policy]

    def fit_curves(self, policy: Policy) -> Curves:
        """Hit rates on *fit* that compare policies fairly, float64 [L, N + 1].

        See :func:`moepack.cache_curves.cross_fitted_hit_curves`.
        """
        if policy not in self._fit_curves:
            self._fit_curves[policy] = cross_fitted_hit_curves(
                self.trace, self.layers, policy, self._half_lives(policy)
            )
        return self._fit_curves[policy]

    @cached_property
    def accuracy(self) -> Curves:
        """How often the r-th predicted expert is activated on *fit*, float64 [L, 2K]."""
        return prediction_accuracy(self.trace, self.layers, "fit")

    def fit_cached(self, policy: Policy) -> Curves:
        """How often the r-th predicted expert is held on *fit*, float64 [L, 2K, N + 1]."""
        if policy not in self._fit_cached:
            self._fit_cached[policy] = predicted_cached(
                self.ranks(policy), self.trace, self.layers, "fit"
            )
        return self._fit_cached[policy]

    def held(self, cache: Cache) -> tuple[Flags, Flags]:
        """Which activations, and which predicted experts, a layer's cache of a size holds.

        Returns
        -------
        bool [T, K], bool [T, 2K]
            Of a prediction that does not exist: False.
        """
        if self._is_small(cache):
            if cache not in self._stepped:
                self.prepare([cache])
            return self._stepped[cache]
        if cache.half_life_tokens is None:
            ranks = self.ranks(cache.policy)
            ids, predicted = ranks.ids[:, cache.row], ranks.predicted[:, cache.row]
        else:
            key = cache.row, cache.half_life_tokens
            if key not in self._decaying:
                self.prepare([cache])
            ids, predicted = self._decaying[key]
        return ids < cache.slots, predicted < cache.slots

    def prepare(self, caches: Iterable[Cache]) -> None:
        """Make :meth:`held` ready for many caches at once.

        Those of fewer slots than a token uses experts have to be stepped, and those whose counts
        decay differ from layer to layer: either takes about as long for one as for many.
        """
        asked = list(dict.fromkeys(caches))
        self._step([each for each in asked if self._is_small(each) and each not in self._stepped])
        self._rank_decaying(
            dict.fromkeys(
                (each.row, each.half_life_tokens)
                for each in asked
                if each.half_life_tokens is not None and not self._is_small(each)
            )
        )

    def _rank_decaying(self, asked: Iterable[tuple[int, float]]) -> None:
        missing = [each for each in asked if each not in self._decaying]
        if not missing:
            return
        rows = [index for index, _ in missing]
        layers, hot = self._of(rows)
        half_lives = [half_life for _, half_life in missing]
        ranks = stack_ranks(self._some(rows), layers, hot, "lfu_decay", half_lives)
        self._keep_decaying(ranks, rows)

    def _keep_decaying(self, ranks: StackRanks, rows: Sequence[int]) -> None:
        for place, (index, half_life) in enumerate(zip(rows, ranks.half_lives, strict=False)):
            self._decaying[index, half_life] = ranks.ids[:, place], ranks.predicted[:, place]

    def _step(self, missing: Sequence[Cache]) -> None:
        if not missing:
            return
        rows = [each.row for each in missing]
        layers, hot = self._of(rows)
        hits, ahead = stepped_hits(
            self._some(rows),
            layers,
            hot,
            [each.policy for each in missing],
            [each.slots for each in missing],
            [each.half_life_tokens for each in missing],
        )
        for place, each in enumerate(missing):
            self._stepped[each] = hits[:, place], ahead[:, place]

    def _of(self, rows: Sequence[int]) -> tuple[list[LayerShape], list[tuple[int, ...]]]:
        return [self.layers[row] for row in rows], [self.hot[row] for row in rows]

    def _some(self, rows: Sequence[int]) -> Trace:
        """The trace of some layers; one may be there several times."""
        trace = self.trace
        return replace(
            trace,
            ids=trace.ids[:, rows],
            weights=trace.weights[:, rows],
            predicted=trace.predicted[:, rows],
        )

    def _is_small(self, cache: Cache) -> bool:
        return 0 < cache.slots < self.layers[cache.row].top_k and cache.policy != "pinned"

    def classes(self, cuts: Sequence[LayerLayout]) -> ClassTables:
        """The same for the layers whose experts are stored in several encodings, of all layers."""
        key = tuple(cut.encodings for cut in cuts)
        if key not in self._classes:
            self._classes[key] = ClassTables(
                self.trace, self.layers, self.hot, cuts, lambda: self.half_lives
            )
        return self._classes[key]

    def pooled(self, pool: SharedPool) -> tuple[Flags, Flags]:
        """The same for slots that all layers share, bool [T, L, K] and bool [T, L, 2K]."""
        if pool not in self._pools:
            self._pools[pool] = pool_masks(
                self.trace, self.layers, self.hot, pool.slots, pool.policy
            )
        return self._pools[pool]

    @cached_property
    def future(self) -> Ranks:
        """Stack positions in a clairvoyant cache; see :func:`moepack.belady.belady_ranks`."""
        return belady_ranks(self.trace, self.layers, self.hot)
