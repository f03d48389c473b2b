"""Watching a model to see what each expert gets, and what rounding it changes.

How the sequences are laid out is in :mod:`moepack.damage_probe`. In each layer an expert is read,
run on its inputs for the moments that rounding is weighed by (:mod:`moepack.calibration`), rounded
to every precision that it fits (by second moments, too: :mod:`moepack.measured_moments`), and run
on a sample of its inputs and on its tokens of the first
copies of the reference text, in float32, so that nothing but the rounding counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moepack.calibration import Calibration, LayerMoments
from moepack.damage_inputs import Drawn, Seen, draw, inputs_of, joined, unshared, users
from moepack.encodings import ENCODINGS, fitting
from moepack.measured_moments import SecondMoments
from moepack.mixed_precision import expert_bytes
from moepack.on_miss import LEFT_OUT, LOWERED, fates
from moepack.plan import OnMiss
from moepack.progress import Progress
from moepack.quantise import Importance, dequantise_expert, quantise_expert
from moepack.rounding import from_bf16

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from moepack_runtime.checkpoint_store import ExpertSource
    from moepack_runtime.engine import Engine
    from moepack_runtime.ffn import FfnWeights
    from moepack_runtime.router import Routing

    from moepack.factor_file import FactorFile
    from moepack.model_spec import MoeSpec
    from moepack.segments import Bits

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


class Sequences(NamedTuple):
    """How many there are of each kind, in this order and in front of the copies.

    None is longer than a block. ``shared`` has of each of calibration how many of its first tokens
    are of the reference, too.
    """

    calibration: int
    reference: int
    shared: tuple[int, ...]


class Misses(NamedTuple):
    """The rules for missing experts that are tried, with low copies in ``encoding``."""

    encoding: str
    rules: tuple[OnMiss, ...]


class _Expert(NamedTuple):
    """What an expert got, and the squared norms of its errors, float32 [encodings, rows]."""

    drawn: Drawn
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
    sequences
        What runs in front of the copies of the reference.
    misses
        What is tried in copies of its own, behind the first two.
    factors
        Where the second moments go.
    """

    def __init__(
        self,
        engine: Engine,
        source: ExpertSource,
        sequences: Sequences,
        misses: Misses,
        progress: Progress,
        pool: Executor,
        factors: FactorFile,
    ) -> None:
        self._decoder = engine.decoder
        self._spec = engine.spec
        self._source = source
        self._counts = sequences
        self._misses = misses
        # Bytes of the experts of all tokens: what each rule does not fetch, and all of them.
        self._saved_bytes = np.zeros(len(misses.rules))
        self._used_bytes = 0
        # Everything that is changed in every layer, the unchanged in front.
        self._changing = sequences.reference * (3 + len(misses.rules))
        self._progress = progress
        self._pool = pool
        self._index = {number: index for index, number in enumerate(engine.spec.moe_layers)}
        self._layer: int | None = None
        self._number = 0  # of the block
        self._blocks: list[Seen] = []
        self._stream: list[torch.Tensor] = []
        self._open: _Layer | None = None
        self._changes: list[list[torch.Tensor]] = []  # fine, coarse: of each reference sequence
        self._found: list[Errors] = []
        self._moments: dict[int, LayerMoments] = {}
        self._second = SecondMoments(engine.spec, factors)

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        """See :class:`moepack_runtime.observers.Observer`.

        What is added to the residual here is added to the output of the layer: its experts have
        got their inputs already.
        """
        calibration, reference, _ = self._counts
        if layer != self._layer:
            self._close()
            self._layer, self._number, self._blocks, self._stream = layer, 0, [], []
        number = self._number
        self._number += 1
        if number < calibration + self._changing:
            inputs = self._decoder.layers[layer].mlp_norm(residual)
            norms = residual.float().square().sum(dim=1)
            self._blocks.append(Seen(inputs, norms, routing.ids, routing.weights.float()))
            self._stream.append(residual)
            return
        if self._blocks:
            self._measure(layer)
            self._blocks = []
        copy, sequence = divmod(number - calibration - self._changing, reference)
        index, coarse = divmod(copy, 2)
        if index == self._index[layer]:
            residual.add_(self._changes[coarse][sequence])

    def found(self) -> tuple[Errors, ...]:
        """Of every layer, once all have been gone through."""
        self._close()
        return tuple(self._found)

    def saved(self) -> list[float]:
        """Under each rule for missing experts, the share of all bytes that is not fetched."""
        return [float(saved) / self._used_bytes for saved in self._saved_bytes]

    def calibration(self) -> Calibration:
        """What rounding was weighed by, once all layers have been gone through."""
        return self._second.calibration(self._moments)

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
        calibration, reference, shared = self._counts
        sample = joined(self._blocks[:calibration])
        fitted = unshared(self._blocks[:calibration], shared) or sample
        copies = joined(self._blocks[calibration:])  # the reference, and those that change
        lengths = [len(block.ids) for block in self._blocks[calibration:]]
        lost = self._find_fates(layer, copies.weights, lengths[:reference])
        low = names.index(self._misses.encoding)
        output = torch.zeros_like(copies.inputs, dtype=torch.float32)
        changes = [torch.zeros_like(output) for _ in range(3)]  # fine, coarse, by the rules
        experts, moments = [], []
        second = self._second.of_layer(layer, fitted)
        for expert in range(moe.num_experts):
            drawn = draw(sample, expert, seed=(layer, expert))
            tokens, weights = users(copies, expert)
            inputs = torch.cat([sample.inputs[drawn.tokens], copies.inputs[tokens]]).float()
            read = self._read(layer, expert, inputs.device)
            means = inputs_of(sample, expert, read.exact, moe).moments()
            moments.append((means.hidden, means.neurons))
            importance = second.importance(
                expert, inputs_of(fitted, expert, read.exact, moe), means
            )
            exact, rounded = self._run(read, moe, inputs, names, importance)
            kept = len(drawn.tokens)
            differences = torch.stack(rounded).sub_(exact)
            experts.append(_Expert(drawn, differences[:, :kept].square().sum(dim=2)))
            output.index_add_(0, tokens, exact[kept:] * weights)
            fate = lost[tokens, (copies.ids[tokens] == expert).long().argmax(dim=1)].unsqueeze(1)
            missed = differences[low, kept:] * (fate == LOWERED) - exact[kept:] * (fate == LEFT_OUT)
            rounding = (differences[0, kept:], differences[-1, kept:], missed)
            for change, difference in zip(changes, rounding, strict=True):
                change.index_add_(0, tokens, difference * weights)
            self._progress.advance(1)
        self._moments[layer] = LayerMoments(*map(np.stack, zip(*moments, strict=True)))
        dtype = self._stream[0].dtype
        parts = [torch.split(change.to(dtype), lengths) for change in changes]
        self._changes = [list(part[:reference]) for part in parts[:2]]
        for number, residual in enumerate(self._stream[calibration + reference :]):
            residual.add_(parts[min(number // reference, 2)][reference + number])
        norms = output[: sum(lengths[:reference])].square().sum(dim=1)
        stream = self._stream[: calibration + reference]
        self._open = _Layer(layer, names, experts, norms, stream)

    def _find_fates(
        self, layer: int, weights: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """What each rule makes of its copy's experts, int8 [tokens of all copies, top_k].

        Parameters
        ----------
        weights
            [tokens, top_k], of the reference and of its copies.
        lengths
            Tokens of each sequence of the reference.
        """
        import torch

        tokens, moe = sum(lengths), self._spec.moe(layer)
        found = np.zeros(weights.shape, np.int8)
        exact, low = (
            expert_bytes(self._spec, moe, name)
            for name in (self._spec.dtype, self._misses.encoding)
        )
        each = weights.cpu().numpy()
        for number, rule in enumerate(self._misses.rules):
            rows = slice((3 + number) * tokens, (4 + number) * tokens)
            found[rows] = fates(each[rows], rule)
            lowered, left_out = (int((found[rows] == fate).sum()) for fate in (LOWERED, LEFT_OUT))
            self._saved_bytes[number] += lowered * (exact - low) + left_out * exact
        self._used_bytes += tokens * each.shape[1] * exact
        return torch.from_numpy(found).to(weights.device)

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


def _floats(bits: Bits, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return from_bf16(np.ascontiguousarray(bits).view(np.uint16))
    return np.ascontiguousarray(bits).view(_NUMPY[dtype]).astype(np.float32)


def _ffn(weights: Mapping[str, np.ndarray], device: torch.device) -> FfnWeights:
    import torch
    from moepack_runtime.ffn import FfnWeights

    tensors: dict[str, Any] = {
        name.replace(".weight", "").replace(".", "_"): torch.from_numpy(array).to(device)
        for name, array in weights.items()
    }
    return FfnWeights(**tensors)
