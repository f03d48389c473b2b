"""The replay of what a benchmark ran, on the machine as it was profiled or as it was meanwhile."""

from __future__ import annotations

from benchmarks.setting import Setting
from moepack.compute_rounds import at_pace
from moepack.plan import Plan
from moepack.planner import Planner
from moepack.replayed import Replayed
from moepack.replayed_run import mean_of, replay_run
from moepack.trace import Trace


def replayed(
    setting: Setting,
    planner: Planner,
    plan: Plan,
    run: Trace,
    *,
    slower: float = 1.0,
    disk_slower: float = 1.0,
) -> Replayed:
    """The mean over the generations behind the warm-up.

    Parameters
    ----------
    run
        From :func:`moepack.replayed_run.record_run`.
    slower, disk_slower
        How many times as long processor and link take as when they were profiled.
    """
    compute = at_pace(setting.compute, slower)

    def link(size_bytes: int) -> float:
        return planner.link(size_bytes) * disk_slower

    replays = replay_run(setting.spec, compute, link, plan.layout, plan.placement, run)
    return mean_of(replays[len(setting.prompts) :])
