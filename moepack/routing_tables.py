"""What is known of a model's routing, tabulated for planning: who is held by a cache of any size.

One recorded trace, the ranking of *fit* that every cache starts from, and everything that follows
from the two, each computed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moepack.belady import belady_ranks
from moepack.cache_curves import (
    Curves,
    cross_fitted_hit_curves,
    predicted_cached,
    prediction_accuracy,
)
from moepack.plan import Policy, SharedPool
from moepack.pool_hits import pool_masks
from moepack.routing import RoutingProfile
from moepack.small_caches import stepped_hits
from moepack.stack_ranks import Ranks, StackRanks, stack_ranks
from moepack.timeline import Flags
from moepack.trace import ROUTING_PARTS, LayerShape, RoutingPart, Trace, activation_counts

#: For each layer every expert, hottest first.
Rankings = tuple[tuple[int, ...], ...]


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
        self._stepped: dict[tuple[int, Policy, int], tuple[Flags, Flags]] = {}
        self._pools: dict[SharedPool, tuple[Flags, Flags]] = {}

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

    def ranks(self, policy: Policy) -> StackRanks:
        """Stack positions under a policy; see :func:`moepack.stack_ranks.stack_ranks`."""
        if policy not in self._ranks:
            self._ranks[policy] = stack_ranks(self.trace, self.layers, self.hot, policy)
        return self._ranks[policy]

    def fit_curves(self, policy: Policy) -> Curves:
        """Hit rates on *fit* that compare policies fairly, float64 [L, N + 1].

        See :func:`moepack.cache_curves.cross_fitted_hit_curves`.
        """
        if policy not in self._fit_curves:
            self._fit_curves[policy] = cross_fitted_hit_curves(self.trace, self.layers, policy)
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

    def held(self, index: int, policy: Policy, slots: int) -> tuple[Flags, Flags]:
        """Which activations, and which predicted experts, a layer's cache of a size holds.

        Returns
        -------
        bool [T, K], bool [T, 2K]
            Of a prediction that does not exist: False.
        """
        if not self._is_small(index, policy, slots):
            ranks = self.ranks(policy)
            return ranks.ids[:, index] < slots, ranks.predicted[:, index] < slots
        if (index, policy, slots) not in self._stepped:
            self.step([(index, policy, slots)])
        return self._stepped[index, policy, slots]

    def step(self, caches: Iterable[tuple[int, Policy, int]]) -> None:
        """Prepare :meth:`held` for many caches (layer, policy, slots) at once.

        Those of fewer slots than a token uses experts have to be stepped, which takes about as long
        for one as for many.
        """
        missing = [
            cache
            for cache in dict.fromkeys(caches)
            if self._is_small(*cache) and cache not in self._stepped
        ]
        if not missing:
            return
        rows = [index for index, _, _ in missing]
        trace = self.trace
        some = Trace(
            trace.ids[:, rows],
            trace.weights[:, rows],
            trace.predicted[:, rows],
            trace.sequence,
            trace.part,
        )
        hits, ahead = stepped_hits(
            some,
            [self.layers[index] for index in rows],
            [self.hot[index] for index in rows],
            [policy for _, policy, _ in missing],
            [slots for _, _, slots in missing],
        )
        for place, cache in enumerate(missing):
            self._stepped[cache] = hits[:, place], ahead[:, place]

    def _is_small(self, index: int, policy: Policy, slots: int) -> bool:
        return 0 < slots < self.layers[index].top_k and policy != "pinned"

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
