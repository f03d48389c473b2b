"""Measuring a model's compute: its own layers, at several numbers of tokens.

Each kind of layer is measured in walks through its layers (:mod:`moepack.layer_walk`), which find
weights where a run finds them: not in a processor's cache. The ways of having experts take turns
within one walk after the other, so that a machine that slows down slows all of them; and beside
each walk a yardstick is read, by which all times are told for one speed of the processor
(:mod:`moepack.yardstick`). What the walks say of a layer is told in :mod:`moepack.walk_figures`.

Peak memory beyond the engine's: 128 MiB of experts, or the experts of
one token six times; and what :mod:`moepack.trunk_probe` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from moepack.compute import COMPUTE_VERSION, ComputeProfile
from moepack.compute_rounds import at_pace, median_profile, worthwhile_threads
from moepack.encodings import QUANTISED, fitting
from moepack.expert_probe import LEAD_IN, Probe, missing_experts, resident_experts, walked
from moepack.hardware import HardwareProfile
from moepack.layer_walk import Experts, Laps, LayerWalk, median_laps
from moepack.progress import NO_PROGRESS, Progress
from moepack.timing import Stopwatch
from moepack.trunk_probe import renumbered, rounded_walk
from moepack.walk_figures import (
    ALL_AHEAD,
    ALL_MISSING,
    MANY,
    ONE,
    ONE_AHEAD,
    ONE_MISSING,
    SPLIT,
    KindFigures,
    Turns,
    dense_figures,
    moe_figures,
    way_of,
    with_prompt,
)
from moepack.yardstick import MixedYardstick, SteadyPace

if TYPE_CHECKING:
    from moepack_runtime.checkpoint_store import ExpertSource
    from moepack_runtime.engine import Engine

    from moepack.model_spec import LayerSpec, ModelSpec

#: Numbers of tokens measured, up to the length of a prefill block.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Context behind which the attention of one token is measured, where the model has as much.
CONTEXT_TOKENS = 512

# Everything is measured in so many rounds, so that a burst of other work spoils one of them and
# not the median; in a round, a number of tokens until it has this many walks of every kind or has
# taken this long. The first walk of each warms up and is not counted.
_ROUNDS = 3
_WALKS = 7
_LIMIT_S = 0.4

# Rows of an expert beside which a prompt's transfers are measured.
_PROMPT_TOKENS = 64

# Ways of walking that have no other beside them: without experts, and with a trunk in 8 bits.
_DENSE, _TRUNK = "dense", "trunk"

# How much of an expert its first segment is, in the two ways of cutting it.
_RATIOS = {MANY: 1.0, SPLIT: 0.5}


def measure_compute(
    source: ExpertSource,
    engine: Engine,
    hardware: HardwareProfile,
    *,
    scratch: Path,
    progress: Progress = NO_PROGRESS,
) -> ComputeProfile:
    """Measure every kind of layer of a model, with one thread and with all, and keep the better.

    Small layers gain little from a second thread: see :data:`moepack.compute_rounds.WORTHWHILE`.

    Parameters
    ----------
    source
        Where the experts come from.
    engine
        Open on the same model, with :func:`probe_context_tokens` of context; its cache is empty
        afterwards.
    hardware
        This machine, whose link the transfers go over.
    scratch
        A folder on the disk that will hold the pack; a file of a few experts is made and removed.
    """
    import torch

    most = torch.get_num_threads()
    counts = {1, most} if hardware.device == "cpu" else {most}
    probe = Probe(source, engine, hardware, scratch)
    kinds: dict[LayerSpec, list[int]] = {}
    for number, layer in enumerate(engine.spec.layers):
        kinds.setdefault(layer, []).append(number)
    progress.start(
        f"measure the compute of {engine.spec.name}",
        len(kinds) * len(counts) * _ROUNDS,
        "items",
    )
    rounds: dict[int, list[ComputeProfile]] = {threads: [] for threads in sorted(counts)}
    paces: dict[int, SteadyPace] = {}
    try:
        for _ in range(_ROUNDS):
            for threads, measured in rounds.items():
                torch.set_num_threads(threads)
                if threads not in paces:
                    # What computes on a device is none of the processor's.
                    yardstick = MixedYardstick() if hardware.device == "cpu" else None
                    paces[threads] = SteadyPace(yardstick)
                pace = paces[threads]
                measured.append(_measure(probe, list(kinds.values()), pace, progress))
    finally:
        progress.done()
        engine.reset()
    found = [
        at_pace(median_profile(engine.spec, measured), paces[threads].mean_slowness)
        for threads, measured in rounds.items()
    ]
    best = worthwhile_threads(engine.spec, found)
    torch.set_num_threads(best.threads)
    return best


def _measure(
    probe: Probe, kinds: Sequence[Sequence[int]], pace: SteadyPace, progress: Progress
) -> ComputeProfile:
    """Measure with the present number of threads; all times are for the pace's first speed."""
    import torch

    spec = probe.engine.spec
    found: list[KindFigures] = []
    with torch.inference_mode():
        for numbers in kinds:
            found.append(_measure_kind(probe, tuple(numbers), pace))
            progress.advance(1)
    return ComputeProfile(
        version=COMPUTE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        device=probe.hardware.device,
        threads=torch.get_num_threads(),
        source="measured",
        how=(
            f"medians of {_ROUNDS} rounds of {_WALKS} walks through the model's own layers, torch "
            f"{torch.__version__}"
        ),
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        context_tokens=_context_tokens(spec),
        head_s=median(kind.head_s for kind in found),
        spread=0.0,
        layers=tuple(kind.layer for kind in found),
        rounded_head_s=median(kind.rounded_head_s for kind in found),
        yardstick_s=pace.first_s,
    )


def probe_context_tokens(spec: ModelSpec) -> int:
    """Context that an engine must be open with to be measured."""
    return _context_tokens(spec) + _singles()


def _singles() -> int:
    """Walks with one token behind one context: each lengthens it by one."""
    ways = max(6 + 2 * (1 + LEAD_IN), len(_RATIOS) * len(QUANTISED))
    return ways * (_WALKS + 1)


def _context_tokens(spec: ModelSpec) -> int:
    return min(CONTEXT_TOKENS, max(1, spec.context_length - _singles()))


def _measure_kind(probe: Probe, numbers: tuple[int, ...], pace: SteadyPace) -> KindFigures:
    """The layers of one kind, and the head behind them."""
    import torch

    engine = probe.engine
    moe = engine.spec.layers[numbers[0]].moe
    context = _context_tokens(engine.spec)
    tokens = [count for count in TOKENS if count <= context]
    synchronize = torch.cuda.synchronize if probe.hardware.device == "cuda" else None
    stopwatch = Stopwatch(synchronize)
    if moe is None:
        walk = LayerWalk(engine, numbers, context, stopwatch)
        dense: dict[str, Experts | None] = {_DENSE: None}
        found = {count: _take_turns(walk, count, dense, pace).laps[_DENSE] for count in tokens}
        trunk = _rounded_laps(engine, numbers, tokens, stopwatch, None, pace)
        return dense_figures(numbers, found, trunk)
    those = walked(probe, numbers)
    many = min(max(2, moe.top_k), those.experts)
    walk = LayerWalk(engine, those.numbers, context, stopwatch)
    with ExitStack() as stack:
        ways: dict[str, Experts | None] = {}
        rounded: dict[str, Experts | None] = {}
        for stored in (None, *fitting(engine.spec.hidden_size, moe.intermediate_size)):
            for way, ratio in _RATIOS.items():
                run = stack.enter_context(resident_experts(probe, those, ratio, stored))
                (ways if stored is None else rounded)[way_of(way, stored)] = Experts(run, many)
                if way_of(way, stored) == MANY:
                    ways[ONE] = Experts(run, 1)
        missing = stack.enter_context(missing_experts(probe, those))
        laps = {count: _take_turns(walk, count, ways, pace).laps for count in tokens if count > 1}
        fetched = {ALL_MISSING: missing.every, ONE_MISSING: missing.one}
        ahead = {ALL_AHEAD: missing.every_ahead, ONE_AHEAD: missing.one_ahead}
        reads_s: list[float] = []
        beside = None if missing.read_s is None else _keeping(missing.read_s, reads_s)
        # One token is what most of a generation is made of.
        alone = _take_turns(walk, 1, {**ways, **fetched, **ahead}, pace, 6 * _LIMIT_S, beside)
        laps = {1: alone.laps, **laps}
        of_prompt = max(count for count in tokens if count <= _PROMPT_TOKENS)
        prompt = _take_turns(walk, of_prompt, {MANY: ways[MANY], **fetched}, pace, 2 * _LIMIT_S)
        # By themselves, and not for as long: they are three times as many as the others.
        for count, of_count in laps.items():
            of_count.update(_take_turns(walk, count, rounded, pace, _LIMIT_S / 2).laps)
        trunk = _rounded_laps(engine, those.numbers, [*laps], stopwatch, ways[MANY], pace)
    read_s = median(reads_s) if reads_s else None
    kind = moe_figures(probe, numbers, those.numbers, many, laps, trunk, read_s, alone.slowness)
    if moe.top_k > 1:
        layer = with_prompt(probe, kind.layer, moe, prompt, of_prompt, len(those.numbers))
        kind = kind._replace(layer=layer)
    return kind


def _rounded_laps(
    engine: Engine,
    numbers: Sequence[int],
    tokens: Sequence[int],
    stopwatch: Stopwatch,
    experts: Experts | None,
    pace: SteadyPace,
) -> dict[int, Laps]:
    """Walks through layers like these with a trunk in 8 bits, for each number of tokens."""
    rounded = rounded_walk(engine, numbers)
    walk = LayerWalk(rounded, range(len(numbers)), _context_tokens(engine.spec), stopwatch)
    way = {_TRUNK: None if experts is None else renumbered(experts, numbers)}
    return {
        count: _take_turns(walk, count, way, pace, _LIMIT_S / 2).laps[_TRUNK] for count in tokens
    }


def _keeping(measured_s: Callable[[], float], kept_s: list[float]) -> Callable[[], None]:
    return lambda: kept_s.append(measured_s())


def _take_turns(
    walk: LayerWalk,
    tokens: int,
    ways: Mapping[str, Experts | None],
    pace: SteadyPace,
    limit_s: float | None = None,
    beside: Callable[[], object] | None = None,
) -> Turns:
    """Walk in every way, one behind the other, several times; the medians of each.

    Parameters
    ----------
    pace
        Is read beside every walk.
    limit_s
        After so long, no more walks are begun; None: :data:`_LIMIT_S`.
    beside
        What else has its turn.
    """
    if tokens == 1:
        walk.fill_context()
    taken: dict[str, list[Laps]] = {way: [] for way in ways}
    for experts in ways.values():
        walk.walk(tokens, experts)
    slowness: list[float] = []
    begin_s = perf_counter()
    for _ in range(_WALKS):
        pace.begin()
        for way, experts in ways.items():
            found = walk.walk(tokens, experts)
            slowness.append(pace.slowness())
            taken[way].append(Laps(*(piece_s / slowness[-1] for piece_s in found)))
        if beside is not None:
            beside()
        if perf_counter() - begin_s > (_LIMIT_S if limit_s is None else limit_s):
            break
    return Turns({way: median_laps(laps) for way, laps in taken.items()}, median(slowness))
