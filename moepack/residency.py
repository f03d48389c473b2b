"""Which experts stay in the fast tier: pure Python, shared by runtime and replay.

A cache holds one segment (a top, or a whole expert) of ``capacity`` experts. It is stepped once
per forward pass of its layer, with every token of that pass, and answers what was resident, what
is to be admitted, and into which slot. The rules, which replay and runtime must share:

- hits are judged before anything is admitted;
- experts order by whether the pass uses them, then by :func:`access_key`, then the lower id first.
  An expert that was never used has the key ``-1 - place`` in the hot ranking: it sorts below every
  used one. Uses are counted for the whole pass before anything is admitted;
- after a pass the cache wants the ``capacity`` first of what it holds and what was used, so a
  missing expert is always admitted where there are slots enough. A ``pinned`` cache wants what it
  holds;
- of what a pass uses it may be said that it is not kept: it counts as used, and is not wanted if it
  is missing;
- experts are consumed in ascending id. A missing expert that is wanted takes the slot of the
  resident that is last in the order, not wanted and not needed any more in this pass; where there
  is none it is not admitted (only possible with fewer slots than experts in use).

For passes of one token, and from top-k slots on, every policy here is a stack algorithm (Mattson et
al. 1970): a larger cache holds whatever a smaller one does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple, Protocol

from moepack.plan import Policy, require_half_life

#: Of the least cache priority, arXiv 2509.08342: an expert's count of activations is worth
#: ``LCP_RHO`` of itself after ``LCP_OMEGA`` tokens without one.
LCP_RHO = 0.25
LCP_OMEGA = 128

#: What a token of recency adds to the logarithm of that count (derived).
LCP_PER_TOKEN = math.log(1 / LCP_RHO) / LCP_OMEGA


def decay(tokens: float, half_life_tokens: float) -> float:
    """What is left of 1 after some tokens."""
    return float(2.0 ** (-tokens / half_life_tokens))


def growth(tokens: float, half_life_tokens: float) -> tuple[int, float]:
    """What was worth 1 some tokens ago, when it is 1 now: 2 to the first, times the second.

    The second is 1 or more, and less than 2: a number of its own would soon be too large.
    """
    halvings = tokens / half_life_tokens
    doubled = math.floor(halvings)
    return doubled, 2.0 ** (halvings - doubled)


def access_key(
    policy: Policy, uses: float, last: float, half_life_tokens: float | None = None
) -> float:
    """What an expert that has been used is kept by: the cache lets the smallest go.

    Keys never fall. Whoever computes them elsewhere takes logarithms from ``math.log`` and powers
    from :func:`decay` and :func:`growth`: another library's may differ in the last bit, and then
    so do ties.

    Parameters
    ----------
    uses : float
        Activations so far, at least one; for ``lfu_decay`` what they were worth when it was last
        used: each counts half as much after a half-life.
    last : float
        The number of the last token that used it.
    half_life_tokens
        Where the policy is ``lfu_decay``.

    Returns
    -------
    float
        For ``lru`` the last token, for ``lfu`` the activations. For ``lcp`` the logarithm of the
        paper's priority, ``activations * LCP_RHO ** (age / LCP_OMEGA)``, without what all experts
        have in common at one moment (derived). For ``lfu_decay`` ``log2(uses) + last / half-life``,
        likewise; the logarithm is drawn straight between powers of two, which orders the same and
        rounds the same everywhere.
    """
    if policy == "lru":
        return last
    if policy == "lfu":
        return uses
    if policy == "lcp":
        return math.log(uses) + last * LCP_PER_TOKEN
    if policy == "lfu_decay":
        assert half_life_tokens is not None, "a policy that decays, without a half-life"
        doubled, rest = growth(last, half_life_tokens)
        mantissa, exponent = math.frexp(uses * rest)
        return doubled + exponent + 2.0 * mantissa
    raise ValueError(f"a cache that is {policy} keeps nothing by its use")


class Access(NamedTuple):
    """What one pass finds and does.

    Attributes
    ----------
    resident : dict
        Needed expert -> slot that holds it at the start of the pass.
    admitted : dict
        Missing expert -> slot to copy it into once it has arrived and has been consumed.
    """

    resident: dict[int, int]
    admitted: dict[int, int]


class Resized(NamedTuple):
    """What another number of slots changes.

    Attributes
    ----------
    moved : dict
        Slot -> the slot, of those that go, whose expert it holds from now on.
    admitted : dict
        Expert -> slot, of those that come, that it is to be loaded into.
    """

    moved: dict[int, int]
    admitted: dict[int, int]


class LayerCache(Protocol):
    """What one layer sees of its slots, or of those that all layers share."""

    @property
    def resident(self) -> dict[int, int]:
        """Resident expert of the layer -> slot (a copy)."""

    def holds(self, expert: int) -> bool:
        """Whether an expert of the layer is resident."""

    def step(self, tokens: Iterable[Sequence[int]], unkept: Collection[int] = ()) -> Access:
        """Account for one pass over the layer.

        Parameters
        ----------
        tokens
            For every token of the pass, in order, the ids of its experts.
        unkept
            Those of them that do not come, if they are missing. They count as used: the router
            chose them. They are not admitted, so nothing leaves for them.
        """


class ExpertCache:
    """Slots of one layer, and the policy that fills them.

    Parameters
    ----------
    capacity : int
        Number of slots, 0 to the number of experts.
    hot : sequence of int
        Every expert of the layer, hottest first; the first ``capacity`` are resident at the start,
        in slots 0, 1, 2 ...
    half_life_tokens
        Where the policy is ``lfu_decay``, and only there.
    layers : int
        How many layers step it, each with its own experts: ages are counted in tokens, and a token
        steps it so many times.
    """

    def __init__(
        self,
        capacity: int,
        hot: Sequence[int],
        policy: Policy = "lru",
        *,
        half_life_tokens: float | None = None,
        layers: int = 1,
    ) -> None:
        require_half_life("a cache", policy, half_life_tokens)
        _require_ranking(capacity, hot, len(hot))
        self.policy = policy
        self.capacity = capacity
        self._half_life_tokens = half_life_tokens
        self._layers = layers
        self._clock = 0
        self._uses = [0.0] * len(hot)
        self._last = [0] * len(hot)
        self._place = [0] * len(hot)
        for place, expert in enumerate(hot):
            self._place[expert] = place
        self._slot_of = {expert: slot for slot, expert in enumerate(hot[:capacity])}
        self._rebuild()

    @property
    def resident(self) -> dict[int, int]:
        """Resident expert -> slot (a copy)."""
        return dict(self._slot_of)

    def holds(self, expert: int) -> bool:
        """See :meth:`LayerCache.holds`."""
        return expert in self._slot_of

    def step(self, tokens: Iterable[Sequence[int]], unkept: Collection[int] = ()) -> Access:
        """Account for one pass; see :meth:`LayerCache.step`."""
        uses, last, clock, half_life = self._uses, self._last, self._clock, self._half_life_tokens
        needed: set[int] = set()
        for experts in tokens:
            for expert in experts:
                if half_life is not None:
                    uses[expert] *= decay(clock - last[expert], half_life)
                uses[expert] += 1.0
                last[expert] = clock
            needed.update(experts)
            clock += 1
        self._clock = clock
        order = sorted(needed)
        slots = self._slot_of
        hits = {expert: slots[expert] for expert in order if expert in slots}
        if unkept:
            order = [expert for expert in order if expert in hits or expert not in unkept]
        if len(hits) == len(order) or self.capacity == 0 or self.policy == "pinned":
            return Access(hits, {})
        if len(order) <= self.capacity:
            return Access(hits, self._admit_all(order, hits))
        return Access(hits, self._admit_some(order, hits))

    def resize(self, capacity: int, hot: Sequence[int]) -> Resized:
        """Have another number of slots, between two passes. What has been counted stays.

        What is last in the order leaves; what is first in it of the others comes. ``pinned`` orders
        by the hot ranking alone. Slots go from the end and come at the end.

        Parameters
        ----------
        capacity : int
            0 to the number of experts.
        hot
            Every expert, hottest first: the ranking from now on.
        """
        _require_ranking(capacity, hot, len(self._uses))
        for place, expert in enumerate(hot):
            self._place[expert] = place
        slots = self._slot_of
        order = sorted(hot, key=self._lasting_rank, reverse=True)
        staying = [expert for expert in order if expert in slots][:capacity]
        coming = [expert for expert in order if expert not in slots]
        freed = set(range(min(capacity, self.capacity))) - {slots[expert] for expert in staying}
        moved = {}
        self._slot_of = {}
        for expert in staying:
            slot = slots[expert]
            if slot >= capacity:
                slot = freed.pop()
                moved[slot] = slots[expert]
            self._slot_of[expert] = slot
        admitted = dict(zip(coming, range(self.capacity, capacity), strict=False))
        self._slot_of.update(admitted)
        self.capacity = capacity
        if self.policy != "pinned":
            self._rebuild()
        return Resized(moved, admitted)

    def _lasting_rank(self, expert: int) -> tuple[float, int]:
        """The order for as long as the number of slots lasts."""
        if self.policy == "pinned":
            return (-1 - self._place[expert], -expert)
        return self._rank(expert)

    def _rank(self, expert: int) -> tuple[float, int]:
        """The order of experts apart from the pass; the smallest goes first."""
        uses = self._uses[expert]
        if not uses:
            return (-1 - self._place[expert], -expert)
        last = self._last[expert] / self._layers
        return access_key(self.policy, uses, last, self._half_life_tokens), -expert

    def _rebuild(self) -> None:
        # The rank that every resident had when it was last looked at. Ranks never fall, so what
        # is smallest here and still has that rank is the smallest of all.
        self._heap = [self._rank(expert) for expert in self._slot_of]
        heapify(self._heap)

    def _admit_all(self, order: list[int], hits: dict[int, int]) -> dict[int, int]:
        """What the pass uses fits: all of it is wanted, so only what it does not use goes."""
        slots, heap = self._slot_of, self._heap
        spared: list[tuple[float, int]] = []
        admitted: dict[int, int] = {}
        for expert in order:
            if expert in hits:
                continue
            smallest = self._pop_smallest()
            while -smallest[1] in hits:
                spared.append(smallest)
                smallest = self._pop_smallest()
            admitted[expert] = slots[expert] = slots.pop(-smallest[1])
        for rank in spared:
            heappush(heap, rank)
        for expert in admitted:
            heappush(heap, self._rank(expert))
        return admitted

    def _pop_smallest(self) -> tuple[float, int]:
        heap = self._heap
        while (rank := self._rank(-heap[0][1])) != heap[0]:
            heapreplace(heap, rank)
        return heappop(heap)

    def _admit_some(self, order: list[int], hits: dict[int, int]) -> dict[int, int]:
        """More is used than there are slots: what is not wanted gives way once it is consumed."""
        slots, rank = self._slot_of, self._rank
        wanted = set(sorted(order, key=rank)[-self.capacity :])
        victims = sorted((expert for expert in slots if expert not in hits), key=rank, reverse=True)
        admitted: dict[int, int] = {}
        for expert in order:
            if expert in hits:
                if expert not in wanted:
                    victims.append(expert)
                    victims.sort(key=rank, reverse=True)
            elif expert in wanted and victims:
                admitted[expert] = slots[expert] = slots.pop(victims.pop())
        self._rebuild()
        return admitted


def _require_ranking(capacity: int, hot: Sequence[int], experts: int) -> None:
    if not 0 <= capacity <= experts or sorted(hot) != list(range(experts)):
        raise ValueError(
            f"capacity {capacity} with a hot ranking of {len(hot)}: expected a permutation of "
            "all experts, and no more slots than experts"
        )


class SharedCache:
    """Slots that all layers share: one cache over the experts of all of them.

    Experts are numbered layer by layer. The cache starts from the hottest of every layer in turn,
    then the second hottest, and so on.

    Parameters
    ----------
    slots : int
        0 to the number of experts of all layers together.
    hot_by_layer
        Of each layer every expert, hottest first.
    """

    def __init__(self, slots: int, hot_by_layer: Sequence[Sequence[int]], policy: Policy) -> None:
        first, start = 0, []
        views = []
        for hot in hot_by_layer:
            start += [(place, first + expert) for place, expert in enumerate(hot)]
            views.append((first, first + len(hot)))
            first += len(hot)
        ranking = [expert for _, expert in sorted(start, key=lambda entry: entry[0])]
        self._cache = ExpertCache(slots, ranking, policy, layers=len(hot_by_layer))
        self._layers = [_SharedLayer(self._cache, *view) for view in views]

    def layer(self, index: int) -> LayerCache:
        """What the layer at ``index`` sees of the pool. Layers are to be stepped in their order."""
        return self._layers[index]


class _SharedLayer:
    """One layer of a shared cache, by the layer's own numbers of experts."""

    def __init__(self, cache: ExpertCache, first: int, stop: int) -> None:
        self._cache = cache
        self._first = first
        self._stop = stop

    @property
    def resident(self) -> dict[int, int]:
        held = self._cache.resident.items()
        return {e - self._first: slot for e, slot in held if self._first <= e < self._stop}

    def holds(self, expert: int) -> bool:
        return self._cache.holds(self._first + expert)

    def step(self, tokens: Iterable[Sequence[int]], unkept: Collection[int] = ()) -> Access:
        first = self._first
        found = self._cache.step(
            [[first + expert for expert in experts] for experts in tokens],
            {first + expert for expert in unkept},
        )
        return Access(
            {expert - first: slot for expert, slot in found.resident.items()},
            {expert - first: slot for expert, slot in found.admitted.items()},
        )
