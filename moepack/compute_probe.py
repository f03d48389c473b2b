"""Measuring a model's compute: its own layers, at several numbers of tokens, nothing in flight.

Each kind of layer is measured once, on its first layer; its routed experts in
:mod:`moepack.expert_probe`. Peak memory beyond the engine's: the experts of one token, twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moepack.compute import (
    COMPUTE_VERSION,
    ComputeProfile,
    Curve,
    LayerCompute,
    block_seconds,
    token_seconds,
    worthwhile_threads,
)
from moepack.expert_probe import Probe, measure_experts, measure_transfer
from moepack.hardware import HardwareProfile
from moepack.progress import NO_PROGRESS, Progress
from moepack.timing import measure, summarise

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.store import ExpertSource

    from moepack.model_spec import LayerSpec, ModelSpec

#: Numbers of tokens measured, up to the length of a prefill block.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Context behind which the attention of one token is measured, where the model has as much.
CONTEXT_TOKENS = 512

# Everything is measured in so many rounds, so that a burst of other work spoils one of them and
# not the median; in a round, a point until it has this many repeats or has taken this long.
_ROUNDS = 3
_REPEATS = 7
_LIMIT_S = 0.1


class _Timer:
    """Medians of repeated calls."""

    def __init__(self, synchronize: Callable[[], object] | None) -> None:
        self._synchronize = synchronize

    def median_s(self, call: Callable[[], object]) -> float:
        return measure(
            call, repeats=_REPEATS, limit_s=_LIMIT_S, synchronize=self._synchronize
        ).median_s


def measure_compute(
    source: ExpertSource,
    engine: Engine,
    hardware: HardwareProfile,
    *,
    scratch: Path,
    progress: Progress = NO_PROGRESS,
) -> ComputeProfile:
    """Measure every kind of layer of a model, with one thread and with all, and keep the better.

    Small layers gain little from a second thread: see :data:`moepack.compute.WORTHWHILE`.

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
        (len(kinds) + 1) * len(counts) * _ROUNDS,
        "items",
    )
    rounds: dict[int, list[ComputeProfile]] = {threads: [] for threads in sorted(counts)}
    try:
        for _ in range(_ROUNDS):
            for threads, measured in rounds.items():
                torch.set_num_threads(threads)
                measured.append(_measure(probe, list(kinds.values()), progress))
    finally:
        progress.done()
        engine.reset()
    found = [_median_profile(engine.spec, measured) for measured in rounds.values()]
    best = worthwhile_threads(engine.spec, found)
    torch.set_num_threads(best.threads)
    return best


def _median_profile(spec: ModelSpec, rounds: Sequence[ComputeProfile]) -> ComputeProfile:
    """Point by point the median of several rounds; the spread is that of whole passes."""
    passes = (token_seconds, block_seconds)
    spread = max(
        summarise([seconds(spec, profile) for profile in rounds]).spread for seconds in passes
    )

    def middle(values: Sequence[float]) -> float:
        return summarise(values).median_s

    def curve(curves: Sequence[Curve | None]) -> Curve | None:
        known = [item for item in curves if item is not None]
        if not known:
            return None
        points = zip(*(item.seconds for item in known), strict=True)
        return Curve(known[0].tokens, tuple(middle(point) for point in points))

    def layer(entries: Sequence[LayerCompute]) -> LayerCompute:
        attention = curve([entry.attention for entry in entries])
        assert attention is not None
        return LayerCompute(
            layers=entries[0].layers,
            attention=attention,
            router=curve([entry.router for entry in entries]),
            expert=curve([entry.expert for entry in entries]),
            expert_split=curve([entry.expert_split for entry in entries]),
            ffn=curve([entry.ffn for entry in entries]),
            fixed=curve([entry.fixed for entry in entries]),
            transfer_s=middle([entry.transfer_s for entry in entries]),
        )

    head_s = middle([profile.head_s for profile in rounds])
    layers = zip(*(profile.layers for profile in rounds), strict=True)
    combined = tuple(layer(entries) for entries in layers)
    return replace(rounds[0], head_s=head_s, layers=combined, spread=round(spread, 3))


def _measure(probe: Probe, kinds: Sequence[Sequence[int]], progress: Progress) -> ComputeProfile:
    """Measure with the present number of threads."""
    import torch

    spec = probe.engine.spec
    device = probe.hardware.device
    timer = _Timer(torch.cuda.synchronize if device == "cuda" else None)
    layers = []
    for numbers in kinds:
        layers.append(_measure_kind(probe, tuple(numbers), timer))
        progress.advance(1)
    head_s = _measure_head(probe.engine, timer)
    progress.advance(1)
    return ComputeProfile(
        version=COMPUTE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        device=device,
        threads=torch.get_num_threads(),
        source="measured",
        how=(
            f"medians of {_ROUNDS} rounds of {_REPEATS} calls of the model's own layers, torch "
            f"{torch.__version__}"
        ),
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        context_tokens=_context_tokens(spec),
        head_s=head_s,
        spread=0.0,
        layers=tuple(layers),
    )


def probe_context_tokens(spec: ModelSpec) -> int:
    """Context that an engine must be open with to be measured."""
    return _context_tokens(spec) + 2 * _REPEATS


def _context_tokens(spec: ModelSpec) -> int:
    return min(CONTEXT_TOKENS, max(1, spec.context_length - 2 * _REPEATS))


def _measure_kind(probe: Probe, numbers: tuple[int, ...], timer: _Timer) -> LayerCompute:
    import torch

    engine = probe.engine
    spec = engine.spec
    layer = engine.decoder.layers[numbers[0]]
    moe = spec.layers[numbers[0]].moe
    context = _context_tokens(spec)
    tokens = [count for count in TOKENS if count <= context]
    sample = engine.decoder.embed(torch.arange(tokens[-1], device=engine.device) % spec.vocab_size)
    cache = engine.kv.layers[numbers[0]]

    def curve(call: Callable[[torch.Tensor], object]) -> Curve:
        with torch.inference_mode():
            times_s = [timer.median_s(partial(call, sample[:count])) for count in tokens]
        return Curve(tuple(tokens), tuple(times_s))

    def attend_prompt(hidden: torch.Tensor) -> torch.Tensor:
        cache.truncate(0)
        return layer.attend(hidden, 0)

    attention = curve(attend_prompt)
    positions = itertools.count(tokens[-1])
    with torch.inference_mode():
        attend_prompt(sample)
        token_s = timer.median_s(lambda: layer.attend(sample[:1], next(positions)))
    attention = Curve(attention.tokens, (token_s, *attention.seconds[1:]))
    if moe is None:
        ffn = curve(lambda hidden: hidden + layer.dense(layer.mlp_norm(hidden)))
        return LayerCompute(numbers, attention, None, None, None, ffn)
    experts = measure_experts(probe, numbers[0], curve)

    def beside() -> None:
        attend_prompt(sample[:1])
        engine.decoder.logits(sample[:1])

    return LayerCompute(
        layers=numbers,
        attention=attention,
        router=curve(lambda hidden: layer.route(layer.mlp_norm(hidden)).ids.tolist()),
        expert=experts.whole,
        expert_split=experts.split,
        ffn=curve(layer.shared) if moe.shared_intermediate_size else None,
        fixed=experts.fixed,
        transfer_s=measure_transfer(probe, numbers[0], sample[:1], experts, beside, timer.median_s),
    )


def _measure_head(engine: Engine, timer: _Timer) -> float:
    """Embedding, final norm, head, and the choice of one token."""
    import torch

    def step() -> int:
        hidden = engine.decoder.embed(torch.zeros(1, dtype=torch.int64, device=engine.device))
        return int(engine.decoder.logits(hidden)[-1].argmax())

    with torch.inference_mode():
        return timer.median_s(step)
