"""What storing experts in an encoding loses, by the format that they are published in.

    python -m benchmarks.encodings --tokens 2048

A model's routed experts are rounded to a source's format (MXFP4, FP8 with blocks of 128 x 128, or
left as they are): that stands for a checkpoint as it is published. What is packed of it is compared
with that, by its weights and by what the model says of held-out text:

- the error of the weights, as a share of them (root of the sum of squares over that of theirs);
- mean KL divergence and top-1 agreement, as ``moepack eval`` has them.

First of each format stands what publishing it so has lost against the model as it is. Rounding is
not weighed by calibration here. ``INT4_G64`` is simulated: its groups take what they can of the
inputs of a matrix, and what is left (of 96 a third) has groups of 32. Peak memory: all experts,
three times.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from moepack_runtime.checkpoint_store import ExpertSource
from moepack_runtime.engine import Engine
from moepack_runtime.loading import open_checkpoint
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.options import at_least
from benchmarks.setting import described, named
from moepack.checkpoint import Checkpoint
from moepack.comparing import score_rows
from moepack.encodings import encoding
from moepack.held_out import WINDOW_TOKENS, learnt_tokens, passage, windows
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.progress import NO_PROGRESS
from moepack.quality import Quality, TokenScores, quality
from moepack.quantise import MATRICES, dequantise_expert, quantise_expert
from moepack.rounding import Floats, from_bf16, round_int4, to_bf16
from moepack.segments import Bits
from moepack.shipped import shipped_model, shipped_texts
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import read_texts
from moepack.window_runs import WindowRun, run_windows

#: Of E2M1, without signs; and the largest of E4M3.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E4M3_MAX = 448.0
_GROUP, _BLOCK = 32, 128

#: Rows of logits compared at once.
_ROWS = 512

Matrix = Callable[[Floats], Floats]
Expert = Mapping[str, Bits]


def mxfp4(weights: Floats) -> Floats:
    """The nearest in MXFP4, [outputs, inputs]: E2M1 times a power of two for 32 inputs."""
    grouped = weights.reshape(len(weights), -1, _GROUP)
    largest = np.abs(grouped).max(axis=2, keepdims=True)
    # The largest power of two of E2M1 is 4: the largest weight gets its exponent (OCP 1.0, 6.3).
    scale = np.ldexp(np.float32(1), np.frexp(largest)[1] - 3)
    scaled = np.abs(grouped) / scale
    nearest = np.abs(scaled[..., None] - _E2M1).argmin(axis=-1)
    found: Floats = np.sign(grouped) * _E2M1[nearest] * scale
    return found.reshape(weights.shape)


def fp8(weights: Floats) -> Floats:
    """The nearest in E4M3 with a scale for each block, as DeepSeek publishes it."""
    found = np.empty_like(weights)
    for row in range(0, len(weights), _BLOCK):
        for column in range(0, weights.shape[1], _BLOCK):
            block = (slice(row, row + _BLOCK), slice(column, column + _BLOCK))
            scale = np.float32(np.abs(weights[block]).max() / _E4M3_MAX) or np.float32(1)
            codes = torch.from_numpy(weights[block] / scale).to(torch.float8_e4m3fn)
            found[block] = codes.float().numpy() * scale
    return found


def int4_g64(weights: Floats) -> Floats:
    """What INT4_G64 stands for, with groups of 32 for inputs that are left over."""
    columns = weights.shape[1] // 64 * 64
    pieces = ((64, weights[:, :columns]), (32, weights[:, columns:]))
    return np.concatenate([_int4(piece, size) for size, piece in pieces if piece.size], axis=1)


def _int4(weights: Floats, group: int) -> Floats:
    grouped = np.ascontiguousarray(weights.reshape(-1, group).T)  # [inputs of a group, groups]
    rounded = round_int4(grouped)
    assert rounded.offset is not None
    scale, offset = from_bf16(rounded.scale), from_bf16(rounded.offset)
    return ((rounded.codes.astype(np.float32) - 8) * scale + offset).T.reshape(weights.shape)


class Lossy:
    """A source whose experts' matrices have gone through something; in BF16 again."""

    def __init__(self, source: ExpertSource, matrix: Matrix) -> None:
        self._source = source
        self._matrix = matrix
        self._made: dict[tuple[int, int], Expert] = {}

    def expert(self, layer: int, expert: int) -> Expert:
        """See :class:`moepack_runtime.checkpoint_store.ExpertSource`."""
        if (layer, expert) not in self._made:
            bits = self._source.expert(layer, expert)
            changed = {name: to_bf16(self._matrix(each)) for name, each in matrices(bits).items()}
            self._made[layer, expert] = {**bits, **changed}
        return self._made[layer, expert]

    def trunk_tensor(self, name: str) -> Bits:
        """As it is."""
        return self._source.trunk_tensor(name)


def matrices(bits: Expert) -> dict[str, Floats]:
    """Those of an expert, without biases."""
    names = [f"{matrix}.weight" for matrix in MATRICES]
    return {name: from_bf16(np.ascontiguousarray(bits[name]).view(np.uint16)) for name in names}


class Case(NamedTuple):
    """A model beside the one that it is made of.

    Attributes
    ----------
    published, stored : str
        The formats of the reference, and of what is compared with it.
    reference, model : ExpertSource
        Both in BF16; the model is stored in ``encoding`` when it runs.
    """

    published: str
    stored: str
    reference: ExpertSource
    model: ExpertSource
    encoding: str

    def values(self, layer: int, expert: int) -> dict[str, Floats]:
        """What an expert of the model comes to."""
        bits, stored = self.model.expert(layer, expert), encoding(self.encoding)
        if not stored.quantised:
            return matrices(bits)
        return dequantise_expert(quantise_expert(bits, stored, "BF16", "it"), stored)


def cases(checkpoint: ExpertSource) -> Iterator[Case]:
    """Every format, and every encoding that its experts may be packed in."""
    for published, matrix in (("BF16", None), ("MXFP4", mxfp4), ("FP8", fp8)):
        source = checkpoint
        if matrix is not None:
            source = Lossy(checkpoint, matrix)
            yield Case("BF16", published, checkpoint, source, "BF16")
        for name in ("INT8", "INT4_G32"):
            yield Case(published, name, source, source, name)
        yield Case(published, "INT4_G64", source, Lossy(source, int4_g64), "BF16")


def weight_error(spec: ModelSpec, case: Case) -> float:
    """Of all experts together."""
    lost = total = 0.0
    for layer in spec.moe_layers:
        for expert in range(spec.moe(layer).num_experts):
            found = case.values(layer, expert)
            for name, weights in matrices(case.reference.expert(layer, expert)).items():
                lost += float(np.square(weights.astype(np.float64) - found[name]).sum())
                total += float(np.square(weights.astype(np.float64)).sum())
    return float((lost / total) ** 0.5)


class Texts:
    """Held-out text, run through any number of models that share a trunk."""

    def __init__(self, checkpoint: Checkpoint, most_tokens: int) -> None:
        assert checkpoint.folder is not None
        self._spec = checkpoint.spec
        tokenizer = Tokenizer.load(checkpoint.folder)
        self._passages = []
        for text in read_texts(shipped_texts()):
            ids = tokenizer.encode(text.text, special=False)
            learnt = learnt_tokens(text.content, len(ids), ())
            self._passages.append(passage(text.name, ids, (), learnt, most_tokens))
        self._runs = [
            WindowRun(number, window)
            for number, text in enumerate(self._passages)
            for window in windows(text, WINDOW_TOKENS)
        ]
        self._states: dict[ExpertSource, list[torch.Tensor]] = {}

    def compare(self, case: Case) -> Quality:
        """Score a model beside its reference."""
        if case.reference not in self._states:
            kept: list[torch.Tensor] = []
            self._run(case.reference, "BF16", lambda _engine, _text, rows, _ids: kept.append(rows))
            self._states[case.reference] = [rows.clone() for rows in kept]
        expected = iter(self._states[case.reference])
        scores: list[list[TokenScores]] = [[] for _ in self._passages]

        def take(engine: Engine, text: int, rows: torch.Tensor, targets: Sequence[int]) -> None:
            exact = next(expected)
            for begin in range(0, len(targets), _ROWS):
                part = slice(begin, begin + _ROWS)
                ids = torch.tensor(targets[part])
                scores[text].append(score_rows(engine.logits, rows[part], ids, exact[part]))

        self._run(case.model, case.encoding, take)
        joined = [map(np.concatenate, zip(*each, strict=True)) for each in scores]
        return quality([TokenScores(*columns) for columns in joined])

    def _run(
        self,
        source: ExpertSource,
        name: str,
        take: Callable[[Engine, int, torch.Tensor, Sequence[int]], None],
    ) -> None:
        layout = uniform_layout(self._spec, 1.0, encodings=(name,) * len(self._spec.moe_layers))
        place = streaming_placement(
            self._spec,
            layout,
            "cpu",
            torch.get_num_threads(),
            context_tokens=WINDOW_TOKENS,
            staging_experts=2 * most_experts_of_a_token(self._spec),
        )
        with open_checkpoint(source, self._spec, layout, place) as engine:
            run_windows(
                engine,
                self._runs,
                8 * WINDOW_TOKENS,
                "run (tokens)",
                lambda *given: take(engine, *given),
                NO_PROGRESS,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for every format and encoding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        default=2048,
        metavar="N",
        help="scored of each text; default: 2048",
    )
    return named(_run, parser.parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    checkpoint = Checkpoint.open(shipped_model())
    texts = Texts(checkpoint, args.tokens)
    print("| published | stored | error of weights | KL, nats | same first choice |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for case in cases(checkpoint):
        error = weight_error(checkpoint.spec, case)
        near = texts.compare(case).nearness
        assert near is not None, "two models"
        kl, same = near.kl, near.top1_agreement.value
        interval = "" if kl.low is None else f" ({kl.low:.5f} to {kl.high:.5f})"
        print(
            f"| {case.published} | {case.stored} | {error:.3%} | {kl.value:.5f}{interval} "
            f"| {same:.4f} |",
            flush=True,
        )
        rows.append(
            {
                "published": case.published,
                "stored": case.stored,
                "error": error,
                "kl": kl.value,
                "top1_agreement": same,
            }
        )
    print(json.dumps(described(args) | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
