"""The inner solve of a mixed layer: the best price of every division of its slots that counts.

Its experts are whole, so an option is a division (:mod:`moepack.class_division`), a policy, and a
mode and depth of prefetching. It is priced by the closed form of :mod:`moepack.cost` as a layer
that is stored alike, whose experts take what those of this layer take on average: to transfer, over
what its slots miss; to compute, over how often each is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.byte_division import Frontier
from moepack.class_division import Divisions, divisions
from moepack.class_tables import ClassCurves
from moepack.cost import Array, missing_after
from moepack.layer_prices import Variant, variants_of
from moepack.layer_problem import Integers, LayerProblem
from moepack.layer_tables import Choice, smoothed
from moepack.mixed_cost import Rates, state_prices
from moepack.plan import Policy

# Budgets at which policies are compared.
_COMPARED = 65

# Divisions that are priced at most.
_MOST_STATES = 160


@dataclass(frozen=True, eq=False)
class MixedProblem:
    """A layer whose experts are stored in several encodings.

    Attributes
    ----------
    layer : LayerProblem
        The layer as a whole; its one cut is of its largest experts, its hit rates are not used.
    in_top : bool
        Whether its whole experts are tops.
    slot_bytes : tuple of int
        Of each class.
    curves : mapping of str to tuple of ClassCurves
        Of each policy that may be chosen.
    used : tuple of float64 [n]
        Of each class, how likely the prompt needs its experts, hottest first.
    """

    layer: LayerProblem
    in_top: bool
    slot_bytes: tuple[int, ...]
    curves: Mapping[Policy, tuple[ClassCurves, ...]]
    used: tuple[Array, ...]


class _States(NamedTuple):
    """Divisions and their policies, by ascending bytes.

    ``slots`` [P, classes], ``bytes`` [P].
    """

    slots: Integers
    bytes: Integers
    policy: tuple[Policy, ...]


@dataclass(frozen=True, eq=False)
class MixedTable:
    """Seconds of one mixed layer by state, and how they are reached; as a LayerTable is used.

    Attributes
    ----------
    seconds : float64 [P]
    variant : uint8 [P]
        Index into ``variants``.
    """

    problem: MixedProblem
    states: _States
    seconds: Array
    variant: npt.NDArray[np.uint8]
    variants: tuple[Variant, ...]

    @property
    def frame_bytes(self) -> int:
        """What its largest expert takes."""
        return max(self.problem.slot_bytes)

    @cached_property
    def frontier(self) -> Frontier:
        """The states that no other undercuts."""
        order = np.lexsort((self.seconds, self.states.bytes))
        lowest = np.minimum.accumulate(self.seconds[order])
        kept = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
        return Frontier(
            self.states.bytes[kept], self.seconds[kept], kept, np.zeros(len(kept), dtype=np.intp)
        )

    def choice(self, state: int, cut: int) -> Choice:
        """A state in words; there is one cut."""
        del cut
        problem = self.problem
        classes = tuple(int(count) for count in self.states.slots[state])
        slots, variant = sum(classes), self.variants[self.variant[state]]
        width = problem.layer.cuts.width
        return Choice(
            layer=problem.layer.layer,
            split=width if problem.in_top else 0,
            tops=slots if problem.in_top else 0,
            bottoms=0 if problem.in_top else slots,
            policy=self.states.policy[state],
            prefetch=variant.prefetch,
            depth=variant.depth,
            budget_bytes=int(self.states.bytes[state]),
            seconds=float(self.seconds[state]),
            classes=classes,
        )


def tabulate_mixed(problems: Sequence[MixedProblem]) -> list[MixedTable]:
    """Price every state of a layer for several amounts of staging.

    As in :func:`moepack.layer_tables.tabulate_all`: what is fetched deepest comes last, and what
    else depends on staging is alike.
    """
    problem = problems[-1]
    states = _states(problem)
    rates = _rates(problem, states)
    every = tuple(variants_of(problem.layer))
    prices = state_prices(problem.layer, every, rates)
    tables = []
    for each in problems:
        mine = tuple(variants_of(each.layer))
        some = prices[[every.index(variant) for variant in mine]]
        best = some.min(axis=0)
        variant = (some <= best * (1.0 + 1e-9)).argmax(axis=0).astype(np.uint8)
        tables.append(MixedTable(each, states, best, variant, mine))
    return tables


def _states(problem: MixedProblem) -> _States:
    """Of every policy its divisions, where it misses least on average over a range around them.

    As in :func:`moepack.layer_tables.tabulate`: the best of several at one budget would be the
    luckiest.
    """
    link = problem.layer.link
    weights = [link(size) for size in problem.slot_bytes]
    policies = [policy for policy in problem.curves if policy in problem.layer.engine.policies]
    known = [divisions(problem.curves[each], problem.slot_bytes, weights) for each in policies]
    budgets = np.linspace(0, int(known[0].bytes[-1]), _COMPARED)
    curves = np.array([_missed_within(each, budgets) for each in known])
    leader = smoothed(-curves, _COMPARED // 8).argmax(axis=0)
    slots, sizes, names = [], [], []
    for place, (policy, each) in enumerate(zip(policies, known, strict=True)):
        nearest = np.rint(each.bytes / max(1, int(each.bytes[-1])) * (_COMPARED - 1))
        mine = leader[nearest.astype(np.intp)] == place
        slots.append(each.slots[mine])
        sizes.append(each.bytes[mine])
        names += [policy] * int(mine.sum())
    taken = np.concatenate(sizes)
    order = np.argsort(taken, kind="stable")
    if len(order) > _MOST_STATES:
        order = order[np.linspace(0, len(order) - 1, _MOST_STATES).round().astype(np.intp)]
    return _States(
        np.concatenate(slots)[order], taken[order], tuple(names[place] for place in order)
    )


def _missed_within(found: Divisions, budgets: Array) -> Array:
    return found.missed[np.searchsorted(found.bytes, budgets, side="right") - 1]


def _rates(problem: MixedProblem, states: _States) -> Rates:
    layer, disk = problem.layer, problem.layer.disk
    link_s = np.array([layer.link(size) for size in problem.slot_bytes])
    read_s = np.array([0.0 if disk is None else disk.link(size) for size in problem.slot_bytes])
    count, ranks = len(states.bytes), len(layer.accuracy)
    missed = np.empty((count, len(link_s)))  # activations a token
    lacking = np.empty_like(missed)
    predicted = np.zeros((ranks, count))
    for its, used in enumerate(problem.used):
        slots = states.slots[:, its]
        lacking[:, its] = missing_after(used)[slots]
        for policy, curves in problem.curves.items():
            mine = np.flatnonzero([each == policy for each in states.policy])
            curve = curves[its]
            missed[mine, its] = curve.activations - curve.hits[slots[mine]]
            predicted[:, mine] += curve.predicted[:ranks, slots[mine]]
    everything = states.slots.sum(axis=1) == layer.num_experts
    predicted[:, everything] = 1.0
    all_missed, all_lacking = missed.sum(axis=1), lacking.sum(axis=1)
    reads, predicted_reads = _reads(problem, states) if disk is not None else (None, None)
    return Rates(
        hits=np.clip(1.0 - all_missed / layer.top_k, 0.0, 1.0),
        miss_s=_mean(missed, link_s),
        miss_read_s=_mean(missed, read_s),
        lacking=all_lacking,
        lacking_s=_mean(lacking, link_s),
        lacking_read_s=_mean(lacking, read_s),
        predicted=np.minimum(predicted, 1.0),
        reads=reads,
        predicted_reads=predicted_reads,
    )


def _mean(counts: Array, seconds: Array) -> Array:
    """Of [P, classes]; where there is nothing, of all alike."""
    totals = counts.sum(axis=1)
    weighted = counts @ seconds
    plain = np.full(len(counts), float(seconds.mean()))
    np.divide(weighted, totals, out=plain, where=totals > 1e-12)
    return plain


def _reads(problem: MixedProblem, states: _States) -> tuple[Array, Array]:
    """Shares that RAM lacks too, as if the slots were the hottest experts', whatever they take."""
    disk = problem.layer.disk
    assert disk is not None, "RAM holds everything"
    slots = states.slots.sum(axis=1)
    pairs = list(zip(states.policy, slots, strict=True))
    ranks = len(problem.layer.accuracy)
    activated = np.array([disk.shares[policy][count] for policy, count in pairs])
    predicted = np.array(
        [disk.predicted_shares[policy][:ranks, count] for policy, count in pairs]
    ).reshape(len(pairs), ranks)
    return activated, np.asarray(predicted.T)
