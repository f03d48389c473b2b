"""A generation with everything that its caches did: what a replay must find again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from moepack_runtime.engine import Engine
from moepack_runtime.observers import PassFound
from moepack_runtime.sampling import Sampler, SamplingParams
from moepack_runtime.stats import RunStats


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """One prompt and the tokens drawn after it, greedily.

    Attributes
    ----------
    passes : tuple of int
        Tokens of each forward pass: those of the prompt, then one at a time. The last token that
        was drawn went through no pass.
    layers : tuple of int
        Decoder numbers of the layers that have experts.
    ids : tuple of int [tokens, top_k]
        Of each of these layers the experts of every token, pass by pass.
    hits : tuple of bool [tokens, top_k]
        Whether the cached part (the top, or the whole expert) of each was resident when its pass
        came to the layer.
    stats : RunStats
        What the engine measured.
    """

    passes: tuple[int, ...]
    layers: tuple[int, ...]
    ids: tuple[npt.NDArray[np.uint16], ...]
    hits: tuple[npt.NDArray[np.bool_], ...]
    stats: RunStats


class _Recorder:
    def __init__(self, layers: Sequence[int]) -> None:
        self.ids: dict[int, list[Sequence[Sequence[int]]]] = {layer: [] for layer in layers}
        self.hits: dict[int, list[list[list[bool]]]] = {layer: [] for layer in layers}

    def passed(self, layer: int, tokens: Sequence[Sequence[int]], found: PassFound) -> None:
        self.ids[layer].append(tokens)
        self.hits[layer].append([[expert in found.hits for expert in token] for token in tokens])


def record_run(engine: Engine, prompt: Sequence[int], new_tokens: int) -> RecordedRun:
    """Generate, and record it. The engine is one that has run nothing yet."""
    layers = engine.spec.moe_layers
    recorder = _Recorder(layers)
    engine.observe_passes(recorder)
    greedy = Sampler(SamplingParams(temperature=0.0))
    for _ in engine.generate(prompt, max_new_tokens=new_tokens, sampler=greedy):
        pass
    engine.observe_passes(None)
    return RecordedRun(
        passes=tuple(map(len, recorder.ids[layers[0]])),
        layers=tuple(layers),
        ids=tuple(np.concatenate(recorder.ids[layer]).astype(np.uint16) for layer in layers),
        hits=tuple(np.concatenate(recorder.hits[layer]) for layer in layers),
        stats=engine.stats(),
    )
