"""How near steady decoding comes to what the link gives, and to what no engine could beat.

    moepack profile MODEL
    python -m benchmarks.link --model MODEL --share 0.3 0.5 0.7

For each budget, a share of what the model takes when all of it is in the fast tier, the model is
planned and run after the prompts of ``moepack bench``. Medians over the rounds of

- bytes over the link by the wall clock, over what the profile measured for transfers of that size:
  1 is a link that is never idle, in decoding that the link limits; the same for a disk as slow as
  it was meanwhile (:mod:`benchmarks.link_pace`);
- bytes over the link by the time during which it had work, over what the profile measured;
- each token over the replay of the very routing that was run: with processor and disk as they were
  profiled, and as they were meanwhile (:mod:`moepack.yardstick`). What is left then is the
  engine's;
- each token over the replay's bound: a clairvoyant cache and a perfect prediction.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from moepack_runtime.loading import open_packed

from benchmarks.link_pace import open_disk_pace
from benchmarks.options import link_option, positive
from benchmarks.race import Raced, median, pack_for, race
from benchmarks.replays import replayed
from benchmarks.setting import Setting, add_options, described, named, open_setting
from moepack.drift import slowness
from moepack.formats import PackedModel
from moepack.needs import needs
from moepack.plan import Plan
from moepack.planner import Planner
from moepack.replayed_run import record_run
from moepack.trace import Trace
from moepack.units import format_rate, format_size


class Line(NamedTuple):
    """One budget.

    Attributes
    ----------
    used_of_link, used_of_link_now : float
        Bytes over the link a second of decoding, over the link's own rate; and over the disk's
        meanwhile.
    efficiency : float
        Bytes over the link a second during which it had work, over the link's own rate.
    over_replay, over_replay_now : float
        A token's time over that of the replay of what was run, and over that with processor and
        disk as fast as they were.
    slowness, disk_slowness : float
        How many times as long processor and disk took as when they were profiled.
    over_bound : float
        A token's time over that of a clairvoyant cache with a perfect prediction.
    """

    share: float
    fast_budget_bytes: int
    chosen: str
    depth: int
    tpot_s: float
    predicted_tpot_s: float
    hit_rate: float
    ready_rate: float
    recall: float
    link_bytes_per_token: float
    wasted_bytes_per_token: float
    link_bytes_per_s: float
    used_of_link: float
    used_of_link_now: float
    efficiency: float
    link_busy: float
    over_replay: float
    over_replay_now: float
    slowness: float
    disk_slowness: float
    over_bound: float


def line_of(
    setting: Setting, planner: Planner, share: float, plan: Plan, found: Raced, run: Trace
) -> Line:
    """What the rounds of one budget say."""
    runs = found.runs["plan"]
    size_bytes = max(1, round(median(runs, lambda run: run.mean_read_bytes)))
    rate = size_bytes / planner.link(size_bytes)
    tpot_s = median(runs, lambda run: run.tpot_s)
    bytes_per_token = median(runs, lambda run: run.link_bytes_per_token)
    efficiency = float(median(runs, lambda run: run.link_bytes_per_s) / rate)
    paces = (slowness(plan.prediction, pace) for pace in found.paces["plan"])
    slower = statistics.median(1.0 if pace is None else pace.token for pace in paces)
    disk_slower = statistics.median(found.disk_slowness)
    used_of_link = float(bytes_per_token / tpot_s / rate)
    as_profiled = replayed(setting, planner, plan, run)
    meanwhile = replayed(setting, planner, plan, run, slower=slower, disk_slower=disk_slower)
    return Line(
        share=share,
        fast_budget_bytes=plan.placement.fast_budget_bytes,
        chosen=plan.planner.chosen,
        depth=max(place.prefetch_depth for place in plan.placement.layers),
        tpot_s=tpot_s,
        predicted_tpot_s=plan.prediction.tpot_s,
        hit_rate=median(runs, lambda run: run.hit_rate),
        ready_rate=median(runs, lambda run: run.ready_rate),
        recall=median(runs, lambda run: run.recall),
        link_bytes_per_token=bytes_per_token,
        wasted_bytes_per_token=median(runs, lambda run: run.ahead_wasted_bytes_per_token),
        link_bytes_per_s=bytes_per_token / tpot_s,
        used_of_link=used_of_link,
        used_of_link_now=used_of_link * disk_slower,
        efficiency=efficiency,
        link_busy=median(runs, lambda run: run.link_busy_fraction),
        over_replay=float(tpot_s / as_profiled.tpot_s),
        over_replay_now=float(tpot_s / meanwhile.tpot_s),
        slowness=slower,
        disk_slowness=disk_slower,
        over_bound=tpot_s / plan.baselines["belady"].tpot_s,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, a line for every budget."""
    return named(_run, _parser().parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    setting = open_setting(args.model, args.prompt)
    whole_bytes = needs(setting.spec, args.context).resident_bytes
    planner = Planner(setting.request(args, whole_bytes, args.link))
    lines = []
    print(
        "| share | budget | plan | each token, predicted | hits | ready | recall | link, a token "
        "| of it wasted | over the link | of the link's rate, as it was | while it had work | busy "
        "| over the replay | processor, disk | as they were | over the bound |"
    )
    print("| --- " * 17 + "|")
    with (
        setting.calibration or nullcontext(),
        tempfile.TemporaryDirectory(dir=args.scratch, prefix="link.") as scratch,
    ):
        for share in args.share:
            plan = planner.plan(round(share * whole_bytes))
            folders = pack_for(setting.checkpoint, {"plan": plan}, Path(scratch))
            folder = folders[plan.layout.digest]
            with open_disk_pace(folder, setting.hardware, args.link) as disk:
                found = race({"plan": plan}, folders, setting.prompts, args.new, args.rounds, disk)
            with open_packed(PackedModel.open(folder), plan, link=plan.link) as engine:
                run = record_run(engine, setting.prompts, args.new)
            lines.append(line_of(setting, planner, share, plan, found, run))
            _print_line(lines[-1])
    print(json.dumps(described(args) | {"lines": [line._asdict() for line in lines]}))
    return 0


def _print_line(line: Line) -> None:
    print(
        f"| {line.share:.0%} | {format_size(line.fast_budget_bytes)} "
        f"| {line.chosen}, {line.depth} ahead "
        f"| {line.tpot_s * 1e3:.1f} ms, {line.predicted_tpot_s * 1e3:.1f} "
        f"| {line.hit_rate:.1%} | {line.ready_rate:.1%} | {line.recall:.1%} "
        f"| {format_size(line.link_bytes_per_token)} | {format_size(line.wasted_bytes_per_token)} "
        f"| {format_rate(line.link_bytes_per_s)} "
        f"| {line.used_of_link:.2f}, {line.used_of_link_now:.2f} | {line.efficiency:.2f} "
        f"| {line.link_busy:.0%} | {line.over_replay:.2f} "
        f"| {line.slowness:.2f}, {line.disk_slowness:.2f} "
        f"| {line.over_replay_now:.2f} | {line.over_bound:.2f} |"
    )
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--share",
        type=positive,
        nargs="+",
        default=[0.3, 0.5, 0.7],
        metavar="SHARE",
        help="budgets, as shares of what the whole model takes",
    )
    parser.add_argument("--link", type=link_option, metavar="LINK", help="as in 120M,50us")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
