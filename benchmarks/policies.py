"""The plan against the simple strategies, and against what was foretold, in real runs.

    moepack profile
    python -m benchmarks.policies --vram 26M 32M --window 0.1 0.3 1 2

For each link and budget the model is planned for this machine, and every strategy named is made a
plan of its own at the same budget. All of them are raced (:mod:`benchmarks.race`) after the prompts
of ``moepack bench``, on the link as it is and on throttled ones: ``window`` is the computing of a
layer over the transfer of all whole experts that a token uses there.

Printed are medians over the rounds:

- the speed of the plan over each strategy's, round by round, and the range of that;
- each token beside the plan's forecast, beside the replay of the very routing that was run, as it
  is and at the pace that processor and disk had meanwhile (:mod:`moepack.yardstick`,
  :mod:`benchmarks.link_pace`), and beside the larger of useful link bytes over bandwidth and
  computing at this pace;
- what crossed the link for a token: demanded, fetched ahead and used, fetched ahead and wasted.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from moepack_runtime.loading import open_packed

from benchmarks.link_pace import open_disk_pace
from benchmarks.options import Throttle, link_option, positive, size_option
from benchmarks.race import Raced, median, pack_for, race, ratio
from benchmarks.replays import replayed
from benchmarks.setting import (
    Setting,
    add_options,
    described,
    named,
    open_setting,
)
from moepack.budget import stored_bytes
from moepack.drift import compare, slowness
from moepack.errors import PlanError
from moepack.fixed_times import fixed_times
from moepack.formats import PackedModel
from moepack.layouts import uniform_layout
from moepack.plan import Plan
from moepack.planner import Planner
from moepack.replayed_run import record_run
from moepack.routing_tables import RoutingTables
from moepack.trace import Trace
from moepack.units import format_rate, format_size
from moepack.yardstick import Pace, Slowness

#: What the plan is measured against; more by name.
STRATEGIES = ("on_demand", "lru", "lru_prefetch", "prefetch_only", "uniform_half")

#: Where a profile has no yardstick: as fast as then.
_AS_PROFILED = Slowness(1.0, 1.0)

#: Of throttled links; a large transfer does not notice it.
LATENCY_S = 20e-6


class Line(NamedTuple):
    """One contender. Times are medians over the rounds.

    Attributes
    ----------
    plan_speed : tuple of float
        The plan's speed over the contender's, round by round: median, least, largest.
    replayed_tpot_s, replayed_ready_rate : float
        Of the replay of the routing that was run.
    slowness, disk_slowness : float
        How many times as long processor and disk took beside the tokens as when they were profiled.
    over_replay : float
        Time of a token over the replayed one at the pace of its round.
    bound_s : float
        The larger of the useful link bytes over the bandwidth, and the computing.
    bound_is_clear : bool
        The smaller of the two is under half of the larger.
    outside : tuple of str
        What was measured beyond the contender's band.
    """

    name: str
    plan_speed: tuple[float, float, float]
    ttft_s: float
    predicted_ttft_s: float
    tpot_s: float
    predicted_tpot_s: float
    replayed_tpot_s: float
    slowness: float
    disk_slowness: float
    over_replay: float
    bound_s: float
    bound_is_clear: bool
    hit_rate: float
    ready_rate: float
    replayed_ready_rate: float
    demand_bytes: float
    used_bytes: float
    wasted_bytes: float
    link_busy: float
    outside: tuple[str, ...]


class Cell(NamedTuple):
    """One budget over one link."""

    fast_budget_bytes: int
    link: Throttle | None
    window: float
    chosen: str
    band: float
    lines: list[Line]


def layer_seconds(setting: Setting, planner: Planner) -> tuple[float, float, int]:
    """Computing of a layer, transfer of all experts that a token uses in it, bytes of one."""
    spec, layer = setting.spec, setting.spec.moe_layers[0]
    fixed = fixed_times(spec, setting.compute, (1,))
    top_k = spec.moe(layer).top_k
    curve = setting.compute.layer(layer).expert
    assert curve is not None
    compute_s = statistics.fmean((fixed.before_s + fixed.after_s).tolist()) + top_k * curve.at(1)
    size_bytes = stored_bytes(spec, uniform_layout(spec, 1.0).layers[0], "top")
    return compute_s, top_k * planner.link(size_bytes), size_bytes


def throttle_for(setting: Setting, window: float) -> Throttle:
    """The link on which a layer's computing is so much of its experts' transfer."""
    probe = Planner(setting.request(_DEFAULTS, 1 << 62))
    compute_s, _, size_bytes = layer_seconds(setting, probe)
    top_k = setting.spec.moe(setting.spec.moe_layers[0]).top_k
    transfer_s = compute_s / (window * top_k)
    if transfer_s <= LATENCY_S:
        raise PlanError(
            f"--window {window}: the transfer of an expert would take {transfer_s * 1e6:.1f} us, "
            f"expected more than a throttled link's latency of {LATENCY_S * 1e6:.0f}; ask for a "
            "smaller one"
        )
    return size_bytes / (transfer_s - LATENCY_S), LATENCY_S


_DEFAULTS = argparse.Namespace(context=1024, prompt=256, new=128)


def lines_of(
    setting: Setting, planner: Planner, plans: dict[str, Plan], found: Raced, run: Trace
) -> list[Line]:
    """Medians beside forecasts and replays; the first contender is the plan."""
    own = next(iter(found.runs.values()))
    lines = []
    for name, runs in found.runs.items():
        plan = plans[name]
        as_profiled = replayed(setting, planner, plan, run)
        paces = found.paces[name]
        pace = Pace(*(statistics.median(seconds) for seconds in zip(*paces, strict=True)))
        slow = [(slowness(plan.prediction, each) or _AS_PROFILED).token for each in paces]
        over = [
            (each.tpot_s or 0.0)
            / replayed(setting, planner, plan, run, slower=own, disk_slower=disk).tpot_s
            for each, own, disk in zip(runs, slow, found.disk_slowness, strict=True)
        ]
        slower, disk_slower = statistics.median(slow), statistics.median(found.disk_slowness)
        compute_s = float(as_profiled.tpot_s - as_profiled.layer_wait_s.sum()) * slower
        used_bytes = median(runs, lambda run: run.ahead_used_bytes_per_token)
        demand_bytes = median(runs, lambda run: run.demand_bytes_per_token)
        size_bytes = max(1, round(median(runs, lambda run: run.mean_read_bytes)))
        transfer_s = planner.link(size_bytes) * disk_slower
        useful_s = float((demand_bytes + used_bytes) * transfer_s / size_bytes)
        fields = ("ttft_s", "tpot_s", "hit_rate", "ready_rate", "link_bytes_per_token")
        medians = {field: median(runs, attrgetter(field)) for field in fields}
        drifts = compare(plan.prediction, medians, pace)
        lines.append(
            Line(
                name=name,
                plan_speed=ratio(runs, own, lambda run: run.tpot_s),
                ttft_s=medians["ttft_s"],
                predicted_ttft_s=plan.prediction.ttft_s,
                tpot_s=medians["tpot_s"],
                predicted_tpot_s=plan.prediction.tpot_s,
                replayed_tpot_s=as_profiled.tpot_s,
                slowness=slower,
                disk_slowness=disk_slower,
                over_replay=statistics.median(over),
                bound_s=max(useful_s, compute_s),
                bound_is_clear=min(useful_s, compute_s) < max(useful_s, compute_s) / 2,
                hit_rate=medians["hit_rate"],
                ready_rate=medians["ready_rate"],
                replayed_ready_rate=as_profiled.ready_rate,
                demand_bytes=demand_bytes,
                used_bytes=used_bytes,
                wasted_bytes=median(runs, lambda run: run.ahead_wasted_bytes_per_token),
                link_busy=median(runs, lambda run: run.link_busy_fraction),
                outside=tuple(metric for metric, drift in drifts.items() if not drift.in_band),
            )
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every link and budget."""
    return named(_run, _parser().parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    setting = open_setting(args.model, args.prompt)
    links = [*args.link, *(throttle_for(setting, window) for window in args.window)]
    cells: list[Cell] = []
    tables: RoutingTables | None = None
    with (
        setting.calibration or nullcontext(),
        tempfile.TemporaryDirectory(dir=args.scratch, prefix="policies.") as scratch,
    ):
        for throttle in links:
            planner = Planner(setting.request(args, max(args.vram), throttle), tables)
            tables = planner.tables
            for budget_bytes in args.vram:
                plans = {"plan": planner.plan(budget_bytes)}
                strategies = planner.strategies(budget_bytes)
                plans |= _asked(args.strategies, strategies, plans["plan"])
                folders = pack_for(setting.checkpoint, plans, Path(scratch))
                own = plans["plan"]
                compute_s, transfer_s, _ = layer_seconds(setting, planner)
                folder = folders[own.layout.digest]
                with open_disk_pace(folder, setting.hardware, throttle) as disk:
                    found = race(plans, folders, setting.prompts, args.new, args.rounds, disk)
                with open_packed(PackedModel.open(folder), own) as engine:
                    run = record_run(engine, setting.prompts, args.new)
                lines = lines_of(setting, planner, plans, found, run)
                cells.append(
                    Cell(
                        fast_budget_bytes=budget_bytes,
                        link=throttle,
                        window=compute_s / transfer_s,
                        chosen=own.planner.chosen,
                        band=own.prediction.band,
                        lines=lines,
                    )
                )
                _print_table(cells[-1])
    rows = [cell._asdict() | {"lines": [line._asdict() for line in cell.lines]} for cell in cells]
    print(json.dumps(described(args) | {"cells": rows}))
    return 0


def _asked(
    names: Sequence[str], strategies: Mapping[str, Plan], own: Plan
) -> Iterator[tuple[str, Plan]]:
    """Those of the named strategies that this engine can run; why another cannot is told."""
    for name in names:
        if name in strategies:
            yield name, strategies[name]
        elif name in own.baselines:
            print(f"{name}: left out, {own.baselines[name].why_not or 'a bound'}", file=sys.stderr)
        else:
            raise PlanError(
                f"--strategies {name}: there is none of that name, expected some of "
                f"{', '.join(own.baselines)}"
            )


def _print_table(cell: Cell) -> None:
    rate = "as it is" if cell.link is None else format_rate(cell.link[0])
    print(
        f"\n{format_size(cell.fast_budget_bytes)}, link {rate}, window {cell.window:.2f}, the plan "
        f"is {cell.chosen}, band {cell.band:.2f}\n"
    )
    print(
        "| | plan over it | first token, predicted | each token, predicted, replayed "
        "| over replay | processor, disk | at this pace | over bound | ready, replayed "
        "| demanded, used, wasted | link busy | |"
    )
    print("| --- " * 12 + "|")
    for line in cell.lines:
        speed, least, most = line.plan_speed
        over_bound = line.tpot_s / line.bound_s if line.bound_s else 0.0
        sizes = (line.demand_bytes, line.used_bytes, line.wasted_bytes)
        print(
            f"| {line.name} | {speed:.2f} ({least:.2f} to {most:.2f}) "
            f"| {line.ttft_s * 1e3:.0f} ms, {line.predicted_ttft_s * 1e3:.0f} "
            f"| {line.tpot_s * 1e3:.2f} ms, {line.predicted_tpot_s * 1e3:.2f}, "
            f"{line.replayed_tpot_s * 1e3:.2f} | {line.tpot_s / line.replayed_tpot_s:.2f} "
            f"| {line.slowness:.2f}, {line.disk_slowness:.2f} | {line.over_replay:.2f} "
            f"| {over_bound:.2f}{'' if line.bound_is_clear else ' (near)'} "
            f"| {line.ready_rate:.1%}, {line.replayed_ready_rate:.1%} "
            f"| {', '.join(map(format_size, sizes))} | {line.link_busy:.0%} "
            f"| {'outside: ' + ', '.join(line.outside) if line.outside else 'in band'} |"
        )
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--vram", type=size_option, nargs="+", required=True, metavar="SIZE")
    parser.add_argument(
        "--link",
        type=link_option,
        nargs="+",
        default=[None],
        metavar="LINK",
        help="as in 120M,50us or sata; none: as it is",
    )
    parser.add_argument(
        "--window",
        type=positive,
        nargs="+",
        default=[],
        metavar="RATIO",
        help="throttled links on which a layer's computing is so much of its experts' transfer",
    )
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), metavar="NAME")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
