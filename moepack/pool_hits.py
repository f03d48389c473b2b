"""What a pool of slots that all layers share holds when an expert is needed.

Experts of all layers are numbered layer by layer. A pool is one cache over them that each token
steps once per layer, so nothing can be done for several layers at once: this is a loop over the
events, in plain Python, with the orders of :mod:`moepack.expert_order` computed beforehand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import cycle
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moepack.expert_order import policy_order
from moepack.plan import Policy
from moepack.residency import SharedCache
from moepack.stack_ranks import Hot
from moepack.trace import NO_PREDICTION, LayerShape, Trace

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

#: Tokens whose events are Python's own numbers at once.
_CHUNK_TOKENS = 64

#: An expert's number, in the low bits of what it is worth.
_NUMBER_BITS = 16
_NUMBER = (1 << _NUMBER_BITS) - 1


class _Pool(Protocol):
    """A pool in use; ``held`` says of every expert's number whether it is resident."""

    held: bytearray

    def walk(self, asked: Sequence[Sequence[int]], used: Sequence[Sequence[int]]) -> bytes:
        """Which of the numbers asked for were resident, layer by layer and token by token.

        Each time the experts that the token uses are accounted for afterwards; these are given in
        the pool's own way.
        """


def pool_masks(
    trace: Trace, layers: Sequence[LayerShape], hot: Hot, slots: int, policy: Policy
) -> tuple[Mask, Mask]:
    """Which activated, and which predicted, experts a shared pool holds.

    Exactly what :class:`moepack.residency.SharedCache` does with one token a pass. Both are judged
    when a token reaches a layer, before it is accounted for there: for predictions that is when
    they are made, as soon as the layer before has been accounted for.

    Returns
    -------
    activated : bool [tokens, L, K]
    predicted : bool [tokens, L, 2K]
    """
    offsets = np.cumsum([0, *(layer.num_experts for layer in layers)])
    total, width = int(offsets[-1]), trace.ids.shape[2]
    wide = max(layer.top_k for layer in layers)
    absent = trace.predicted == NO_PREDICTION
    past = np.arange(width) >= np.array([layer.top_k for layer in layers])[:, None]
    # A number that nobody has stands for what is not there.
    ids = np.where(past, total, trace.ids + offsets[:-1, None])
    guesses = np.where(absent, total, trace.predicted + offsets[:-1, None])
    asked = np.concatenate([ids, guesses], axis=2)
    start = [
        number
        for _, number in sorted(
            (place, int(offset) + expert)
            for offset, ranking in zip(offsets[:-1], hot, strict=True)
            for place, expert in enumerate(ranking)
        )
    ]
    alike = all(layer.top_k == wide for layer in layers)
    if policy == "pinned":
        held = np.zeros(total + 1, dtype=np.bool_)
        held[start[:slots]] = True
        found = held[asked]
    elif not alike or slots < wide or total >= 1 << _NUMBER_BITS:
        found = _replay(_Stepped(slots, hot, policy, offsets.tolist()), asked, ids[:, :, :wide])
    elif policy == "lru":
        # Of one token the lower number is the better: the last to be used.
        found = _replay(_Recent(slots, start), asked, -np.sort(-ids, axis=2))
    else:
        found = _replay(_Ordered(slots, start), asked, _worths(ids, start, policy))
    return found[:, :, :width], found[:, :, width:]


def _worths(ids: Numbers, start: Sequence[int], policy: Policy) -> Numbers:
    tokens, layers, top_k = ids.shape
    events = ids.astype(np.uint16).reshape(tokens * layers, 1, top_k)
    order = policy_order(events, np.array([start]), policy, tokens_per_tick=layers)
    return (order.after.astype(np.int64).reshape(ids.shape) << _NUMBER_BITS) | ids


def _replay(pool: _Pool, asked: Numbers, used: Numbers) -> Mask:
    found = bytearray()
    for begin in range(0, len(asked), _CHUNK_TOKENS):
        chunk = slice(begin, begin + _CHUNK_TOKENS)
        asked_now, used_now = (
            array[chunk].reshape(-1, array.shape[2]).tolist() for array in (asked, used)
        )
        found += pool.walk(asked_now, used_now)
    return np.frombuffer(found, dtype=np.bool_).reshape(asked.shape)


def _held(numbers: Iterable[int], total: int) -> bytearray:
    held = bytearray(total + 1)
    for number in numbers:
        held[number] = 1
    return held


class _Recent:
    """A pool by ``lru``: a list from the least to the most recently used.

    A token's numbers are given in the order of their use.
    """

    def __init__(self, slots: int, start: Sequence[int]) -> None:
        self.held = _held(start[:slots], len(start))
        self._slots = slots
        self._order = OrderedDict.fromkeys(reversed(start[:slots]))

    def walk(self, asked: Sequence[Sequence[int]], used: Sequence[Sequence[int]]) -> bytes:
        order, held, slots = self._order, self.held, self._slots
        found = bytearray()
        for numbers, experts in zip(asked, used, strict=True):
            found += bytes(map(held.__getitem__, numbers))
            for number in experts:
                if held[number]:
                    order.move_to_end(number)
                else:
                    order[number] = None
                    held[number] = 1
            while len(order) > slots:
                held[order.popitem(last=False)[0]] = 0
        return bytes(found)


class _Ordered:
    """A pool by ``lfu`` or ``lcp``: a heap of what each resident was worth when last looked at.

    A token's experts are given as what they are worth from then on, with their numbers in the low
    bits. No expert's worth ever falls, so an entry that is still true at the top of the heap is
    the worst of all.
    """

    def __init__(self, slots: int, start: Sequence[int]) -> None:
        self.held = _held(start[:slots], len(start))
        # Below every expert that was used; the hotter the higher.
        self._worth = [0] * len(start)
        for place, number in enumerate(start):
            self._worth[number] = ((len(start) - place) << _NUMBER_BITS) | number
        self._heap = [self._worth[number] for number in start[:slots]]
        heapify(self._heap)

    def walk(self, asked: Sequence[Sequence[int]], used: Sequence[Sequence[int]]) -> bytes:
        worth, held, heap = self._worth, self.held, self._heap
        found = bytearray()
        for numbers, experts in zip(asked, used, strict=True):
            found += bytes(map(held.__getitem__, numbers))
            entering = []
            for now in experts:
                number = now & _NUMBER
                worth[number] = now
                if not held[number]:
                    entering.append(now)
            # What enters takes the place of the worst, at the top of the heap.
            spared = []
            for now in entering:
                held[now & _NUMBER] = 1
                while True:
                    worst = heap[0]
                    if worst != (true := worth[worst & _NUMBER]):
                        heapreplace(heap, true)
                    elif worst in experts:
                        spared.append(heappop(heap))
                    else:
                        break
                held[worst & _NUMBER] = 0
                heapreplace(heap, now)
            for now in spared:
                heappush(heap, now)
        return bytes(found)


class _Stepped:
    """A pool by the runtime's own cache: slower, and fit for layers and slots of any number."""

    def __init__(self, slots: int, hot: Hot, policy: Policy, offsets: Sequence[int]) -> None:
        pool = SharedCache(slots, hot, policy)
        layers = [pool.layer(index) for index in range(len(hot))]
        self._none = offsets[-1]
        self._next = cycle(list(zip(offsets, layers, strict=False)))
        self._holder = {
            slot: offset + expert
            for offset, layer in zip(offsets, layers, strict=False)
            for expert, slot in layer.resident.items()
        }
        self.held = _held(self._holder.values(), offsets[-1])

    def walk(self, asked: Sequence[Sequence[int]], used: Sequence[Sequence[int]]) -> bytes:
        found = bytearray()
        for numbers, experts in zip(asked, used, strict=True):
            found += bytes(map(self.held.__getitem__, numbers))
            first, layer = next(self._next)
            token = [number - first for number in experts if number != self._none]
            # A slot changes hands only once while one token is accounted for.
            for expert, slot in layer.step([token]).admitted.items():
                self.held[self._holder[slot]] = 0
                self._holder[slot] = first + expert
                self.held[first + expert] = 1
        return bytes(found)
