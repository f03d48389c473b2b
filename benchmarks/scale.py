"""Whether cost grows no faster than the bytes that must move: over layers, experts and context.

    python -m benchmarks.scale --rounds 3

Small synthetic checkpoints (:mod:`benchmarks.synthetic`), a quarter of each layer's experts in LRU
slots and the predicted ones fetched ahead. One size is doubled at a time, everything else as in the
first case. Each case runs in a process of its own, so that its peak of memory is its own; the cases
take turns.

The bytes of a token are those that cross the link and those that the processor must read: the trunk
but the embeddings, the experts that are used, and the keys and values so far. Where these grow by
a factor, time per token may grow by it and the noise, and memory by what was planned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.options import at_least, link_option, new_tokens, positive
from benchmarks.setting import described, named
from benchmarks.synthetic import shape_config
from benchmarks.synthetic_folder import write_checkpoint
from moepack.budget import memory_breakdown, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.errors import RunError
from moepack.forecast import PlannerReport, Prediction, Provenance
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.plan import PLAN_VERSION, LayerPlacement, Placement, Plan
from moepack.presets import preset_path
from moepack.routing_model import load_routing_model
from moepack.units import format_size

TOP_K = 4
VOCAB = 8192
EXPERT_WIDTH = 512
CACHED_SHARE = 0.25
ELEMENT_BYTES = 2

LAYERS, EXPERTS, CONTEXTS = (4, 8, 16), (16, 32, 64), (1024, 2048, 4096)


class Case(NamedTuple):
    """One model, and the context that it decodes at the end of."""

    layers: int
    experts: int
    context: int


FIRST = Case(LAYERS[0], EXPERTS[0], CONTEXTS[0])
AXES: dict[str, tuple[Case, ...]] = {
    "layers": tuple(FIRST._replace(layers=value) for value in LAYERS),
    "experts": tuple(FIRST._replace(experts=value) for value in EXPERTS),
    "context": tuple(FIRST._replace(context=value) for value in CONTEXTS),
}


@dataclass(frozen=True)
class Ready:
    """A case that is packed and planned; ``read_bytes`` are what the processor must read."""

    case: Case
    folder: Path
    planned_bytes: int
    read_bytes: int


@dataclass(frozen=True)
class Line:
    """What a case took, medians over the rounds.

    Attributes
    ----------
    tpot_s : float
    link_bytes, read_bytes : int
        Of a token.
    planned_bytes, grown_bytes : int
        Of the fast tier as planned; by which the process grew at its peak.
    """

    case: Case
    tpot_s: float
    link_bytes: int
    read_bytes: int
    planned_bytes: int
    grown_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Over the link and out of memory, for one token."""
        return self.link_bytes + self.read_bytes


class Growth(NamedTuple):
    """From one case of an axis to a larger one: factors."""

    axis: str
    small: Case
    large: Case
    tpot: float
    moved: float
    planned: float
    memory: float

    def holds(self, tolerance: float) -> bool:
        """Whether neither time nor memory grows faster than its bytes, or at all without them."""
        faster = 1 + tolerance
        if self.tpot > max(1.0, self.moved) * faster:
            return False
        return self.memory <= max(1.0, self.planned) * faster


def prepare(case: Case, new_tokens: int, link: tuple[float, float] | None, folder: Path) -> Ready:
    """Write, plan and pack the model of a case."""
    config = shape_config("olmoe-1b-7b", case.layers, narrow=8)
    config |= {"num_experts": case.experts, "num_experts_per_tok": TOP_K, "vocab_size": VOCAB}
    config |= {"intermediate_size": EXPERT_WIDTH, "max_position_embeddings": max(CONTEXTS)}
    name = "-".join(map(str, case))
    model = load_routing_model(preset_path("olmoe-1b-7b", "routing"))
    write_checkpoint(config, model, folder / f"model-{name}")
    checkpoint = Checkpoint.open(folder / f"model-{name}")
    plan = plan_of(checkpoint.spec, case, new_tokens, link)
    out = folder / f"pack-{name}"
    pack(checkpoint, plan, out)
    return Ready(case, out, plan.placement.memory.total_bytes, read_bytes(checkpoint, plan))


def plan_of(spec: ModelSpec, case: Case, new_tokens: int, link: tuple[float, float] | None) -> Plan:
    """Whole experts, a quarter of each layer's in slots, the likeliest fetched ahead."""
    layout = uniform_layout(spec, 1.0)
    slots = round(CACHED_SHARE * case.experts)
    layers = tuple(
        LayerPlacement(
            layer=cut.layer,
            budget_bytes=slots * stored_bytes(spec, cut, "top"),
            top_slots=slots,
            bottom_slots=0,
            policy="lru",
            hot=tuple(range(case.experts)),
            prefetch="all",
            prefetch_depth=TOP_K,
        )
        for cut in layout.layers
    )
    memory = memory_breakdown(
        spec, layout, layers, staging_experts=2 * TOP_K, context_tokens=case.context, threads=1
    )
    placement = Placement(
        device="cpu",
        fast_budget_bytes=memory.total_bytes,
        staging_experts=2 * TOP_K,
        context_tokens=case.context,
        prompt_tokens=case.context - new_tokens,
        new_tokens=new_tokens,
        memory=memory,
        layers=layers,
        threads=1,
    )
    return Plan(
        version=PLAN_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        max_context_tokens=case.context,
        layout=layout,
        placement=placement,
        prediction=Prediction(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, memory.total_bytes, 0, 1.0),
        baselines={},
        provenance=Provenance("none", hardware_is_this_machine=False, compute="", routing=""),
        planner=PlannerReport(0.0, "by hand", None, 0),
        link=link,
    )


def read_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """What the processor must read for a token in the middle of the decoding."""
    spec, placement = checkpoint.spec, plan.placement
    embedding_bytes = spec.vocab_size * spec.hidden_size * ELEMENT_BYTES
    experts_bytes = sum(stored_bytes(spec, cut, "top") for cut in plan.layout.layers) * TOP_K
    seen = placement.prompt_tokens + placement.new_tokens // 2
    rows_bytes = placement.memory.kv_bytes * seen // placement.context_tokens
    return placement.memory.trunk_bytes - embedding_bytes + experts_bytes + rows_bytes


def run_case(folder: Path) -> dict[str, Any]:
    """Decode at the end of a packed model's context: what the process of a case does."""
    from moepack_runtime.loading import open_packed

    from moepack.formats import PackedModel
    from moepack.measuring import draw, warm_up

    packed = PackedModel.open(folder)
    plan = packed.plan()
    placement = plan.placement
    generator = np.random.Generator(np.random.PCG64(0))
    prompt = generator.integers(1, packed.spec.vocab_size, placement.prompt_tokens).tolist()
    with open_packed(packed, plan, link=plan.link) as engine:
        warm_up(engine, [prompt[: len(prompt) // 2]])
        for _ in draw(engine, prompt, placement.new_tokens):
            pass
        stats = engine.stats()
    return {
        "tpot_s": stats.tpot_s,
        "link_bytes": stats.link_bytes_per_token,
        "grown_bytes": (stats.peak_process_bytes or 0) - stats.process_base_bytes,
    }


def measure(ready: Sequence[Ready], rounds: int) -> dict[Case, Line]:
    """Run every case once a round, each in a process of its own."""
    found: dict[Case, list[dict[str, Any]]] = {entry.case: [] for entry in ready}
    for number in range(rounds):
        for entry in ready:
            command = [sys.executable, "-m", "benchmarks.scale", "--run", str(entry.folder)]
            print(f"round {number + 1}: {entry.case}", file=sys.stderr, flush=True)
            child = subprocess.run(
                command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
            )
            if child.returncode:
                raise RunError(f"{' '.join(command)} failed: {child.stderr.strip()[-500:]}")
            found[entry.case].append(json.loads(child.stdout))
    return {
        entry.case: Line(
            entry.case,
            statistics.median(run["tpot_s"] for run in found[entry.case]),
            round(statistics.median(run["link_bytes"] for run in found[entry.case])),
            entry.read_bytes,
            entry.planned_bytes,
            round(statistics.median(run["grown_bytes"] for run in found[entry.case])),
        )
        for entry in ready
    }


def growths(lines: dict[Case, Line]) -> Iterator[Growth]:
    """Every step of every axis, from the smallest case on."""
    for axis, cases in AXES.items():
        small = lines[cases[0]]
        for case in cases[1:]:
            large = lines[case]
            yield Growth(
                axis,
                small.case,
                case,
                large.tpot_s / small.tpot_s,
                large.moved_bytes / small.moved_bytes,
                large.planned_bytes / small.planned_bytes,
                large.grown_bytes / small.grown_bytes,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print two tables, and as the last line one JSON object."""
    return named(_run, _parser().parse_args(arguments))


def _run(asked: argparse.Namespace) -> int:
    if asked.run is not None:
        print(json.dumps(run_case(asked.run)))
        return 0
    cases = list(dict.fromkeys(case for axis in AXES.values() for case in axis))
    with tempfile.TemporaryDirectory(dir=asked.scratch, prefix="scale.") as scratch:
        ready = []
        for case in cases:
            print(f"write {case}", file=sys.stderr, flush=True)
            ready.append(prepare(case, asked.new, asked.link, Path(scratch)))
        lines = measure(ready, asked.rounds)
    steps = list(growths(lines))
    print("| layers | experts | context | each token | over the link | read | planned | peak |")
    print(f"|{' --- |' * 8}")
    for line in lines.values():
        sizes = (line.link_bytes, line.read_bytes, line.planned_bytes, line.grown_bytes)
        print(
            f"| {' | '.join(map(str, line.case))} | {line.tpot_s * 1e3:.2f} ms | "
            f"{' | '.join(map(format_size, sizes))} |"
        )
    print("\n| grown | from | to | time per token | its bytes | memory | as planned | |")
    print(f"|{' --- |' * 8}")
    for step in steps:
        small, large = (getattr(case, step.axis) for case in (step.small, step.large))
        print(
            f"| {step.axis} | {small} | {large} | {step.tpot:.2f} | {step.moved:.2f} | "
            f"{step.memory:.2f} | {step.planned:.2f} | "
            f"{'holds' if step.holds(asked.tolerance) else 'grows faster'} |"
        )
    holds = all(step.holds(asked.tolerance) for step in steps)
    print(f"\ncost grows {'no ' if holds else ''}faster than the bytes that must move")
    found = [line.__dict__ | {"case": line.case._asdict()} for line in lines.values()]
    tried = [step._asdict() | {"holds": step.holds(asked.tolerance)} for step in steps]
    print(json.dumps({**described(asked), "cases": found, "growth": tried, "holds": holds}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--new", type=new_tokens, default=64, metavar="TOKENS")
    parser.add_argument("--link", type=link_option, metavar="LINK", help="as in 400M,50us")
    parser.add_argument(
        "--tolerance", type=positive, default=0.15, help="of the growth, for noise (default 0.15)"
    )
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), metavar="DIR")
    parser.add_argument("--run", type=Path, metavar="PACK", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
