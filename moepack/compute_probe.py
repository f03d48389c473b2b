"""Measuring a model's compute: its own layers, at several numbers of tokens.

Each kind of layer is measured in walks through its layers (:mod:`moepack.layer_walk`), which find
weights where a run finds them: not in a processor's cache. The ways of having experts take turns
within one walk after the other, so that a machine that slows down slows all of them; and beside
each walk a yardstick is read, by which all times are told for one speed of the processor
(:mod:`moepack.yardstick`). Peak memory beyond the engine's: 128 MiB of experts, or the experts of
one token six times; and what :mod:`moepack.trunk_probe` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from moepack.budget import stored_bytes
from moepack.compute import (
    COMPUTE_VERSION,
    ComputeProfile,
    Curve,
    LayerCompute,
    QuantisedExpert,
    RoundedLayer,
)
from moepack.compute_rounds import at_pace, median_profile, worthwhile_threads
from moepack.encodings import QUANTISED, fitting
from moepack.expert_probe import LEAD_IN, Probe, missing_experts, resident_experts, walked
from moepack.hardware import HardwareProfile
from moepack.layer_walk import Experts, Laps, LayerWalk, median_laps
from moepack.layouts import layer_layout
from moepack.progress import NO_PROGRESS, Progress
from moepack.timing import Stopwatch
from moepack.transfer_prices import Around, priced_ahead_s, priced_in_order_s, priced_missing_s
from moepack.trunk_probe import renumbered, rounded_walk
from moepack.yardstick import MixedYardstick, SteadyPace

if TYPE_CHECKING:
    from moepack_runtime.engine import Engine
    from moepack_runtime.store import ExpertSource

    from moepack.model_spec import LayerSpec, ModelSpec, MoeSpec

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

# How a walk has its experts: as many as a token has, whole or in two segments; one; no experts at
# all. And with all that a token has, or one of them, to be fetched.
_MANY, _SPLIT, _ONE, _DENSE = "many", "split", "one", "dense"
_TRUNK = "trunk"
_ALL_MISSING, _ONE_MISSING = "all missing", "one missing"
_ALL_AHEAD, _ONE_AHEAD = "all ahead", "one ahead"

# How much of an expert its first segment is, in the two ways of cutting it.
_RATIOS = {_MANY: 1.0, _SPLIT: 0.5}


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
    found: list[_Kind] = []
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


class _Turns(NamedTuple):
    """Medians of each way, for the pace's first speed, and how slow the processor was meanwhile."""

    laps: dict[str, Laps]
    slowness: float


def _measure_kind(probe: Probe, numbers: tuple[int, ...], pace: SteadyPace) -> _Kind:
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
        return _dense_compute(numbers, found, trunk)
    those = walked(probe, numbers)
    many = min(max(2, moe.top_k), those.experts)
    walk = LayerWalk(engine, those.numbers, context, stopwatch)
    with ExitStack() as stack:
        ways: dict[str, Experts | None] = {}
        rounded: dict[str, Experts | None] = {}
        for stored in (None, *fitting(engine.spec.hidden_size, moe.intermediate_size)):
            for way, ratio in _RATIOS.items():
                run = stack.enter_context(resident_experts(probe, those, ratio, stored))
                (ways if stored is None else rounded)[_way(way, stored)] = Experts(run, many)
                if _way(way, stored) == _MANY:
                    ways[_ONE] = Experts(run, 1)
        missing = stack.enter_context(missing_experts(probe, those))
        laps = {count: _take_turns(walk, count, ways, pace).laps for count in tokens if count > 1}
        fetched = {_ALL_MISSING: missing.every, _ONE_MISSING: missing.one}
        ahead = {_ALL_AHEAD: missing.every_ahead, _ONE_AHEAD: missing.one_ahead}
        reads_s: list[float] = []
        beside = None if missing.read_s is None else _keeping(missing.read_s, reads_s)
        # One token is what most of a generation is made of.
        alone = _take_turns(walk, 1, {**ways, **fetched, **ahead}, pace, 6 * _LIMIT_S, beside)
        laps = {1: alone.laps, **laps}
        of_prompt = max(count for count in tokens if count <= _PROMPT_TOKENS)
        prompt = _take_turns(walk, of_prompt, {_MANY: ways[_MANY], **fetched}, pace, 2 * _LIMIT_S)
        # By themselves, and not for as long: they are three times as many as the others.
        for count, of_count in laps.items():
            of_count.update(_take_turns(walk, count, rounded, pace, _LIMIT_S / 2).laps)
        trunk = _rounded_laps(engine, those.numbers, [*laps], stopwatch, ways[_MANY], pace)
    read_s = median(reads_s) if reads_s else None
    kind = _moe_compute(probe, numbers, those.numbers, many, laps, trunk, read_s, alone.slowness)
    if moe.top_k > 1:
        layer = _with_prompt(probe, kind.layer, moe, prompt, of_prompt, len(those.numbers))
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


def _rounded_layer(laps: Mapping[int, Laps], has_ffn: bool) -> RoundedLayer:
    tokens = tuple(laps)
    attention = Curve(tokens, tuple(lap.attention_s for lap in laps.values()))
    ffn = Curve(tokens, tuple(lap.ffn_s for lap in laps.values()))
    return RoundedLayer(attention, ffn if has_ffn else None)


def _with_prompt(
    probe: Probe, compute: LayerCompute, moe: MoeSpec, turns: _Turns, tokens: int, layers: int
) -> LayerCompute:
    """What transfers cost the thread that computes a prompt, by what its walks take longer."""
    assert compute.expert is not None, "layers with experts"
    number = compute.layers[0]
    size_bytes = stored_bytes(
        probe.engine.spec, layer_layout(probe.engine.spec, number, 1.0), "top"
    )
    # As it was meanwhile: see beyond_s.
    link_s = probe.hardware.link_seconds(size_bytes) / turns.slowness
    expert_s = compute.expert.at(tokens)
    alone = turns.laps[_MANY]

    def beyond_s(way: str, missing: int) -> float:
        found = turns.laps[way]
        longer_s = found.around_s + found.experts_s - alone.around_s - alone.experts_s
        longer_s += (found.head_s - alone.head_s) / layers
        there = moe.top_k - missing
        priced_s = priced_in_order_s(link_s, expert_s, there=there, missing=missing)
        return longer_s - (priced_s - moe.top_k * expert_s)

    transfer_s, burst_s = _transfer_and_burst_s(
        beyond_s(_ONE_MISSING, 1), beyond_s(_ALL_MISSING, moe.top_k), moe.top_k
    )
    return replace(compute, prompt_transfer_s=transfer_s, prompt_burst_s=burst_s)


def _keeping(measured_s: Callable[[], float], kept_s: list[float]) -> Callable[[], None]:
    return lambda: kept_s.append(measured_s())


def _way(way: str, stored: str | None) -> str:
    """The name of a way with experts in a quantised encoding; None: in the model's dtype."""
    return way if stored is None else f"{way} {stored}"


def _take_turns(
    walk: LayerWalk,
    tokens: int,
    ways: Mapping[str, Experts | None],
    pace: SteadyPace,
    limit_s: float | None = None,
    beside: Callable[[], object] | None = None,
) -> _Turns:
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
    return _Turns({way: median_laps(laps) for way, laps in taken.items()}, median(slowness))


class _Kind(NamedTuple):
    """The layers of one kind, and the head behind them, once more with a trunk in 8 bits."""

    layer: LayerCompute
    head_s: float
    rounded_head_s: float


def _dense_compute(
    numbers: tuple[int, ...], laps: Mapping[int, Laps], rounded: Mapping[int, Laps]
) -> _Kind:
    tokens = tuple(laps)
    attention = Curve(tokens, tuple(lap.attention_s for lap in laps.values()))
    ffn = Curve(tokens, tuple(lap.ffn_s for lap in laps.values()))
    layer = LayerCompute(
        numbers, attention, None, None, None, ffn, rounded=_rounded_layer(rounded, has_ffn=True)
    )
    return _Kind(layer, laps[1].head_s, rounded[1].head_s)


def _moe_compute(
    probe: Probe,
    numbers: tuple[int, ...],
    walked_over: Sequence[int],
    many: int,
    laps: Mapping[int, Mapping[str, Laps]],
    rounded: Mapping[int, Laps],
    read_s: float | None,
    slowness: float,
) -> _Kind:
    """What one expert adds is the difference between many and one; what is left is the pass."""
    tokens = tuple(laps)
    resident = [
        median_laps([found[way] for way in (_MANY, _ONE, _SPLIT)]) for found in laps.values()
    ]
    fixed_s = tuple(
        _fixed_s(found[_ONE].experts_s, found[_MANY].experts_s, many) for found in laps.values()
    )

    def each(way: str) -> Curve:
        pairs = zip(laps.values(), fixed_s, strict=True)
        return Curve(
            tokens, tuple(max(0.0, found[way].experts_s - rest_s) / many for found, rest_s in pairs)
        )

    spec, moe = probe.engine.spec, probe.engine.spec.moe(numbers[0])
    expert, alone = each(_MANY), resident[0]
    quantised = (
        QuantisedExpert(name, each(_way(_MANY, name)), each(_way(_SPLIT, name)))
        for name in fitting(spec.hidden_size, moe.intermediate_size)
    )

    def beyond_s(way: str, priced_s: float) -> float:
        """What a layer takes longer than it is priced when it has to fetch experts.

        The whole walk is compared: readers that wake, and what they drive out of the caches, slow
        down what follows as well. A link does not slow down with the processor, so all is compared
        as it was, and only what is left is the processor's.
        """
        found = laps[1][way]
        layer_s = found.around_s + found.experts_s
        layer_s += (found.head_s - alone.head_s) / len(walked_over)
        return layer_s - priced_s / slowness

    def demanded_s(way: str, missing: int) -> float:
        priced_s = priced_missing_s(
            probe,
            numbers[0],
            fixed_s[0] * slowness,
            expert.at(1) * slowness,
            missing=missing,
            read_s=read_s,
        )
        return beyond_s(way, priced_s + alone.around_s * slowness)

    def ahead_s(way: str, missing: int) -> float:
        before_s = alone.attention_s + alone.router_s + fixed_s[0]
        around = (before_s, alone.ffn_s, alone.head_s)
        priced_s = priced_ahead_s(
            probe,
            numbers[0],
            Around(*(piece_s * slowness for piece_s in around)),
            expert.at(1) * slowness,
            layers=len(walked_over),
            missing=missing,
            read_s=read_s,
        )
        return beyond_s(way, priced_s)

    transfer_s, burst_s = _transfer_and_burst_s(
        demanded_s(_ONE_MISSING, 1), demanded_s(_ALL_MISSING, moe.top_k), moe.top_k
    )
    ahead_transfer_s, ahead_burst_s = _transfer_and_burst_s(
        ahead_s(_ONE_AHEAD, 1), ahead_s(_ALL_AHEAD, moe.top_k), moe.top_k
    )
    compute = LayerCompute(
        layers=numbers,
        attention=Curve(tokens, tuple(lap.attention_s for lap in resident)),
        router=Curve(tokens, tuple(lap.router_s for lap in resident)),
        expert=expert,
        expert_split=each(_SPLIT),
        ffn=Curve(tokens, tuple(lap.ffn_s for lap in resident))
        if moe.shared_intermediate_size
        else None,
        fixed=Curve(tokens, fixed_s),
        transfer_s=transfer_s,
        burst_s=burst_s,
        quantised=tuple(quantised),
        rounded=_rounded_layer(rounded, has_ffn=bool(moe.shared_intermediate_size)),
        ahead_transfer_s=ahead_transfer_s,
        ahead_burst_s=ahead_burst_s,
    )
    return _Kind(compute, alone.head_s, rounded[1].head_s)


def _transfer_and_burst_s(one_s: float, all_s: float, many: int) -> tuple[float, float]:
    """The line through (1, one_s) and (many, all_s): its slope, and where it begins.

    Neither is negative, and for all of them they come to ``all_s``.
    """
    if many == 1:
        return max(0.0, one_s), 0.0
    slope_s = min(max(0.0, all_s - one_s) / (many - 1), max(0.0, all_s) / many)
    return slope_s, max(0.0, all_s) - many * slope_s


def _fixed_s(one_s: float, all_s: float, many: int) -> float:
    """Where the line through (1, one_s) and (many, all_s) begins; 0 where noise makes it fall."""
    return max(0.0, (many * one_s - all_s) / (many - 1)) if one_s < all_s else 0.0
