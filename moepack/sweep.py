"""Plans over a range of budgets, and where more memory stops paying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from moepack.errors import BudgetTooSmallError
from moepack.forecast import Baseline
from moepack.plan import Plan
from moepack.plan_request import require_budget, within_device
from moepack.planner import Planner, rungs_below
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record
from moepack.units import MIB, short_size
from moepack.variants import contender_of, with_memory

#: Budgets of a sweep; a few more or fewer where the rungs make it so.
BUDGETS = 16

# What a doubling of the memory must gain more below a knee than above it.
_BEND = 1.1

# Times that differ by less are one.
_SAME = 0.01


@record
class SweepPoint:
    """One budget: what the plan for it takes, beside every strategy at that budget."""

    budget_bytes: int
    fast_used_bytes: int
    ttft_s: float
    tpot_s: float
    hit_rate: float
    chosen: str
    baselines: dict[str, Baseline]


@record
class Knee:
    """Where the curve of a sweep bends.

    Attributes
    ----------
    before, after : float
        What a doubling of the memory makes of the time of a token, below and above the knee:
        1.5 is one and a half times as fast.
    """

    budget_bytes: int
    before: float
    after: float


@record
class Sweep:
    """Plans for ascending budgets.

    Attributes
    ----------
    capacity_bytes : int or None
        What the machine has left for a model, where the sweep goes beyond it.
    asked_low_bytes : int or None
        Where the sweep was to begin, when that is too little for the model.
    """

    plans: tuple[Plan, ...]
    capacity_bytes: int | None = None
    asked_low_bytes: int | None = None

    @property
    def points(self) -> tuple[SweepPoint, ...]:
        """The figures of every plan, all of them on *test*."""
        return tuple(
            SweepPoint(
                budget_bytes=plan.placement.fast_budget_bytes,
                fast_used_bytes=plan.placement.memory.total_bytes,
                ttft_s=plan.prediction.ttft_s,
                tpot_s=plan.prediction.tpot_s,
                hit_rate=plan.prediction.hit_rate,
                chosen=plan.planner.chosen,
                baselines=plan.baselines,
            )
            for plan in self.plans
        )


def sweep_budgets(low_bytes: int, high_bytes: int, count: int = BUDGETS) -> list[int]:
    """About ``count`` budgets from low to high, evenly spread on a log scale.

    The planner's rungs in between are among them, unless they alone would be more than ``count``.
    """
    if low_bytes == high_bytes:
        return [low_bytes]
    rungs = [rung for rung in rungs_below(high_bytes) if rung > low_bytes]
    fixed = sorted({low_bytes, high_bytes, *(rungs if len(rungs) + 2 <= count else ())})
    step = math.log(high_bytes / low_bytes) / (count - 1)
    found = [low_bytes]
    for begin, end in pairwise(fixed):
        pieces = max(1, round(math.log(end / begin) / step))
        ratio = (end / begin) ** (1 / pieces)
        # Whole MiB where the range is wide enough for them.
        between = [begin * ratio**piece for piece in range(1, pieces)]
        found += [_round(size, step) for size in between]
        found.append(end)
    return sorted(set(found))


def sweep(
    planner: Planner, low_bytes: int, high_bytes: int, progress: Progress = NO_PROGRESS
) -> Sweep:
    """Plan for about sixteen budgets, as if the machine had so much memory.

    More memory is never priced slower on *select*: a plan for less memory stays where the planner
    finds no better one. On *test*, which is what the result tells, it may.

    Raises
    ------
    BudgetTooSmallError
        When not even the upper end is enough.
    """
    request = planner.request
    asked_bytes, low_bytes = low_bytes, max(low_bytes, _least_bytes(planner, low_bytes))
    low_bytes = min(low_bytes, high_bytes)
    free_bytes = within_device(replace(request, fast_budget_bytes=high_bytes)).fast_budget_bytes
    if free_bytes < high_bytes:
        planner = Planner(with_memory(request, high_bytes), planner.tables)
    budgets = sweep_budgets(low_bytes, high_bytes)
    plans: list[Plan] = []
    progress.start("plan for each budget", len(budgets), "items")
    try:
        for budget_bytes in budgets:
            plan = planner.plan(budget_bytes)
            if plans and _select_s(planner, plans[-1]) < _select_s(planner, plan):
                plan = _with_budget(plans[-1], plan)
            plans.append(plan)
            progress.advance(1)
    finally:
        progress.done()
    return Sweep(
        tuple(plans),
        capacity_bytes=free_bytes if free_bytes < high_bytes else None,
        asked_low_bytes=asked_bytes if asked_bytes < low_bytes else None,
    )


def shown_plan(swept: Sweep) -> Plan:
    """The plan that stands for a sweep: at its knee, else the least that is as fast as any."""
    bend = knee(swept.points)
    if bend is not None:
        return next(
            plan for plan in swept.plans if plan.placement.fast_budget_bytes == bend.budget_bytes
        )
    best_s = min(plan.prediction.tpot_s for plan in swept.plans)
    return next(plan for plan in swept.plans if plan.prediction.tpot_s <= best_s * (1 + _SAME))


def knee(points: Sequence[SweepPoint]) -> Knee | None:
    """The point that lies farthest below the chord of the curve, both axes logarithmic.

    None where there are fewer than three points, or where a doubling of the memory gains as much
    above as below it.
    """
    if len(points) < 3:
        return None
    across = [math.log2(point.budget_bytes) for point in points]
    up = [math.log2(point.tpot_s) for point in points]
    slope = (up[-1] - up[0]) / (across[-1] - across[0])
    below = [up[0] + slope * (x - across[0]) - y for x, y in zip(across, up, strict=True)]
    place = max(range(1, len(points) - 1), key=lambda index: below[index])
    before = 2 ** ((up[0] - up[place]) / (across[place] - across[0]))
    after = 2 ** ((up[place] - up[-1]) / (across[-1] - across[place]))
    if before < _BEND * after:
        return None
    return Knee(points[place].budget_bytes, before, after)


def knee_sentences(points: Sequence[SweepPoint]) -> list[str]:
    """Where the knee is, and from where on more memory gains nothing."""
    first, last = points[0], points[-1]
    if len(points) < 2:
        return []
    best_s = min(point.tpot_s for point in points)
    if first.tpot_s <= best_s * (1 + _SAME):
        ends = f"{short_size(first.budget_bytes)} to {short_size(last.budget_bytes)}"
        return [f"from {ends} more memory makes no token faster"]
    sentences = []
    found = knee(points)
    if found is None:
        doublings = math.log2(last.budget_bytes / first.budget_bytes)
        each = (first.tpot_s / last.tpot_s) ** (1 / doublings)
        sentences.append(
            f"there is no knee: a doubling of the memory makes a token {each:.2f} times as fast "
            "over the whole range"
        )
    else:
        sentences.append(
            f"the knee is at {short_size(found.budget_bytes)}: up to there a doubling of the "
            f"memory makes a token {found.before:.2f} times as fast, from there on "
            f"{found.after:.2f} times"
        )
    enough = next(point for point in points if point.tpot_s <= best_s * (1 + _SAME))
    if enough.budget_bytes < last.budget_bytes:
        sentences.append(
            f"beyond {short_size(enough.budget_bytes)} no more than {_SAME:.0%} is gained"
        )
    return sentences


def _least_bytes(planner: Planner, low_bytes: int) -> int:
    """The lower end, or the least whole MiB that the model fits in."""
    try:
        require_budget(replace(planner.request, fast_budget_bytes=low_bytes))
    except BudgetTooSmallError as failure:
        return -(-(low_bytes + failure.missing_bytes) // MIB) * MIB
    return low_bytes


def _select_s(planner: Planner, plan: Plan) -> float:
    return planner.total_s(planner.price(contender_of(planner.request, plan), "select"))


def _with_budget(smaller: Plan, larger: Plan) -> Plan:
    """A plan for less memory in place of one for more; the strategies stay those of the budget."""
    budget_bytes = larger.placement.fast_budget_bytes
    return replace(
        smaller,
        placement=replace(smaller.placement, fast_budget_bytes=budget_bytes),
        max_context_tokens=larger.max_context_tokens,
        baselines=larger.baselines,
    )


def _round(size_bytes: float, step: float) -> int:
    """To whole MiB, if that moves it by less than a tenth of a step."""
    whole = round(size_bytes / MIB) * MIB
    return whole if abs(whole - size_bytes) < 0.1 * step * size_bytes else round(size_bytes)
