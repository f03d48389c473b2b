"""Opening engines in tests, over any store and behind any twin of the transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.engine import Engine
from moepack_runtime.loading import open_transfer
from moepack_runtime.predict import Predictor
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.transfer import Transfer

from moepack.checkpoint import Checkpoint
from moepack.layout import Layout
from moepack.plan import Placement

Twin = Callable[[Transfer], Transfer]


def open_engine(
    checkpoint: Checkpoint,
    layout: Layout,
    placement: Placement,
    *,
    store: SegmentStore | None = None,
    twin: Twin = lambda transfer: transfer,
    check: CheckMode = CheckMode.FIRST,
    predictor: Predictor | None = None,
    progress: Progress = NO_PROGRESS,
) -> Engine:
    """An engine over a plain checkpoint, or over ``store``, with its transfer wrapped."""
    store = store or CheckpointStore(checkpoint, checkpoint.spec, layout)
    transfer = open_transfer(checkpoint.spec, layout, store, placement.device, check=check)
    try:
        return Engine(
            checkpoint.spec,
            layout,
            placement,
            store=store,
            transfer=twin(transfer),
            check=check,
            predictor=predictor,
            progress=progress,
        )
    except BaseException:
        transfer.close()
        raise


def all_logits(engine: Engine, prompt: Sequence[int], following: Sequence[int]) -> torch.Tensor:
    """Logits at every position of the prompt, then of each following token, one at a time."""
    steps = [engine.forward(prompt, all_logits=True)]
    steps += [engine.forward([token]) for token in following]
    return torch.cat(steps)


def greedy(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely tokens, one after another."""
    tokens = [int(engine.prefill(prompt).argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.decode(tokens[-1]).argmax()))
    return tokens
