"""Running a model to see how fast its layers are and how it routes.

The texts go through the runtime as one long prefill, layer by layer over many sequences, so that
each expert is read once a chunk: a model that is larger than memory is profiled in about the time
that it takes to read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moepack.compute import ComputeProfile
from moepack.compute_probe import measure_compute, probe_context_tokens
from moepack.errors import ProfileError
from moepack.hardware import HardwareProfile
from moepack.layouts import uniform_layout
from moepack.progress import NO_PROGRESS, Progress
from moepack.routing import RoutingProfile, TextSource, make_profile
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import read_texts
from moepack.trace import NO_PREDICTION, Trace, part_of_tokens

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.router import Routing

    from moepack.checkpoint import Checkpoint
    from moepack.model_spec import ModelSpec

#: Tokens of one sequence: long enough for context, short enough to have many.
SEQUENCE_TOKENS = 512

#: Tokens run over all texts, an equal share of each.
DEFAULT_TOKENS = 32768

#: Tokens that go through the layers together; each chunk reads every expert once.
CHUNK_TOKENS = 16384


class RoutingRecorder:
    """Keeps what the routers decide, and what each would have guessed a layer earlier."""

    def __init__(self, engine: Engine) -> None:
        self._layers = engine.decoder.layers
        self._spec = engine.spec
        numbers = engine.spec.moe_layers
        self._index = {number: index for index, number in enumerate(numbers)}
        following = (*numbers[1:], numbers[0])
        self._following = dict(zip(numbers, following, strict=True))
        self.ids: list[list[torch.Tensor]] = [[] for _ in numbers]
        self.weights: list[list[torch.Tensor]] = [[] for _ in numbers]
        # predicted[i]: rankings for layer i, made while the layer before it ran.
        self.predicted: list[list[torch.Tensor]] = [[] for _ in numbers]

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        """See :class:`moepack_runtime.engine.Observer`."""
        index = self._index[layer]
        # Copies: a device's recorded steps write the next layer's over them.
        self.ids[index].append(routing.ids.clone())
        self.weights[index].append(routing.weights.clone())
        following = self._following[layer]
        target = self._layers[following]
        depth = min(2 * self._spec.moe(following).top_k, self._spec.moe(following).num_experts)
        ranking = target.rank(target.mlp_norm(residual), depth)
        self.predicted[self._index[following]].append(ranking)

    def trace(self, sequence: np.ndarray, part: np.ndarray) -> Trace:
        """What was recorded, as arrays; see :class:`moepack.routing.Trace`."""
        numbers = self._spec.moe_layers
        top_k = max(self._spec.moe(number).top_k for number in numbers)
        tokens = len(sequence)
        ids = np.zeros((tokens, len(numbers), top_k), dtype=np.uint16)
        weights = np.zeros((tokens, len(numbers), top_k), dtype=np.float16)
        predicted = np.full((tokens, len(numbers), 2 * top_k), NO_PREDICTION, dtype=np.uint16)
        for index in range(len(numbers)):
            chosen = _stack(self.ids[index])
            ids[:, index, : chosen.shape[1]] = chosen
            weights[:, index, : chosen.shape[1]] = _stack(self.weights[index])
            ranking = _stack(self.predicted[index])
            predicted[:, index, : ranking.shape[1]] = ranking
        # The first layer's guess comes from the token before it, so it moves one token on, and
        # the first token of a sequence has none.
        predicted[1:, 0] = predicted[:-1, 0].copy()
        first = np.concatenate([[True], sequence[1:] != sequence[:-1]])
        predicted[first, 0] = NO_PREDICTION
        return Trace(ids, weights, predicted, sequence, part)


def _stack(blocks: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([block.cpu().numpy() for block in blocks])


def require_downloaded(checkpoint: Checkpoint) -> Path:
    """The folder of a checkpoint whose weights are here.

    Raises
    ------
    ProfileError
        When only its headers are.
    """
    if checkpoint.folder is None:
        raise ProfileError(
            f"{checkpoint.name}: only its headers are here; download it first, with "
            f"moepack profile {checkpoint.name}"
        )
    return checkpoint.folder


def profile_model(
    checkpoint: Checkpoint,
    *,
    hardware: HardwareProfile,
    texts: Sequence[Path],
    scratch: Path,
    progress: Progress = NO_PROGRESS,
) -> tuple[ComputeProfile, RoutingProfile]:
    """Measure a model's compute on this machine, and record how it routes on texts.

    Reads the whole model once for every :data:`CHUNK_TOKENS` of text. Peak memory: the trunk, the
    hidden states of a chunk, and a few experts.

    Parameters
    ----------
    hardware
        This machine.
    scratch
        A folder on the disk that will hold the pack.

    Raises
    ------
    TextError
        When a text cannot be read.
    ProfileError
        When the texts are too short.
    RunError
        When the model has no tokenizer, or cannot be run here.
    """
    import torch
    from moepack_runtime.loading import open_checkpoint
    from moepack_runtime.tokenizer import Tokenizer

    spec = checkpoint.spec
    folder = require_downloaded(checkpoint)
    tokenizer = Tokenizer.load(folder)
    encoded = [(name, content, tokenizer.encode(text)) for name, content, text in read_texts(texts)]
    layout = uniform_layout(spec, 1.0)
    # Opening an engine sets the number of threads: here to what it is, the most to be measured.
    placement = streaming_placement(
        spec,
        layout,
        hardware.device,
        torch.get_num_threads(),
        context_tokens=max(min(SEQUENCE_TOKENS, spec.context_length), probe_context_tokens(spec)),
        staging_experts=2 * most_experts_of_a_token(spec),
    )
    with open_checkpoint(checkpoint, spec, layout, placement, progress=progress) as engine:
        compute = measure_compute(checkpoint, engine, hardware, scratch=scratch, progress=progress)
        routing = record_routing(
            engine,
            encoded,
            how=f"{len(encoded)} texts in sequences of {SEQUENCE_TOKENS} tokens, teacher-forced",
            progress=progress,
        )
    return compute, routing


def record_routing(
    engine: Engine,
    texts: Sequence[tuple[str, bytes, Sequence[int]]],
    *,
    how: str,
    tokens: int = DEFAULT_TOKENS,
    progress: Progress = NO_PROGRESS,
) -> RoutingProfile:
    """Run texts and record the routing.

    Parameters
    ----------
    texts
        Name, content and token ids of each; of each at most an equal share of ``tokens`` is run,
        from its beginning.
    how
        In words, for the profile.

    Raises
    ------
    ProfileError
        When the texts hold too few tokens to say anything.
    """
    share = tokens // max(1, len(texts))
    length = min(SEQUENCE_TOKENS, engine.spec.context_length)
    sequences: list[Sequence[int]] = []
    numbers: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    sources = []
    for name, content, ids in texts:
        taken = ids[:share]
        sources.append(TextSource(name, hashlib.sha256(content).hexdigest(), len(taken)))
        parts.append(part_of_tokens(len(taken)))
        for start in range(0, len(taken), length):
            piece = taken[start : start + length]
            numbers.append(np.full(len(piece), len(sequences), dtype=np.uint32))
            sequences.append(piece)
    total = sum(len(piece) for piece in sequences)
    if total < 2:
        raise ProfileError(
            f"the calibration texts hold {total} tokens; expected some hundreds at least: "
            "name longer ones with --text"
        )
    recorder = RoutingRecorder(engine)
    engine.observe(recorder)
    progress.start("record the routing (tokens)", total, "items")
    try:
        for chunk in _chunks(sequences):
            engine.survey(chunk)
            progress.advance(sum(len(piece) for piece in chunk))
    finally:
        progress.done()
        engine.observe(None)
    return make_profile(
        recorder.trace(np.concatenate(numbers), np.concatenate(parts)),
        model_name=engine.spec.name,
        model_digest=engine.spec.digest,
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        how=how,
        sources=tuple(sources),
        layers=_moe_layers(engine.spec),
        with_hit_rates=True,
    )


def _moe_layers(spec: ModelSpec) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (number, spec.moe(number).num_experts, spec.moe(number).top_k) for number in spec.moe_layers
    )


def _chunks(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    chunks: list[list[Sequence[int]]] = [[]]
    for piece in sequences:
        held = sum(len(other) for other in chunks[-1])
        if held and held + len(piece) > CHUNK_TOKENS:
            chunks.append([])
        chunks[-1].append(piece)
    return chunks
