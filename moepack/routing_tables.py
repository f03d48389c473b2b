"""What is known of a model's routing, tabulated for planning: who is held by a cache of any size.

One recorded trace, the ranking of *fit* that every cache starts from, and everything that follows
from the two, each computed when it is first asked for.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from moepack.belady import belady_ranks
from moepack.plan import Policy, SharedPool
from moepack.pool_hits import pool_masks
from moepack.routing import RoutingProfile
from moepack.small_caches import stepped_hits
from moepack.stack_ranks import Ranks, StackRanks, stack_ranks
from moepack.timeline import Flags
from moepack.trace import ROUTING_PARTS, LayerShape, RoutingPart, Trace


class RoutingTables:
    """The tables of one routing profile. ``L`` counts the layers that have experts.

    Attributes
    ----------
    layers : tuple of LayerShape
    hot : tuple of tuple of int
        Per layer every expert, most used in *fit* first.
    """

    def __init__(self, profile: RoutingProfile) -> None:
        self.trace: Trace = profile.trace
        self.layers = tuple(
            LayerShape(entry.layer, entry.num_experts, entry.top_k)
            for entry in profile.summary.layers
        )
        self.hot = tuple(profile.hot_ranking(shape.layer) for shape in self.layers)
        self._ranks: dict[Policy, StackRanks] = {}
        self._stepped: dict[tuple[int, Policy, int], tuple[Flags, Flags]] = {}
        self._pools: dict[SharedPool, tuple[Flags, Flags]] = {}

    def tokens(self, part: RoutingPart) -> npt.NDArray[np.intp]:
        """Which tokens of the trace belong to a part, in order."""
        return np.flatnonzero(self.trace.part == ROUTING_PARTS.index(part))

    @cached_property
    def valid(self) -> Flags:
        """Which of K places each layer uses, bool [L, K]."""
        places = np.arange(self.trace.ids.shape[2])
        return places < np.array([shape.top_k for shape in self.layers])[:, None]

    def ranks(self, policy: Policy) -> StackRanks:
        """Stack positions under a policy; see :func:`moepack.stack_ranks.stack_ranks`."""
        if policy not in self._ranks:
            self._ranks[policy] = stack_ranks(self.trace, self.layers, self.hot, policy)
        return self._ranks[policy]

    def held(self, index: int, policy: Policy, slots: int) -> tuple[Flags, Flags]:
        """Which activations, and which predicted experts, a layer's cache of a size holds.

        Returns
        -------
        bool [T, K], bool [T, 2K]
            Of a prediction that does not exist: False.
        """
        trace, shape = self.trace, self.layers[index]
        if slots == 0 or slots >= shape.top_k or policy == "pinned":
            ranks = self.ranks(policy)
            return ranks.ids[:, index] < slots, ranks.predicted[:, index] < slots
        key = (index, policy, slots)
        if key not in self._stepped:
            one = Trace(
                trace.ids[:, index : index + 1],
                trace.weights[:, index : index + 1],
                trace.predicted[:, index : index + 1],
                trace.sequence,
                trace.part,
            )
            hits, ahead = stepped_hits(one, [shape], [self.hot[index]], [policy], [slots])
            self._stepped[key] = hits[:, 0], ahead[:, 0]
        return self._stepped[key]

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
