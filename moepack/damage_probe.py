"""Measuring what rounding does: every expert at every precision, on what a text gives it.

A number of sequences go through the model together, layer by layer:

- *calibration* text, of which each expert's inputs are sampled;
- *reference* text, shorter;
- two copies of that, to which in every layer is added what rounding all its experts changes; to the
  one in the finest encoding that they fit, to the other in the coarsest;
- two copies for every layer, to which the same is added in that layer alone.

The logits of each copy beside those of the reference are its divergence. So one pass over the model
measures them all.

In each layer an expert is read, rounded to every precision that it fits, and run on its sample and
on its tokens of the first copies, in float32, so that nothing but the rounding counts.

Memory: two experts in the model's dtype and two in float32, what rounding one takes
(:mod:`moepack.quantise`), and the hidden states of the sequences three times. Experts are read
twice, once here and once by the engine; rounding takes far longer than that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moepack.comparing import rows_within, score_rows
from moepack.damage import DAMAGE_VERSION, DamageProfile, LayerDamage
from moepack.encodings import ENCODINGS, fitting
from moepack.errors import ProfileError
from moepack.layouts import PREFILL_BLOCK_TOKENS, uniform_layout
from moepack.profiling import CHUNK_TOKENS, DEFAULT_TOKENS, SEQUENCE_TOKENS
from moepack.progress import NO_PROGRESS, Progress
from moepack.quantise import MATRICES, dequantise_expert, quantise_expert
from moepack.rounding import from_bf16
from moepack.routing import TextSource
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import read_texts
from moepack.trace import ROUTING_PARTS, part_of_tokens
from moepack.units import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.ffn import FfnWeights
    from moepack_runtime.layer_loop import Hidden
    from moepack_runtime.router import Routing
    from moepack_runtime.store import ExpertSource

    from moepack.checkpoint import Checkpoint
    from moepack.model_spec import ModelSpec, MoeSpec
    from moepack.plan import DeviceKind
    from moepack.segments import Bits

#: Inputs that are kept of an expert.
SAMPLED = 256

#: The reference text: as many tokens as let its copies be about a chunk, within these.
_REFERENCE_TOKENS = (256, 2048)

#: Sequences of the reference text are no shorter, unless the texts are.
_LEAST_REFERENCE = 64

#: Logits that are compared at once take about so much.
_LOGIT_BYTES = 256 * MIB

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class _Seen(NamedTuple):
    """One block in front of a layer's experts.

    ``inputs`` [tokens, hidden] are what they see, ``ids`` and ``weights`` [tokens, top_k] the
    routing.
    """

    inputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class _Drawn(NamedTuple):
    """Some of the tokens that use an expert.

    ``tokens`` [rows] are their places in the text; ``factor`` [rows] is what a squared error of
    each counts for in the mean over all tokens.
    """

    tokens: torch.Tensor
    factor: torch.Tensor


class _Expert(NamedTuple):
    """What an expert got, and the squared norms of its errors, float32 [encodings, rows]."""

    drawn: _Drawn
    squares: torch.Tensor


class _Layer(NamedTuple):
    """A layer whose experts have been run, and whose output is not yet known.

    ``output`` float32 [tokens] is the squared norm of what its routed experts add to the reference
    text; ``stream`` are the blocks of the residual stream of calibration and reference, to which
    the engine adds meanwhile.
    """

    number: int
    encodings: tuple[str, ...]
    experts: list[_Expert]
    output: torch.Tensor
    stream: list[torch.Tensor]


class Errors(NamedTuple):
    """A layer's figures but for its divergences; see :class:`moepack.damage.LayerDamage`."""

    layer: int
    encodings: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]
    output: float


class DamageRecorder:
    """Keeps what experts get, measures them, and carries each layer's damage on in its copy.

    Parameters
    ----------
    calibration, reference
        How many sequences of each run, in this order and in front of the copies; none is longer
        than a block.
    """

    def __init__(
        self,
        engine: Engine,
        source: ExpertSource,
        calibration: int,
        reference: int,
        progress: Progress,
        pool: Executor,
    ) -> None:
        self._decoder = engine.decoder
        self._spec = engine.spec
        self._source = source
        self._counts = calibration, reference
        self._progress = progress
        self._pool = pool
        self._index = {number: index for index, number in enumerate(engine.spec.moe_layers)}
        self._layer: int | None = None
        self._number = 0  # of the block
        self._blocks: list[_Seen] = []
        self._stream: list[torch.Tensor] = []
        self._open: _Layer | None = None
        self._changes: list[list[torch.Tensor]] = []  # fine, coarse: of each reference sequence
        self._found: list[Errors] = []

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        """See :class:`moepack_runtime.observers.Observer`.

        What is added to the residual here is added to the output of the layer: its experts have
        got their inputs already.
        """
        calibration, reference = self._counts
        if layer != self._layer:
            self._close()
            self._layer, self._number, self._blocks, self._stream = layer, 0, [], []
        number = self._number
        self._number += 1
        if number < calibration + 3 * reference:
            inputs = self._decoder.layers[layer].mlp_norm(residual)
            self._blocks.append(_Seen(inputs, routing.ids, routing.weights.float()))
            self._stream.append(residual)
            return
        if self._blocks:
            self._measure(layer)
            self._blocks = []
        copy, sequence = divmod(number - calibration - 3 * reference, reference)
        index, coarse = divmod(copy, 2)
        if index == self._index[layer]:
            residual.add_(self._changes[coarse][sequence])

    def found(self) -> tuple[Errors, ...]:
        """Of every layer, once all have been gone through."""
        self._close()
        return tuple(self._found)

    def _close(self) -> None:
        """The layer before is through: what its output is added to is known."""
        import torch

        if self._open is None:
            return
        number, encodings, experts, output, blocks = self._open
        self._open = None
        norms = torch.cat([block.float().square().sum(dim=1) for block in blocks])
        tokens = len(norms) - len(output)
        errors = [
            (squares * (drawn.factor / norms[drawn.tokens])).sum(dim=1).tolist()
            for drawn, squares in experts
        ]
        share = float((output / norms[tokens:]).mean())
        self._found.append(Errors(number, encodings, tuple(zip(*errors, strict=True)), share))

    def _measure(self, layer: int) -> None:
        import torch

        moe = self._spec.moe(layer)
        names = fitting(self._spec.hidden_size, moe.intermediate_size)
        calibration, reference = self._counts
        sample = _joined(self._blocks[:calibration])
        copies = _joined(self._blocks[calibration:])  # the reference, and the two that change
        output = torch.zeros_like(copies.inputs, dtype=torch.float32)
        changes = [torch.zeros_like(output) for _ in range(2)]
        experts = []
        for expert in range(moe.num_experts):
            drawn = _draw(sample, expert, seed=(layer, expert))
            tokens, weights = _users(copies, expert)
            inputs = torch.cat([sample.inputs[drawn.tokens], copies.inputs[tokens]]).float()
            exact, rounded = self._run(layer, expert, moe, inputs, names)
            kept = len(drawn.tokens)
            differences = torch.stack(rounded).sub_(exact)
            experts.append(_Expert(drawn, differences[:, :kept].square().sum(dim=2)))
            output.index_add_(0, tokens, exact[kept:] * weights)
            for change, which in zip(changes, (0, -1), strict=True):
                change.index_add_(0, tokens, differences[which, kept:] * weights)
            self._progress.advance(1)
        lengths = [len(block.ids) for block in self._blocks[calibration:]]
        dtype = self._stream[0].dtype
        parts = [torch.split(change.to(dtype), lengths) for change in changes]
        self._changes = [list(part[:reference]) for part in parts]
        for number, residual in enumerate(self._stream[calibration + reference :]):
            residual.add_(parts[number // reference][reference + number])
        norms = output[: sum(lengths[:reference])].square().sum(dim=1)
        stream = self._stream[: calibration + reference]
        self._open = _Layer(layer, names, experts, norms, stream)

    def _run(
        self,
        layer: int,
        expert: int,
        moe: MoeSpec,
        inputs: torch.Tensor,
        names: Sequence[str],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """An expert's outputs, exact and in each encoding, float32 [rows, hidden]."""
        from moepack_runtime.ffn import gated_ffn

        bits = self._source.expert(layer, expert)
        what, dtype = f"layer {layer}, expert {expert}", self._spec.dtype
        biases = {name: _floats(item, dtype) for name, item in bits.items() if "bias" in name}
        exact = {
            f"{matrix}.weight": _floats(bits[f"{matrix}.weight"], dtype) for matrix in MATRICES
        }

        def run(weights: Mapping[str, np.ndarray]) -> torch.Tensor:
            ffn = _ffn({**weights, **biases}, inputs.device)
            return gated_ffn(inputs, ffn, moe.activation_spec)

        rounded = []
        for name in names:
            stored = ENCODINGS[name]
            codes = quantise_expert(bits, stored, dtype, what, pool=self._pool)
            rounded.append(run(dequantise_expert(codes, stored)))
        return run(exact), rounded


def _draw(seen: _Seen, expert: int, seed: tuple[int, int]) -> _Drawn:
    """At most :data:`SAMPLED` tokens of an expert.

    One that no token uses counts as used once, by any: the text is only a sample itself.
    """
    import torch

    tokens, weights = _users(seen, expert)
    total, count = len(seen.ids), len(tokens)
    if count == 0:
        tokens = torch.arange(total, device=seen.ids.device)
        weights = torch.full((total, 1), float(seen.weights.mean()), device=tokens.device)
    if len(tokens) > SAMPLED:
        rows = np.random.default_rng(seed).permutation(len(tokens))[:SAMPLED]
        kept = torch.from_numpy(np.sort(rows)).to(tokens.device)
        tokens, weights = tokens[kept], weights[kept]
    return _Drawn(tokens, weights[:, 0].square() * (max(1, count) / len(tokens) / total))


def _users(seen: _Seen, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that use an expert, [count], and its weight for each, [count, 1]."""
    tokens, places = (seen.ids == expert).nonzero(as_tuple=True)
    return tokens, seen.weights[tokens, places].unsqueeze(1)


def _joined(blocks: Sequence[_Seen]) -> _Seen:
    import torch

    return _Seen(*(torch.cat(column) for column in zip(*blocks, strict=True)))


def _floats(bits: Bits, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return from_bf16(np.ascontiguousarray(bits).view(np.uint16))
    return np.ascontiguousarray(bits).view(_NUMPY[dtype]).astype(np.float32)


def _ffn(weights: Mapping[str, np.ndarray], device: torch.device) -> FfnWeights:
    import torch
    from moepack_runtime.ffn import FfnWeights

    tensors = {
        name.replace(".weight", "").replace(".", "_"): torch.from_numpy(array).to(device)
        for name, array in weights.items()
    }
    return FfnWeights(**tensors)


def measure_damage(
    checkpoint: Checkpoint,
    *,
    device: DeviceKind,
    texts: Sequence[Path],
    progress: Progress = NO_PROGRESS,
) -> DamageProfile:
    """Measure every expert of a model at every precision that it fits.

    Reads the whole model twice and rounds it once for each precision. Of each text only tokens are
    used that a routing profile would fit to, so that what :mod:`moepack.held_out` scores stays
    unseen.

    Raises
    ------
    TextError
        When a text cannot be read.
    ProfileError
        When the texts are too short, or no precision fits the model.
    NonFiniteWeightError
        When a weight is NaN or infinite.
    RunError
        When the model has no tokenizer, or cannot be run here.
    """
    import torch
    from moepack_runtime.loading import open_checkpoint
    from moepack_runtime.tokenizer import Tokenizer

    spec = checkpoint.spec
    if checkpoint.folder is None:
        raise ProfileError(
            f"{checkpoint.name}: only its headers are here; download it first, with "
            f"moepack profile {checkpoint.name}"
        )
    _require_precisions(spec)
    tokenizer = Tokenizer.load(checkpoint.folder)
    read = read_texts(texts)
    learnt = [_learnt(tokenizer.encode(text.text), len(read)) for text in read]
    calibration = [piece for ids in learnt for piece in _pieces(ids)]
    reference = _reference(learnt, len(spec.moe_layers))
    total = sum(map(len, calibration))
    if not reference:
        raise ProfileError(
            f"the calibration texts hold {total} tokens; expected some hundreds at least: "
            "name longer ones with --text"
        )
    copies = reference * (2 + 2 * len(spec.moe_layers))
    layout = uniform_layout(spec, 1.0)
    placement = streaming_placement(
        spec,
        layout,
        device,
        torch.get_num_threads(),
        context_tokens=min(SEQUENCE_TOKENS, spec.context_length),
        staging_experts=2 * most_experts_of_a_token(spec),
    )
    with (
        open_checkpoint(checkpoint, spec, layout, placement, progress=progress) as engine,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        recorder = DamageRecorder(
            engine, checkpoint, len(calibration), len(reference), progress, pool
        )
        engine.observe(recorder)
        experts = sum(spec.moe(number).num_experts for number in spec.moe_layers)
        progress.start("round every expert (experts)", experts, "items")
        try:
            stream = engine.survey([*calibration, *reference, *copies])
        finally:
            progress.done()
            engine.observe(None)
        fine, coarse, *of_layers = _divergences(engine, stream[len(calibration) :], reference)
    return DamageProfile(
        version=DAMAGE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        weights_digest=checkpoint.weights_digest,
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        tokens=total,
        sampled=SAMPLED,
        divergence_tokens=sum(map(len, reference)),
        fine_divergence=fine,
        coarse_divergence=coarse,
        sources=tuple(
            TextSource(text.name, hashlib.sha256(text.content).hexdigest(), len(ids))
            for text, ids in zip(read, learnt, strict=True)
        ),
        layers=tuple(
            LayerDamage(*errors, *pair)
            for errors, pair in zip(
                recorder.found(), zip(of_layers[::2], of_layers[1::2], strict=True), strict=True
            )
        ),
    )


def _require_precisions(spec: ModelSpec) -> None:
    for number in spec.moe_layers:
        width = spec.moe(number).intermediate_size
        if not fitting(spec.hidden_size, width):
            raise ProfileError(
                f"{spec.name}: experts of {width} neurons and a hidden size of {spec.hidden_size} "
                "fit no precision below the model's own, expected multiples of 4; leave out --bits"
            )


def _learnt(ids: Sequence[int], texts: int) -> Sequence[int]:
    """What is used of a text: what *fit* has of it, and no more than a share of a chunk."""
    parts = part_of_tokens(min(len(ids), DEFAULT_TOKENS // texts))
    return ids[: min(int((parts == ROUTING_PARTS.index("fit")).sum()), CHUNK_TOKENS // texts)]


def _pieces(ids: Sequence[int]) -> list[Sequence[int]]:
    length = min(SEQUENCE_TOKENS, PREFILL_BLOCK_TOKENS)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def _reference(learnt: Sequence[Sequence[int]], layers: int) -> list[Sequence[int]]:
    """The beginnings of as many texts as leave each a sequence of some length."""
    least, most = _REFERENCE_TOKENS
    wanted = min(max(CHUNK_TOKENS // (2 * layers + 3), least), most)
    count = max(1, min(len(learnt), wanted // _LEAST_REFERENCE))
    length = min(wanted // count, SEQUENCE_TOKENS, PREFILL_BLOCK_TOKENS)
    taken = [learnt[number * len(learnt) // count][:length] for number in range(count)]
    return [piece for piece in taken if len(piece) > 1]


def _divergences(
    engine: Engine, stream: Sequence[Hidden], reference: Sequence[Sequence[int]]
) -> list[float]:
    """KL of each copy of the reference text, whose own states come first."""
    import torch

    rows = rows_within(_LOGIT_BYTES, engine.spec.vocab_size)
    exact, copies = stream[: len(reference)], stream[len(reference) :]
    found = []
    for begin in range(0, len(copies), len(reference)):
        total, tokens = 0.0, 0
        for block, base in zip(copies[begin : begin + len(reference)], exact, strict=True):
            for part, of_base in _row_pairs(block.hidden, base.hidden, rows):
                ids = torch.zeros(len(part), dtype=torch.int64, device=part.device)
                kl = score_rows(engine.logits, part, ids, of_base).kl
                assert kl is not None
                total, tokens = total + float(kl.sum()), tokens + len(part)
        found.append(total / tokens)
    return found


def _row_pairs(
    one: torch.Tensor, other: torch.Tensor, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for begin in range(0, len(one), rows):
        yield one[begin : begin + rows], other[begin : begin + rows]
