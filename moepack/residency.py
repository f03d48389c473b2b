"""Which experts of a layer stay in the fast tier: pure Python, shared by runtime and replay.

A cache holds one segment (a top, or a whole expert) of ``capacity`` experts. It is stepped once
per forward pass of its layer, with every token of that pass, and answers what was resident, what
is to be admitted, and into which slot. The rules, which replay and runtime must share:

- hits are judged before anything is admitted;
- experts order by a *key*; for ``lru`` it is the number of the last token that used the expert.
  Ties go to the lower expert id, and before the first use to the earlier in the hot ranking;
- after a pass the cache wants the ``capacity`` best keys among what it holds and what was used;
- experts are consumed in ascending id. A missing expert that is wanted takes the slot of the
  resident with the smallest key that is not wanted and is not needed any more in this pass; where
  there is none it is not admitted (only possible with fewer slots than experts in use).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moepack.plan import Policy


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


class ExpertCache:
    """Slots of one layer, and the policy that fills them.

    Parameters
    ----------
    capacity : int
        Number of slots, 0 to the number of experts.
    hot : sequence of int
        Every expert of the layer, hottest first; the first ``capacity`` are resident at the start,
        in slots 0, 1, 2 ...
    policy : str
        Only ``lru`` so far.
    """

    def __init__(self, capacity: int, hot: Sequence[int], policy: Policy = "lru") -> None:
        if not 0 <= capacity <= len(hot) or sorted(hot) != list(range(len(hot))):
            raise ValueError(
                f"capacity {capacity} with a hot ranking of {len(hot)}: expected a permutation of "
                "all experts, and no more slots than experts"
            )
        self.policy = policy
        self.capacity = capacity
        self._slot_of = {expert: slot for slot, expert in enumerate(hot[:capacity])}
        # Before its first use an expert sorts below every used one, by its place in the ranking.
        self._key = [0] * len(hot)
        for place, expert in enumerate(hot):
            self._key[expert] = -1 - place
        self._clock = 0

    @property
    def resident(self) -> dict[int, int]:
        """Resident expert -> slot (a copy)."""
        return dict(self._slot_of)

    def step(self, tokens: Iterable[Sequence[int]]) -> Access:
        """Account for one pass over the layer.

        Parameters
        ----------
        tokens
            For every token of the pass, in order, the ids of its experts.
        """
        needed: set[int] = set()
        for experts in tokens:
            for expert in experts:
                self._key[expert] = self._clock
            needed.update(experts)
            self._clock += 1
        slots = self._slot_of
        order = sorted(needed)
        hits = {expert: slots[expert] for expert in order if expert in slots}
        if len(hits) == len(order) or self.capacity == 0:
            return Access(hits, {})
        return Access(hits, self._admit(order, hits))

    def _rank(self, expert: int) -> tuple[int, int]:
        return (self._key[expert], -expert)

    def _admit(self, order: list[int], hits: dict[int, int]) -> dict[int, int]:
        slots = self._slot_of
        contenders = sorted({*slots, *order}, key=self._rank, reverse=True)
        wanted = set(contenders[: self.capacity])
        victims = sorted(
            (expert for expert in slots if expert not in wanted and expert not in hits),
            key=self._rank,
            reverse=True,
        )
        admitted: dict[int, int] = {}
        for expert in order:
            if expert in hits:
                if expert not in wanted:
                    victims.append(expert)
                    victims.sort(key=self._rank, reverse=True)
            elif expert in wanted and victims:
                admitted[expert] = slots[expert] = slots.pop(victims.pop())
        return admitted
