"""The inner solve: the best price of one layer for every number of slots and every cut.

For a given cut it never pays to keep fewer tops than fit, nor a bottom before every top is kept. So
the options of a layer are a cut and one number, its *state*: 0 ... N slots hold tops, then 0 ... N
more hold bottoms. For each of them the table holds the cheapest policy, mode and depth of
prefetching. It does not depend on the budget: tabulated once, a layer can be solved for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.byte_division import Frontier
from moepack.cost import Array
from moepack.layer_prices import Pricer, Variant, variants_of
from moepack.layer_problem import Integers, LayerProblem
from moepack.plan import Policy, PrefetchMode


class Choice(NamedTuple):
    """What was chosen for one layer.

    Attributes
    ----------
    budget_bytes : int
        What its slots take.
    seconds : float
        Its share of the objective: time to the first token, and ``new - 1`` tokens after it.
    classes : tuple of int
        Where experts are stored in several encodings: the slots of each.
    """

    layer: int
    split: int
    tops: int
    bottoms: int
    policy: Policy
    prefetch: PrefetchMode
    depth: int
    budget_bytes: int
    seconds: float
    classes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Seconds of one layer by state and cut, and how they are reached.

    Attributes
    ----------
    seconds : float64 [2N + 1, C]
        Infinite where a state does not exist: layers that are not cut have no tops beside bottoms,
        and their slots count as bottoms here.
    variant : uint8 [2N + 1, C]
        Index into ``variants``.
    policy : tuple of str
        For 0 ... N slots.
    """

    problem: LayerProblem
    seconds: Array
    variant: npt.NDArray[np.uint8]
    variants: tuple[Variant, ...]
    policy: tuple[Policy, ...]

    @property
    def frame_bytes(self) -> int:
        """What an expert takes, under the cut under which it takes most."""
        cuts = self.problem.cuts
        return int((cuts.top_bytes + cuts.bottom_bytes).max())

    @property
    def full_bytes(self) -> int:
        """More than this buys nothing: every expert is whole under every cut."""
        return self.frame_bytes * self.problem.num_experts

    @cached_property
    def frontier(self) -> Frontier:
        """The options that no other undercuts; of equals that of the earlier cut."""
        experts = self.problem.num_experts
        first_bytes, second_bytes = (sizes[:, None] for sizes in self._slot_bytes())
        states = np.arange(2 * experts + 1)
        sizes = np.minimum(states, experts) * first_bytes
        sizes += np.maximum(states - experts, 0) * second_bytes  # [C, 2N + 1]
        seconds = self.seconds.T.ravel()
        places = np.flatnonzero(np.isfinite(seconds))
        places = places[sizes.ravel()[places].argsort(kind="stable")]
        lowest = np.minimum.accumulate(seconds[places])
        places = places[np.diff(lowest, prepend=np.inf) < 0.0]
        # Of one size the last is the best.
        sizes = sizes.ravel()[places]
        last = np.diff(sizes, append=sizes[-1] + 1) > 0
        cut, state = np.divmod(places[last], len(states))
        return Frontier(sizes[last], seconds[places[last]], state, cut)

    def choice(self, state: int, cut: int) -> Choice:
        """An option in words."""
        problem, experts = self.problem, self.problem.num_experts
        first, second = min(state, experts), max(state - experts, 0)
        interior = bool(problem.cuts.interior[cut])
        split = int(problem.cuts.splits[cut])
        variant = self.variants[self.variant[state, cut]]
        whole_tops = split == problem.cuts.width
        return Choice(
            layer=problem.layer,
            split=split,
            tops=first if interior else second * whole_tops,
            bottoms=second if interior else second * (not whole_tops),
            policy=self.policy[second if second or not interior else first],
            prefetch=variant.prefetch,
            depth=variant.depth,
            budget_bytes=self.used_bytes(state, cut),
            seconds=float(self.seconds[state, cut]),
        )

    def used_bytes(self, state: int, cut: int) -> int:
        """What the slots of an option take."""
        experts = self.problem.num_experts
        first_bytes, second_bytes = (sizes[cut] for sizes in self._slot_bytes())
        return int(min(state, experts) * first_bytes + max(state - experts, 0) * second_bytes)

    def _slot_bytes(self) -> tuple[Integers, Integers]:
        """Bytes of a slot in the first N states, and in those after them, each [C]."""
        cuts = self.problem.cuts
        whole_bytes = cuts.top_bytes + cuts.bottom_bytes
        return (
            np.where(cuts.interior, cuts.top_bytes, 0),
            np.where(cuts.interior, cuts.bottom_bytes, whole_bytes),
        )


def tabulate(problem: LayerProblem) -> LayerTable:
    """Price every option of a layer.

    For each number of slots one policy is taken, before anything is priced: the one that hits most
    on average over a quarter of all numbers around it. At a single number policies differ by chance
    too, and the best of several would be the luckiest. With prefetching, what of the predicted
    experts is held counts as well, and follows the hit rate closely.
    """
    return tabulate_all([problem])[0]


def tabulate_all(problems: Sequence[LayerProblem]) -> list[LayerTable]:
    """Price a layer for several amounts of staging, in the time of the last.

    All of them hold what a token uses, and two experts or more: beyond that staging only bounds how
    deep an engine fetches ahead, which the problems may differ in too. What is fetched deepest
    comes last.
    """
    problem = problems[-1]
    policies = [policy for policy in problem.hits if policy in problem.engine.policies]
    curves = np.array([problem.hits[policy] for policy in policies])  # [P, N + 1]
    leader = smoothed(curves, problem.num_experts // 8).argmax(axis=0)
    hits = np.maximum.accumulate(np.take_along_axis(curves, leader[None], axis=0)[0])
    hits[-1] = 1.0
    pricer = Pricer(
        problem, hits, _predicted_held(problem, policies, leader), _reads(problem, policies, leader)
    )
    every = tuple(variants_of(problem))
    asked = [tuple(variants_of(each)) for each in problems]
    places = [[every.index(variant) for variant in variants] for variants in asked]
    experts, count = problem.num_experts, len(problem.cuts.splits)
    shape = 2 * experts + 1, count
    seconds = [np.full(shape, np.inf) for _ in problems]
    variant = [np.zeros(shape, dtype=np.uint8) for _ in problems]
    interior = np.flatnonzero(problem.cuts.interior)
    groups = [(slice(experts, None), np.arange(count))]
    if len(interior):
        groups.append((slice(0, experts), interior))
    for states, columns in groups:
        prices = np.full((len(every), *seconds[0][states, columns].shape), np.inf)
        for index, price in pricer.prices(every, states, columns):
            prices[index] = price
        for one, mine in enumerate(places):
            some = prices if len(mine) == len(every) else prices[mine]
            best = some.min(axis=0)
            # Of equals the simplest, whatever they are rounded to.
            variant[one][states, columns] = (some <= best * (1.0 + 1e-9)).argmax(axis=0)
            seconds[one][states, columns] = best
    policy = tuple(policies[place] for place in leader)
    return [
        LayerTable(*each, policy) for each in zip(problems, seconds, variant, asked, strict=True)
    ]


def smoothed(curves: Array, reach: int) -> Array:
    """Each value's mean with so many on either side, ends repeated, [P, N + 1]."""
    padded = np.pad(curves, ((0, 0), (reach, reach)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=1)
    return np.asarray(windows.mean(axis=2))


def _predicted_held(
    problem: LayerProblem, policies: list[Policy], leader: npt.NDArray[np.intp]
) -> Array:
    """Q(r, n) under the policy that leads at n slots, [D, N + 1]; of no rank where none counts."""
    ranks = len(problem.accuracy) if problem.engine.max_prefetch_depth else 0
    found = np.zeros((ranks, len(leader)))
    for place, policy in enumerate(policies if ranks else ()):
        at = np.flatnonzero(leader == place)
        found[:, at] = problem.predicted_held[policy][:, at]
    found[:, -1] = 1.0
    return found


def _reads(
    problem: LayerProblem, policies: list[Policy], leader: npt.NDArray[np.intp]
) -> tuple[Array, Array] | None:
    """Shares of what n slots lack that RAM lacks too, under the policy that leads there.

    Returns
    -------
    activated : float64 [N + 1]
    predicted : float64 [D, N + 1]
    """
    disk = problem.disk
    if disk is None:
        return None
    slots = np.arange(len(leader))
    activated = np.array([disk.shares[policy] for policy in policies])[leader, slots]
    predicted = np.array([disk.predicted_shares[policy] for policy in policies])
    return activated, predicted[leader, : len(problem.accuracy), slots].T
