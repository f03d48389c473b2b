"""Measuring a packed model as it runs: the same texts and draws for whoever compares."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moepack.errors import WorkspaceError
from moepack.progress import NO_PROGRESS, Progress
from moepack.shipped import shipped_texts

if TYPE_CHECKING:
    from moepack_runtime.engine import Engine
    from moepack_runtime.stats import LayerStats, RunStats
    from moepack_runtime.tokenizer import Tokenizer

    from moepack.yardstick import PaceKeeper

#: Texts measured: one could lie by its subject, and more take longer than they teach.
NUM_TEXTS = 3

_RATES = ("tokens_per_s", "prefill_tokens_per_s", "link_bytes_per_s")
_LARGEST = (
    "prompt_tokens",
    "new_tokens",
    "peak_fast_bytes",
    "peak_process_bytes",
    "process_base_bytes",
)


def shipped_prompts(tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """The ends of some texts: a routing profile holds the end of each back from its fitting.

    Raises
    ------
    WorkspaceError
        When this installation has no texts.
    """
    texts = shipped_texts()
    if not texts:
        raise WorkspaceError("this installation of moepack lacks its texts; install it again")
    step = max(1, len(texts) // NUM_TEXTS)
    prompts = []
    for path in texts[::step][:NUM_TEXTS]:
        ids = tokenizer.encode(path.read_text("utf-8"))
        ids *= -(-length // len(ids))  # a text that is too short is repeated
        prompts.append(ids[-length:])
    return prompts


def warm_up(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Leave out of a measurement what is not priced.

    The first pass of a process picks its kernels, one for every shape, takes memory that no pass
    has used before, and reads every file for the first time. What one prompt leaves of that to
    another is a sixth of its time on a small model: so every prompt runs once. The last one does so
    last, so that the first finds other experts.
    """
    from moepack_runtime.sampling import Sampler

    for prompt in prompts:
        new_tokens = warming_tokens(engine, prompt)
        list(engine.generate(prompt, max_new_tokens=new_tokens, sampler=Sampler()))


def warming_tokens(engine: Engine, prompt: Sequence[int]) -> int:
    """New tokens that warming up draws after a prompt: two, if the context has room for them."""
    return max(1, min(2, engine.placement.context_tokens - len(prompt)))


def draw(engine: Engine, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
    """What is measured: tokens at temperature 1, from seed 0."""
    from moepack_runtime.sampling import Sampler, SamplingParams

    sampler = Sampler(SamplingParams(temperature=1.0))
    return engine.generate(prompt, max_new_tokens=new_tokens, sampler=sampler)


def measure(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    keeper: PaceKeeper | None = None,
    progress: Progress = NO_PROGRESS,
) -> tuple[RunStats, list[int]]:
    """Generate after each prompt. Returns the mean over the prompts, and every token drawn.

    Parameters
    ----------
    keeper
        Notes how fast the processor is meanwhile.
    """
    runs: list[RunStats] = []
    tokens: list[int] = []
    warm_up(engine, prompts)
    progress.start("measure (tokens)", len(prompts) * new_tokens, "items")
    try:
        for prompt in prompts:
            drawn = draw(engine, prompt, new_tokens)
            for token in drawn if keeper is None else keeper.beside(drawn):
                tokens.append(token)
                progress.advance(1)
            runs.append(engine.stats())
    finally:
        progress.done()
    return average(runs), tokens


def average(runs: Sequence[RunStats]) -> RunStats:
    """Of several generations: means of times and shares, harmonic of rates, the most of sizes.

    Layer by layer likewise. What some of them did not measure is left to the others.
    """
    by_layer: dict[int, list[LayerStats]] = {}
    for run in runs:
        for layer in run.layers:
            by_layer.setdefault(layer.layer, []).append(layer)
    layers = tuple(
        dataclasses.replace(found[0], **_averaged(found, leave="layer"))
        for _, found in sorted(by_layer.items())
    )
    return dataclasses.replace(runs[0], layers=layers, **_averaged(runs, leave="layers"))


def _averaged(records: Sequence[RunStats] | Sequence[LayerStats], *, leave: str) -> dict[str, Any]:
    """Every field but one."""
    fields: dict[str, float | None] = {}
    for name in (field.name for field in dataclasses.fields(records[0]) if field.name != leave):
        values = [value for item in records if (value := getattr(item, name)) is not None]
        if not values:
            fields[name] = None
        elif name in _LARGEST:
            fields[name] = max(values)
        elif name in _RATES:
            fields[name] = statistics.harmonic_mean(values)
        else:
            fields[name] = statistics.fmean(values)
    return fields
