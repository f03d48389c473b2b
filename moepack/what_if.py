"""What one would gain: the same model planned anew for machines that have more of something."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from moepack.plan import Plan
from moepack.plan_request import PlanRequest
from moepack.planner import Planner
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record
from moepack.units import format_duration, short_size
from moepack.variants import (
    is_resident,
    resident_bytes,
    with_compute,
    with_disk,
    with_link,
    with_memory,
    with_ram,
)

#: What the table asks: more memory, a faster link, a faster processor.
MORE_MEMORY = (1.25, 1.5, 2.0)
FASTER_LINK = (1.5, 2.0, 4.0)
FASTER_COMPUTE = (2.0,)

#: Ratios nearer to 1 than this are told as no change.
SAME = 0.01

#: Where RAM does not hold all that a device has not.
MORE_RAM = (1.5, 2.0)
FASTER_DISK = (2.0,)

Change = Literal["memory", "link", "compute", "ram", "disk"]


@record
class WhatIf:
    """The same model on another machine, planned anew.

    Attributes
    ----------
    factor : float
        How much more of it.
    gain : float
        The time of a token now over the time then: 1.5 is one and a half times as fast.
    """

    change: Change
    factor: float
    fast_budget_bytes: int
    ttft_s: float
    tpot_s: float
    hit_rate: float
    gain: float
    text: str


def what_if(planner: Planner, plan: Plan, progress: Progress = NO_PROGRESS) -> Iterator[WhatIf]:
    """Plan anew for every other machine that could make a difference.

    Where every expert is resident, neither memory nor link can.
    """
    budget_bytes = plan.placement.fast_budget_bytes
    request = with_memory(planner.request, budget_bytes)
    changes: list[tuple[Change, float, PlanRequest]] = []
    if not is_resident(plan):
        ceiling_bytes = max(budget_bytes, resident_bytes(request))
        sizes = sorted({min(round(budget_bytes * more), ceiling_bytes) for more in MORE_MEMORY})
        most = with_memory(request, sizes[-1])
        changes += [
            ("memory", size / budget_bytes, replace(most, fast_budget_bytes=size))
            for size in sizes
            if size > budget_bytes
        ]
        changes += [("link", more, with_link(request, more)) for more in FASTER_LINK]
        if plan.placement.host is not None and plan.placement.host.bounces:
            changes += [("ram", more, with_ram(request, more)) for more in MORE_RAM]
            changes += [("disk", more, with_disk(request, more)) for more in FASTER_DISK]
    changes += [("compute", more, with_compute(request, more)) for more in FASTER_COMPUTE]
    planners: dict[object, Planner] = {}
    progress.start("plan for other machines", len(changes), "items")
    try:
        for change, factor, other in changes:
            key = change, None if change == "memory" else factor
            if key not in planners:
                planners[key] = Planner(other, planner.tables)
            size = other.fast_budget_bytes if change == "memory" else budget_bytes
            found = planners[key].plan(size)
            yield _row(change, factor, plan, found)
            progress.advance(1)
    finally:
        progress.done()


def _row(change: Change, factor: float, plan: Plan, found: Plan) -> WhatIf:
    now, then = plan.prediction, found.prediction
    budget_bytes = found.placement.fast_budget_bytes
    if change == "memory":
        name = f"{short_size(plan.placement.fast_budget_bytes)} -> {short_size(budget_bytes)}"
        name += ", all resident" if is_resident(found) else ""
    else:
        name = f"{change} {factor:.3g}x"
    gain = now.tpot_s / then.tpot_s
    new, old = format_duration(then.tpot_s), format_duration(now.tpot_s)
    if abs(gain - 1) < SAME:
        text = f"{name}: {new}, as now"
    else:
        text = f"{name}: {new} instead of {old}{times(now.tpot_s, then.tpot_s)}"
    return WhatIf(change, factor, budget_bytes, then.ttft_s, then.tpot_s, then.hit_rate, gain, text)


def times(now_s: float, then_s: float) -> str:
    """``, 1.5 times``; nothing where the two are the same."""
    gain = now_s / then_s
    return "" if abs(gain - 1) < SAME else f", {gain:.2f} times"
