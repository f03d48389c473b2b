"""Cache policies measured against each other, at equal budgets.

    python -m benchmarks.policies --cached 0.125 0.25 0.5 --link 100M,100us

For each budget every contender is a plan; in each round all of them begin anew, their caches as
planned, and take turns (:mod:`benchmarks.race`) with the prompts of ``moepack bench``. Printed are
medians over the rounds, and of each contender's speed over the first one's in the same round.

The experts are whole. The hot rankings are recorded on the beginnings of the texts whose ends are
the prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import typer
from moepack_runtime.loading import open_checkpoint
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.race import Row, pack_for, race, summary
from moepack import machine
from moepack.budget import memory_breakdown, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.cli.options import link
from moepack.errors import MoepackError
from moepack.layouts import uniform_layout
from moepack.measuring import shipped_prompts
from moepack.model_spec import ModelSpec
from moepack.plan import (
    PLAN_VERSION,
    LayerPlacement,
    Layout,
    Placement,
    Plan,
    PlannerReport,
    Policy,
    Prediction,
    Provenance,
    SharedPool,
)
from moepack.profiling import SEQUENCE_TOKENS, read_texts, record_routing
from moepack.shipped import shipped_model, shipped_texts
from moepack.trace import activation_counts, hot_ranking
from moepack.units import format_size

Rankings = Mapping[int, tuple[int, ...]]


class Setting(NamedTuple):
    """What all contenders have in common."""

    spec: ModelSpec
    layout: Layout
    hot: Rankings
    prompt_tokens: int
    new_tokens: int
    threads: int
    link: tuple[float, float] | None


def contenders(setting: Setting, slots: int) -> dict[str, Plan]:
    """The simple strategies, at the budget of ``slots`` whole experts a layer."""
    layers = len(setting.layout.layers)
    budget_bytes = _placement(setting, slots=slots, policy="lru").memory.total_bytes
    placements = {
        "on_demand": _placement(setting, slots=0, policy="lru"),
        "lru": _placement(setting, slots=slots, policy="lru"),
        "lfu": _placement(setting, slots=slots, policy="lfu"),
        "lcp": _placement(setting, slots=slots, policy="lcp"),
        "pooled": _placement(setting, slots=0, pool=SharedPool(slots * layers, "lcp")),
    }
    return {
        name: _plan(setting, dataclasses.replace(placement, fast_budget_bytes=budget_bytes))
        for name, placement in placements.items()
    }


def _placement(
    setting: Setting, *, slots: int, policy: Policy = "lru", pool: SharedPool | None = None
) -> Placement:
    spec, layout = setting.spec, setting.layout
    context_tokens = max(setting.prompt_tokens + setting.new_tokens, SEQUENCE_TOKENS)
    layers = tuple(
        LayerPlacement(
            layer=cut.layer,
            budget_bytes=slots * stored_bytes(spec, cut, "top"),
            top_slots=slots,
            bottom_slots=0,
            policy=policy,
            hot=setting.hot[cut.layer],
        )
        for cut in layout.layers
    )
    staging = max(spec.moe(cut.layer).top_k for cut in layout.layers)
    memory = memory_breakdown(
        spec,
        layout,
        layers,
        staging_experts=staging,
        context_tokens=context_tokens,
        threads=setting.threads,
        pool=pool,
    )
    return Placement(
        device="cpu",
        fast_budget_bytes=memory.total_bytes,
        staging_experts=staging,
        context_tokens=context_tokens,
        prompt_tokens=setting.prompt_tokens,
        new_tokens=setting.new_tokens,
        memory=memory,
        layers=layers,
        threads=setting.threads,
        pool=pool,
    )


def _plan(setting: Setting, placement: Placement) -> Plan:
    """A plan that predicts nothing: here it is measured."""
    return Plan(
        version=PLAN_VERSION,
        model_name=setting.spec.name,
        model_digest=setting.spec.digest,
        max_context_tokens=placement.context_tokens,
        layout=setting.layout,
        placement=placement,
        prediction=Prediction(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, placement.memory.total_bytes, 0, 1.0),
        baselines={},
        provenance=Provenance("none", hardware_is_this_machine=False, compute="", routing=""),
        planner=PlannerReport(0.0, "by hand", None, 0),
        link=setting.link,
    )


def hot_rankings(checkpoint: Checkpoint, tokenizer: Tokenizer, tokens: int) -> Rankings:
    """Of each layer its experts, most used first, over the beginnings of the texts."""
    spec = checkpoint.spec
    everyone = {number: tuple(range(spec.moe(number).num_experts)) for number in spec.moe_layers}
    setting = Setting(spec, uniform_layout(spec, 1.0), everyone, 1, 1, 1, None)
    placement = _placement(setting, slots=0)
    texts = [(name, raw, tokenizer.encode(text)) for name, raw, text in read_texts(shipped_texts())]
    with open_checkpoint(checkpoint, spec, setting.layout, placement) as engine:
        trace = record_routing(engine, texts, how="for a benchmark", tokens=tokens).trace
    found = {}
    for index, number in enumerate(spec.moe_layers):
        moe = spec.moe(number)
        counts = activation_counts(trace, index, moe.num_experts, moe.top_k, "fit")
        found[number] = hot_ranking(counts)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every budget, or with ``--json`` one object."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except MoepackError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    checkpoint = Checkpoint.open(str(options.model or shipped_model()))
    spec = checkpoint.spec
    tokenizer = Tokenizer.load(options.model or shipped_model())
    setting = Setting(
        spec=spec,
        layout=uniform_layout(spec, 1.0),
        hot=hot_rankings(checkpoint, tokenizer, options.calibration),
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        threads=options.threads,
        link=options.link,
    )
    prompts = shipped_prompts(tokenizer, options.prompt)
    experts = min(spec.moe(number).num_experts for number in spec.moe_layers)
    budgets: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="policies.") as scratch:
        for share in options.cached:
            slots = round(share * experts)
            plans = contenders(setting, slots)
            folders = pack_for(checkpoint, plans, Path(scratch))
            rows = summary(race(plans, folders, prompts, options.new, options.rounds))
            budget_bytes = next(iter(plans.values())).placement.fast_budget_bytes
            budgets.append(
                {
                    "slots_per_layer": slots,
                    "fast_budget_bytes": budget_bytes,
                    "contenders": [row._asdict() for row in rows],
                }
            )
            if not options.json:
                _print_table(f"{slots} of {experts} a layer, {format_size(budget_bytes)}", rows)
    if options.json:
        machine_name = f"{machine.cpu_name()}, {machine.core_count()} cores"
        chosen = {name: value for name, value in vars(options).items() if name != "json"}
        document = {"machine": machine_name, "options": chosen, "budgets": budgets}
        print(json.dumps(document, default=str))
    return 0


def _print_table(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    print("| | tokens/s | slowest to fastest | speed-up | first token | hits | link, a token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row.name} | {row.tokens_per_s:.1f} | {row.slowest:.1f} to {row.fastest:.1f} "
            f"| {row.speedup:.2f} | {row.ttft_s * 1e3:.0f} ms | {row.hit_rate:.1%} "
            f"| {format_size(row.link_bytes_per_token)} |"
        )
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: the shipped model")
    parser.add_argument(
        "--cached",
        type=float,
        nargs="+",
        default=[0.125, 0.25, 0.5],
        metavar="SHARE",
        help="budgets, as shares of a layer's experts",
    )
    parser.add_argument("--link", type=_link, metavar="LINK", help="as in 2G,50us or pcie3-x16")
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--new", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=8192, metavar="TOKENS")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("/var/tmp"),
        metavar="DIR",
        help="on the disk that is to be measured",
    )
    parser.add_argument("--json", action="store_true")
    return parser


def _link(text: str) -> tuple[float, float]:
    try:
        return link(text)
    except typer.BadParameter as failure:
        raise argparse.ArgumentTypeError(str(failure)) from None


if __name__ == "__main__":
    sys.exit(main())
