"""Fewer bits for each expert: size, quality, and speed at the same budget.

    moepack profile --bits
    python -m benchmarks.precision --vram 12M 16M --plan "" "--quality int8" "--quality int4"

Each ``--plan`` is what ``moepack plan`` is told beside model, budget and context. It is packed, and
scored once on the texts that ship (``moepack eval``), and by how far it goes along with the greedy
text of the first plan (:mod:`benchmarks.greedy`); at every budget all of them are raced
(:mod:`benchmarks.race`) after the prompts of ``moepack bench``. Printed are medians over rounds,
speeds over that of the first plan round by round, what was predicted, also at the processor's speed
meanwhile (:mod:`moepack.yardstick`), and quality with 95 % intervals. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from moepack_runtime.loading import open_packed

from benchmarks.greedy import Agreement, agreement, greedy_texts
from benchmarks.options import at_least, size_option
from benchmarks.race import Raced, median, pack_for, race, ratio
from benchmarks.setting import Setting, add_options, described, named, open_setting
from moepack.drift import slowness, stretched_s
from moepack.evaluating import evaluate
from moepack.formats import PackedModel
from moepack.plan import Plan, load_plan
from moepack.quality import Estimate, Quality
from moepack.shipped import shipped_texts
from moepack.texts import read_texts
from moepack.units import format_size
from moepack.yardstick import Pace


class Stored(NamedTuple):
    """What a plan's pack takes on disk, and how good it is."""

    experts_bytes: int
    quality: Quality


def plan_with(told: str, args: argparse.Namespace, budget_bytes: int, folder: Path) -> Plan:
    """As ``moepack plan`` has it, the current plan left alone."""
    out = folder / "plan.json"
    command = [sys.executable, "-m", "moepack", "plan", args.model, "--vram", str(budget_bytes)]
    command += ["--context", str(args.context), "--prompt", str(args.prompt)]
    command += ["--new", str(args.new), "--out", str(out), *shlex.split(told)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return load_plan(out)


def stored(
    setting: Setting, plan: Plan, folder: Path, scratch: Path, most_tokens: int | None
) -> Stored:
    """Score a pack on the texts that ship, or on so many tokens of each."""
    packed = PackedModel.open(folder)
    found = evaluate(
        packed,
        plan,
        read_texts(shipped_texts()),
        exact=setting.checkpoint,
        sources=setting.routing.summary.sources,
        scratch=scratch,
        most_tokens=most_tokens,
    )
    size_bytes = sum(entry.stored_bytes for entry in packed.entries.values())
    return Stored(size_bytes, found.quality)


def compare_greedy(
    plans: dict[str, Plan],
    folders: dict[str, Path],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> dict[str, Agreement]:
    """Every plan beside the greedy text of the first, after the prompts of ``moepack bench``."""
    texts: list[list[int]] = []
    found = {}
    for told, plan in plans.items():
        with open_packed(PackedModel.open(folders[plan.layout.digest]), plan) as engine:
            texts = texts or greedy_texts(engine, prompts, new_tokens)
            found[told] = agreement(engine, prompts, texts)
    return found


def _interval(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _print_quality(found: dict[str, Stored]) -> None:
    print("\n| | experts | perplexity | KL, nats | same first choice |")
    print("| --- | --- | --- | --- | --- |")
    for told, (size_bytes, quality) in found.items():
        near = quality.nearness
        assert near is not None, "the exact model was at hand"
        print(
            f"| {told or 'exact'} | {format_size(size_bytes)} | {_interval(quality.perplexity, 3)} "
            f"| {_interval(near.kl, 5)} | {_interval(near.top1_agreement, 4)} |"
        )
    sys.stdout.flush()


def _print_greedy(found: dict[str, Agreement]) -> None:
    tokens = next(iter(found.values())).tokens
    print(f"\ngreedy text of the first, {tokens} tokens\n")
    print("| | same choice, given the text | goes along with each text for |")
    print("| --- | --- | --- |")
    for told, each in found.items():
        lengths = ", ".join(map(str, each.along))
        print(f"| {told or 'exact'} | {each.same:.4f} | {lengths} tokens |")
    sys.stdout.flush()


def expected_tpot_s(plan: Plan, paces: Sequence[Pace]) -> float:
    """A token as predicted, on a processor as fast as it was meanwhile: median of the rounds."""
    slow = (slowness(plan.prediction, pace) for pace in paces)
    whole_s, wait_s = plan.prediction.tpot_s, plan.prediction.tpot_wait_s
    return statistics.median(
        whole_s if each is None else stretched_s(whole_s, wait_s, each.token) for each in slow
    )


def _print_speed(budget_bytes: int, plans: dict[str, Plan], found: Raced) -> None:
    first = next(iter(found.runs.values()))
    print(f"\n{format_size(budget_bytes)} of fast memory\n")
    print("| | tokens/s | predicted | at this pace | over the first | hit rate | link a token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for told, runs in found.runs.items():
        middle, least, most = ratio(first, runs, lambda run: run.tpot_s)
        print(
            f"| {told or 'exact'} | {1 / median(runs, lambda run: run.tpot_s):.1f} "
            f"| {plans[told].prediction.tokens_per_s:.1f} "
            f"| {1 / expected_tpot_s(plans[told], found.paces[told]):.1f} "
            f"| {middle:.2f} ({least:.2f} to {most:.2f}) "
            f"| {median(runs, lambda run: run.hit_rate):.1%} "
            f"| {format_size(round(median(runs, lambda run: run.link_bytes_per_token)))} |"
        )
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of quality, and one of speed for every budget."""
    return named(_run, _parser().parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    setting = open_setting(args.model, args.prompt)
    scored: dict[str, Stored] = {}
    along: dict[str, Agreement] = {}
    speeds: list[dict[str, object]] = []
    with (
        setting.calibration or nullcontext(),
        tempfile.TemporaryDirectory(dir=args.scratch, prefix="precision.") as scratch,
    ):
        folder = Path(scratch)
        for budget_bytes in args.vram:
            plans = {told: plan_with(told, args, budget_bytes, folder) for told in args.plan}
            folders = pack_for(setting.checkpoint, plans, folder, setting.calibration)
            if not scored and not args.no_eval:
                for told, plan in plans.items():
                    packed = folders[plan.layout.digest]
                    scored[told] = stored(setting, plan, packed, folder, args.score)
                _print_quality(scored)
                along = compare_greedy(plans, folders, setting.prompts, args.greedy)
                _print_greedy(along)
            found = race(plans, folders, setting.prompts, args.new, args.rounds)
            _print_speed(budget_bytes, plans, found)
            for told, runs in found.runs.items():
                tpot_s = median(runs, lambda run: run.tpot_s)
                predicted_s = plans[told].prediction.tpot_s
                speeds.append(
                    {
                        "budget_bytes": budget_bytes,
                        "plan": told,
                        "tpot_s": tpot_s,
                        "predicted_tpot_s": predicted_s,
                        "expected_tpot_s": expected_tpot_s(plans[told], found.paces[told]),
                    }
                )
    rows = {
        told: {
            "experts_bytes": size_bytes,
            "perplexity": quality.perplexity.value,
            "kl": quality.nearness.kl.value if quality.nearness else None,
        }
        for told, (size_bytes, quality) in scored.items()
    }
    greedy = {told: each._asdict() for told, each in along.items()}
    print(json.dumps(described(args) | {"quality": rows, "greedy": greedy, "speed": speeds}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--vram", type=size_option, nargs="+", required=True, metavar="SIZE")
    parser.add_argument(
        "--plan",
        nargs="+",
        default=["", "--quality int8", "--quality int4"],
        metavar="OPTIONS",
        help="of moepack plan, each in one string; an empty one for the exact model",
    )
    parser.add_argument(
        "--score", type=at_least(1), metavar="TOKENS", help="of each text; default: all that may be"
    )
    parser.add_argument(
        "--greedy",
        type=at_least(1),
        default=256,
        metavar="TOKENS",
        help="of greedy text after each prompt",
    )
    parser.add_argument("--no-eval", action="store_true", help="measure speed alone")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
