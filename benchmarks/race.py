"""Named plans of one model, measured against each other.

All of them are open at once and generate after the same prompts, a few tokens in turn: a machine
that is busy for a while is so for all of them. Peak memory: the fast tiers of all plans together.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from moepack_runtime.engine import Engine
from moepack_runtime.loading import open_packed
from moepack_runtime.stats import RunStats

from moepack.checkpoint import Checkpoint
from moepack.formats import PackedModel
from moepack.measuring import average, draw, warm_up
from moepack.pack import pack
from moepack.plan import Plan

#: Of one contender before the next has its turn: few enough that a busy moment meets all of them,
#: enough that each has the processor's caches to itself.
TURN_TOKENS = 8

Rounds = dict[str, list[RunStats]]


class Row(NamedTuple):
    """One contender's medians. ``speedup`` is over the first contender, round by round."""

    name: str
    tokens_per_s: float
    slowest: float
    fastest: float
    speedup: float
    ttft_s: float
    hit_rate: float
    link_bytes_per_token: float


def pack_for(checkpoint: Checkpoint, plans: Mapping[str, Plan], folder: Path) -> dict[str, Path]:
    """A packed folder for every layout among the plans, by the layout's digest."""
    folders: dict[str, Path] = {}
    for plan in plans.values():
        digest = plan.layout.digest
        out = folder / digest
        if digest not in folders and not out.exists():
            pack(checkpoint, plan, out)
        folders[digest] = out
    return folders


def race(
    plans: Mapping[str, Plan],
    folders: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    rounds: int,
) -> Rounds:
    """Measure every plan once a round. All of them are open at once, and take turns.

    Raises
    ------
    AssertionError
        When two plans of one layout draw different tokens: they must not differ in a bit.
    """
    packed = {digest: PackedModel.open(folder) for digest, folder in folders.items()}
    found: Rounds = {name: [] for name in plans}
    for _ in range(rounds):
        with ExitStack() as stack:
            engines = {}
            for name, plan in plans.items():
                engine = open_packed(packed[plan.layout.digest], plan, link=plan.link)
                engines[name] = stack.enter_context(engine)
                warm_up(engine, prompts)
            runs: Rounds = {name: [] for name in plans}
            for prompt in prompts:
                _draw_in_turns(plans, engines, prompt, new_tokens)
                for name, engine in engines.items():
                    runs[name].append(engine.stats())
            for name, several in runs.items():
                found[name].append(average(several))
    return found


def _draw_in_turns(
    plans: Mapping[str, Plan], engines: Mapping[str, Engine], prompt: Sequence[int], new_tokens: int
) -> None:
    streams = {name: draw(engine, prompt, new_tokens) for name, engine in engines.items()}
    drawn: dict[str, list[int]] = {name: [] for name in engines}
    order = deque(engines)
    while any(len(tokens) < new_tokens for tokens in drawn.values()):
        for name in order:
            torch.set_num_threads(plans[name].placement.threads)  # of the process
            drawn[name] += itertools.islice(streams[name], TURN_TOKENS)
        order.rotate(-1)
    of_layout: dict[str, list[int]] = {}
    for name, plan in plans.items():
        same = of_layout.setdefault(plan.layout.digest, drawn[name]) == drawn[name]
        assert same, f"{name} computes something else"


def summary(found: Rounds) -> list[Row]:
    """Medians over the rounds; the first contender is what the others are compared with."""
    first = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        speeds = [run.tokens_per_s or 0.0 for run in runs]
        rows.append(
            Row(
                name=name,
                tokens_per_s=statistics.median(speeds),
                slowest=min(speeds),
                fastest=max(speeds),
                speedup=statistics.median(
                    speed / (other.tokens_per_s or 1.0)
                    for speed, other in zip(speeds, first, strict=True)
                ),
                ttft_s=statistics.median(run.ttft_s for run in runs),
                hit_rate=statistics.median(run.hit_rate or 0.0 for run in runs),
                link_bytes_per_token=statistics.median(
                    run.link_bytes_per_token or 0.0 for run in runs
                ),
            )
        )
    return rows
