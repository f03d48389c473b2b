"""Running windows of texts through an engine, as many at once as its memory is planned for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moepack.held_out import Window
from moepack.progress import Progress, Unit

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.layer_loop import Hidden


class WindowRun(NamedTuple):
    """A window, and which of the texts it is of."""

    text: int
    window: Window


#: Takes a text's number, hidden states [rows, hidden], and the tokens that they predict.
Take = Callable[[int, "torch.Tensor", Sequence[int]], None]


def run_windows(
    engine: Engine,
    runs: Sequence[WindowRun],
    tokens_at_once: int,
    what: str,
    take: Take,
    progress: Progress,
) -> None:
    """Run every window, and hand over what predicts its scored tokens, in order.

    Parameters
    ----------
    tokens_at_once
        Tokens that may go through the layers together; a window does in any case.
    what
        For the progress, which is told of tokens.
    """
    progress.start(what, sum(len(run.window.tokens) for run in runs), "items")
    try:
        for together in _together(runs, tokens_at_once, engine.spec.rope.switch_tokens):
            sequences = [run.window.tokens for run in together]
            inside = _OfLayers(progress, sum(map(len, sequences)))
            stream = engine.survey(sequences, inside)
            _hand_over(together, stream, take)
    finally:
        progress.done()


def decode_windows(
    engine: Engine, runs: Sequence[WindowRun], what: str, take: Take, progress: Progress
) -> None:
    """The same one token at a time, as a text is generated: for plans under which that differs.

    What lies before the tokens that are scored is a prompt, but for the last of it: so each scored
    token is what a decoded one predicts (at the beginning of a text its second follows a prompt of
    one token). The caches go on from window to window.
    """
    import torch

    progress.start(what, sum(len(run.window.tokens) for run in runs), "items")
    try:
        for text, (tokens, first) in runs:
            prompt = max(1, first - 1)
            engine.reset()
            states = [engine.last_state(tokens[:prompt])]
            progress.advance(prompt)
            for token in tokens[prompt:-1]:
                states.append(engine.last_state([token]))
                progress.advance(1)
            progress.advance(1)
            take(text, torch.cat(states[first - prompt :]), tokens[first:])
        engine.reset()
    finally:
        progress.done()


def _together(
    runs: Sequence[WindowRun], tokens_at_once: int, switch_tokens: int | None
) -> Iterator[list[WindowRun]]:
    """Windows that go through the layers at once: one at least, more as they fit."""
    group: list[WindowRun] = []
    held = 0
    for run in runs:
        count = len(run.window.tokens)
        if group and (
            held + count > tokens_at_once
            or _is_long(run, switch_tokens) != _is_long(group[0], switch_tokens)
        ):
            yield group
            group, held = [], 0
        group.append(run)
        held += count
    if group:
        yield group


def _is_long(run: WindowRun, switch_tokens: int | None) -> bool:
    return switch_tokens is not None and len(run.window.tokens) > switch_tokens


def _hand_over(runs: Sequence[WindowRun], stream: Sequence[Hidden], take: Take) -> None:
    blocks = iter(stream)
    for text, (tokens, first) in runs:
        begin = 0
        while begin < len(tokens):
            block = next(blocks)
            assert block.start == begin, f"a block from {block.start}, expected {begin}"
            end = begin + block.hidden.shape[0]
            # The state at a place predicts the token behind it.
            targets = tokens[max(begin + 1, first) : end + 1]
            if targets:
                at = max(begin, first - 1) - begin
                take(text, block.hidden[at : at + len(targets)], targets)
            begin = end


class _OfLayers:
    """Progress of one pass in tokens: of each the share of the layers that it has gone through."""

    def __init__(self, outer: Progress, tokens: int) -> None:
        self._outer = outer
        self._tokens = tokens
        self._layers = 1
        self._done = 0

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:  # noqa: ARG002
        self._layers = total or 1

    def advance(self, amount: int) -> None:
        before = self._tokens * self._done // self._layers
        self._done += amount
        self._outer.advance(self._tokens * self._done // self._layers - before)

    def done(self) -> None:
        pass
