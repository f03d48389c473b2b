"""Plans and what they promise, against what they and the simple strategies do.

    moepack profile
    python -m benchmarks.forecast --vram 26M 32M 40M --link none 400M,50us 120M,50us

For each budget and link the current model is planned for this machine, and every strategy that the
engine can run is made a plan of its own. All of them are raced (:mod:`benchmarks.race`): the
prompts are those of ``moepack bench``. Printed are medians over the rounds beside the forecasts,
whether the plan's lie in its band, and the plan's speed over each strategy's in the same round.

``window`` is what of a layer's computing could hide a transfer, over the transfer of all experts
that a token uses there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import typer
from moepack_runtime.capabilities import CAPABILITIES
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.race import Rounds, pack_for, race
from moepack.budget import stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.cli.models import open_source
from moepack.cli.options import link, size
from moepack.compute import load_compute
from moepack.drift import compare
from moepack.errors import MoepackError, WorkspaceError
from moepack.fixed_times import fixed_times
from moepack.hardware import load_hardware
from moepack.layouts import uniform_layout
from moepack.measuring import shipped_prompts
from moepack.plan import Plan
from moepack.plan_request import PlanRequest
from moepack.planner import Planner
from moepack.routing import load_routing
from moepack.routing_tables import RoutingTables
from moepack.shipped import shipped_model
from moepack.units import format_size
from moepack.workspace import Workspace


class Line(NamedTuple):
    """One contender: forecasts beside medians.

    ``speedup`` is the plan's speed over the contender's, round by round; ``outside`` names what was
    measured beyond the contender's band.
    """

    name: str
    predicted_ttft_s: float
    ttft_s: float
    predicted_tpot_s: float
    tpot_s: float
    predicted_hit_rate: float
    hit_rate: float
    speedup: float
    outside: tuple[str, ...]


def request_of(args: argparse.Namespace, throttle: tuple[float, float] | None) -> PlanRequest:
    """What ``moepack plan`` would ask for the shipped model on this machine."""
    workspace = Workspace.locate()
    source = open_source(workspace, "default", headers_only=True)
    folder = workspace.find(source.record.key)
    if folder is None or not folder.compute_path.exists():
        raise WorkspaceError("the shipped model has no profile here; run moepack profile")
    hardware = load_hardware(workspace.hardware_path)
    return PlanRequest(
        spec=source.spec,
        hardware=hardware,
        hardware_is_this_machine=True,
        compute=load_compute(folder.compute_path),
        routing=load_routing(folder.routing_path),
        engine=CAPABILITIES,
        device=hardware.device,
        fast_budget_bytes=max(args.vram),
        context_tokens=args.context,
        prompt_tokens=args.prompt,
        new_tokens=args.new,
        link=throttle,
    )


def window_share(planner: Planner) -> float:
    """Computing before the routing of a layer, over the transfer of all that a token uses."""
    request = planner.request
    layer = request.spec.moe_layers[0]
    whole = uniform_layout(request.spec, 1.0).layers[0]
    before_s = statistics.fmean(fixed_times(request.spec, request.compute, (1,)).before_s.tolist())
    transfer_s = planner.link(stored_bytes(request.spec, whole, "top"))
    return before_s / (request.spec.moe(layer).top_k * transfer_s)


def lines_of(plans: dict[str, Plan], found: Rounds) -> list[Line]:
    """Medians beside forecasts; the first contender is the plan."""
    own = next(iter(found.values()))
    lines = []
    for name, runs in found.items():
        promised = plans[name].prediction
        medians = {
            field: statistics.median(getattr(run, field) or 0.0 for run in runs)
            for field in ("ttft_s", "tpot_s", "hit_rate", "ready_rate", "link_bytes_per_token")
        }
        drifts = compare(promised, medians)
        lines.append(
            Line(
                name=name,
                predicted_ttft_s=promised.ttft_s,
                ttft_s=medians["ttft_s"],
                predicted_tpot_s=promised.tpot_s,
                tpot_s=medians["tpot_s"],
                predicted_hit_rate=promised.hit_rate,
                hit_rate=medians["hit_rate"],
                speedup=statistics.median(
                    (other.tpot_s or 0.0) / (run.tpot_s or 1.0)
                    for run, other in zip(own, runs, strict=True)
                ),
                outside=tuple(metric for metric, drift in drifts.items() if not drift.in_band),
            )
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every budget and link, or with ``--json`` one object."""
    args = _parser().parse_args(arguments)
    try:
        return _run(args)
    except MoepackError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    checkpoint = Checkpoint.open(str(shipped_model()))
    prompts = shipped_prompts(Tokenizer.load(shipped_model()), args.prompt)
    cells: list[dict[str, object]] = []
    tables: RoutingTables | None = None
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="forecast.") as scratch:
        for throttle in args.link:
            planner = Planner(request_of(args, throttle), tables)
            tables = planner.tables
            for budget_bytes in args.vram:
                plans = {"plan": planner.plan(budget_bytes)}
                plans |= planner.strategies(budget_bytes)
                folders = pack_for(checkpoint, plans, Path(scratch))
                found = race(plans, folders, prompts, args.new, args.rounds)
                lines = lines_of(plans, found)
                cells.append(
                    {
                        "fast_budget_bytes": budget_bytes,
                        "link": throttle,
                        "window_share": window_share(planner),
                        "chosen": plans["plan"].planner.chosen,
                        "band": plans["plan"].prediction.band,
                        "contenders": [line._asdict() for line in lines],
                    }
                )
                if not args.json:
                    _print_table(cells[-1], lines)
    if args.json:
        print(json.dumps({"cells": cells}, default=str))
    return 0


def _print_table(cell: dict[str, object], lines: Sequence[Line]) -> None:
    budget_bytes = cell["fast_budget_bytes"]
    assert isinstance(budget_bytes, int)
    print(
        f"\n{format_size(budget_bytes)}, link {cell['link'] or 'as it is'}, window "
        f"{cell['window_share']:.2f}, the plan is {cell['chosen']}, band {cell['band']:.2f}"
    )
    print("| | first token, predicted | each token, predicted | hits, predicted | plan over it | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print(
            f"| {line.name} | {line.ttft_s * 1e3:.0f} ms, {line.predicted_ttft_s * 1e3:.0f} "
            f"| {line.tpot_s * 1e3:.2f} ms, {line.predicted_tpot_s * 1e3:.2f} "
            f"| {line.hit_rate:.1%}, {line.predicted_hit_rate:.1%} | {line.speedup:.2f} "
            f"| {'outside: ' + ', '.join(line.outside) if line.outside else 'in band'} |"
        )
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vram", type=size, nargs="+", required=True, metavar="SIZE")
    parser.add_argument(
        "--link",
        type=_link,
        nargs="+",
        default=[None],
        metavar="LINK",
        help="as in 120M,50us or sata; none: as it is",
    )
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--new", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("/var/tmp"),
        metavar="DIR",
        help="on the disk that is to be measured",
    )
    parser.add_argument("--json", action="store_true")
    return parser


def _link(text: str) -> tuple[float, float] | None:
    if text == "none":
        return None
    try:
        return link(text)
    except typer.BadParameter as failure:
        raise argparse.ArgumentTypeError(str(failure)) from None


if __name__ == "__main__":
    sys.exit(main())
