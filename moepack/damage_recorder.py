"""Watching a model to see what each expert gets, and what rounding it changes.

How the sequences are laid out is in :mod:`moepack.damage_probe`. In each layer an expert is read,
run on its inputs for the moments that rounding is weighed by (:mod:`moepack.calibration`), rounded
to every precision that it fits, and run on a sample of its inputs and on its tokens of the first
copies of the reference text, in float32, so that nothing but the rounding counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moepack.calibration import Calibration, LayerMoments
from moepack.encodings import ENCODINGS, fitting
from moepack.progress import Progress
from moepack.quantise import Importance, dequantise_expert, quantise_expert
from moepack.rounding import from_bf16

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.ffn import FfnWeights
    from moepack_runtime.router import Routing
    from moepack_runtime.store import ExpertSource

    from moepack.model_spec import MoeSpec
    from moepack.segments import Bits

#: Inputs that are kept of an expert.
SAMPLED = 256

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class _Seen(NamedTuple):
    """One block in front of a layer's experts.

    ``inputs`` [tokens, hidden] are what they see, ``norms`` [tokens] those of the residual stream
    in front of them, squared; ``ids`` and ``weights`` [tokens, top_k] the routing.
    """

    inputs: torch.Tensor
    norms: torch.Tensor
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


class _Read(NamedTuple):
    """An expert as its checkpoint has it, and in float32 (weights and biases)."""

    what: str
    bits: Mapping[str, Bits]
    floats: dict[str, np.ndarray]
    exact: FfnWeights


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
        self._moments: dict[int, LayerMoments] = {}

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
            norms = residual.float().square().sum(dim=1)
            self._blocks.append(_Seen(inputs, norms, routing.ids, routing.weights.float()))
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

    def calibration(self) -> Calibration:
        """What rounding was weighed by, once all layers have been gone through."""
        return Calibration.of(self._moments)

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
        experts, moments = [], []
        for expert in range(moe.num_experts):
            drawn = _draw(sample, expert, seed=(layer, expert))
            tokens, weights = _users(copies, expert)
            inputs = torch.cat([sample.inputs[drawn.tokens], copies.inputs[tokens]]).float()
            read = self._read(layer, expert, inputs.device)
            importance = _importance(sample, expert, read.exact, moe)
            moments.append(importance)
            exact, rounded = self._run(read, moe, inputs, names, importance)
            kept = len(drawn.tokens)
            differences = torch.stack(rounded).sub_(exact)
            experts.append(_Expert(drawn, differences[:, :kept].square().sum(dim=2)))
            output.index_add_(0, tokens, exact[kept:] * weights)
            for change, which in zip(changes, (0, -1), strict=True):
                change.index_add_(0, tokens, differences[which, kept:] * weights)
            self._progress.advance(1)
        self._moments[layer] = LayerMoments(*map(np.stack, zip(*moments, strict=True)))
        lengths = [len(block.ids) for block in self._blocks[calibration:]]
        dtype = self._stream[0].dtype
        parts = [torch.split(change.to(dtype), lengths) for change in changes]
        self._changes = [list(part[:reference]) for part in parts]
        for number, residual in enumerate(self._stream[calibration + reference :]):
            residual.add_(parts[number // reference][reference + number])
        norms = output[: sum(lengths[:reference])].square().sum(dim=1)
        stream = self._stream[: calibration + reference]
        self._open = _Layer(layer, names, experts, norms, stream)

    def _read(self, layer: int, expert: int, device: torch.device) -> _Read:
        bits = self._source.expert(layer, expert)
        floats = {name: _floats(item, self._spec.dtype) for name, item in bits.items()}
        return _Read(f"layer {layer}, expert {expert}", bits, floats, _ffn(floats, device))

    def _run(
        self,
        read: _Read,
        moe: MoeSpec,
        inputs: torch.Tensor,
        names: Sequence[str],
        importance: Importance,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """An expert's outputs, exact and in each encoding, float32 [rows, hidden]."""
        from moepack_runtime.ffn import gated_ffn

        rounded = []
        for name in names:
            stored = ENCODINGS[name]
            codes = quantise_expert(
                read.bits,
                stored,
                self._spec.dtype,
                read.what,
                importance=importance,
                pool=self._pool,
            )
            ffn = _ffn(read.floats | dequantise_expert(codes, stored), inputs.device)
            rounded.append(gated_ffn(inputs, ffn, moe.activation_spec))
        return gated_ffn(inputs, read.exact, moe.activation_spec), rounded


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


def _importance(seen: _Seen, expert: int, weights: FfnWeights, moe: MoeSpec) -> Importance:
    """The moments of an expert's inputs; see :mod:`moepack.calibration`.

    One that no token uses is taken to see what all tokens are.
    """
    import torch
    import torch.nn.functional as F
    from moepack_runtime.ffn import activate

    tokens, factors = _users(seen, expert)
    if not len(tokens):
        tokens = torch.arange(len(seen.ids), device=seen.ids.device)
        factors = torch.ones((len(tokens), 1), device=tokens.device)
    inputs = seen.inputs[tokens].float()
    counts = factors.square() / seen.norms[tokens].unsqueeze(1)
    neurons = activate(
        F.linear(inputs, weights.gate, weights.gate_bias),
        F.linear(inputs, weights.up, weights.up_bias),
        moe.activation_spec,
    )
    total = counts.sum()
    hidden, inner = ((counts * each.square()).sum(dim=0) / total for each in (inputs, neurons))
    return Importance(hidden.cpu().numpy(), inner.cpu().numpy())


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
