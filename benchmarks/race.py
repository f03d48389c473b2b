"""Named plans of one model, measured against each other.

All of them are open at once and generate after the same prompts, some tokens in turn: a machine
that is busy for a while is so for all of them. How fast its processor and its disk are meanwhile is
read beside them (:mod:`moepack.yardstick`, :mod:`benchmarks.link_pace`). Peak memory: the fast
tiers of all plans together.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from moepack_runtime.loading import open_packed
from moepack_runtime.stats import RunStats

from benchmarks.link_pace import DiskPace
from moepack.calibration import Calibration
from moepack.checkpoint import Checkpoint
from moepack.formats import PackedModel
from moepack.measuring import average, draw, warm_up
from moepack.pack import pack
from moepack.plan import Plan
from moepack.yardstick import MixedYardstick, Pace, PaceKeeper

#: Of one contender before the next has its turn: few enough that a busy moment meets all of them,
#: so many that what is fetched ahead while the others run, for nothing, is a small part.
TURN_TOKENS = 32

Rounds = dict[str, list[RunStats]]


class Raced(NamedTuple):
    """What every plan took in each round, and how fast the machine was beside it.

    Attributes
    ----------
    disk_slowness : list of float
        In each round, how many times as long the disk took as when it was profiled; 1 where nobody
        looked.
    """

    runs: Rounds
    paces: dict[str, list[Pace]]
    disk_slowness: list[float]


def pack_for(
    checkpoint: Checkpoint,
    plans: Mapping[str, Plan],
    folder: Path,
    calibration: Calibration | None = None,
) -> dict[str, Path]:
    """A packed folder for every layout among the plans, by the layout's digest.

    ``calibration``: of the model's profile, for layouts that are rounded by it.
    """
    folders: dict[str, Path] = {}
    for plan in plans.values():
        digest = plan.layout.digest
        out = folder / digest
        if digest not in folders and not out.exists():
            pack(checkpoint, plan, out, calibration=calibration)
        folders[digest] = out
    return folders


def race(
    plans: Mapping[str, Plan],
    folders: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    rounds: int,
    disk: DiskPace | None = None,
) -> Raced:
    """Measure every plan once a round. All of them are open at once, and take turns.

    ``disk`` is read before every prompt, and behind the last.

    Raises
    ------
    AssertionError
        When two plans of one layout draw different tokens: they must not differ in a bit.
    """
    packed = {digest: PackedModel.open(folder) for digest, folder in folders.items()}
    found = Raced({name: [] for name in plans}, {name: [] for name in plans}, [])
    yardstick = MixedYardstick()
    for _ in range(rounds):
        with ExitStack() as stack:
            engines = {}
            for name, plan in plans.items():
                engine = open_packed(packed[plan.layout.digest], plan, link=plan.link)
                engines[name] = stack.enter_context(engine)
                warm_up(engine, prompts)
            runs: Rounds = {name: [] for name in plans}
            keepers = {name: PaceKeeper(yardstick) for name in plans}
            slower = [1.0 if disk is None else disk.slowness()]
            for prompt in prompts:
                streams = {
                    name: keepers[name].beside(draw(engine, prompt, new_tokens))
                    for name, engine in engines.items()
                }
                _draw_in_turns(plans, streams, new_tokens)
                for name, engine in engines.items():
                    runs[name].append(engine.stats())
                slower.append(1.0 if disk is None else disk.slowness())
            found.disk_slowness.append(statistics.fmean(slower))
            for name, several in runs.items():
                found.runs[name].append(average(several))
                found.paces[name].append(keepers[name].pace())
    return found


def _draw_in_turns(
    plans: Mapping[str, Plan], streams: Mapping[str, Iterator[int]], new_tokens: int
) -> None:
    drawn: dict[str, list[int]] = {name: [] for name in streams}
    order = deque(streams)
    while any(len(tokens) < new_tokens for tokens in drawn.values()):
        for name in order:
            torch.set_num_threads(plans[name].placement.threads)  # of the process
            drawn[name] += itertools.islice(streams[name], TURN_TOKENS)
        order.rotate(-1)
    of_layout: dict[str, list[int]] = {}
    for name, plan in plans.items():
        same = of_layout.setdefault(plan.layout.digest, drawn[name]) == drawn[name]
        assert same, f"{name} computes something else"


def median(runs: Sequence[RunStats], figure: Callable[[RunStats], float | None]) -> float:
    """Over the rounds; what was not measured counts as 0."""
    return statistics.median(figure(run) or 0.0 for run in runs)


def ratio(
    runs: Sequence[RunStats],
    others: Sequence[RunStats],
    figure: Callable[[RunStats], float | None],
) -> tuple[float, float, float]:
    """Median, least and largest of ``runs`` over ``others``, round by round."""
    found = [(figure(a) or 0.0) / (figure(b) or 1.0) for a, b in zip(runs, others, strict=True)]
    return statistics.median(found), min(found), max(found)
