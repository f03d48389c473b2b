"""The tensors of a synthetic checkpoint, one after another, under the names of its family.

Every tensor is drawn from the seed and its own name, a block of rows at a time, so that the order
does not matter and no more than a block is held. Weights read and write the *token* part of the
residual stream (:mod:`benchmarks.synthetic_residual`); attention and router alone know the others.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.synthetic_attention import (
    KEY_NORM,
    QUERY_NORM,
    STOP,
    STOP_SHARE,
    Attention,
    Heads,
)
from benchmarks.synthetic_residual import (
    LOGIT_SPREAD,
    SILU_ENERGY,
    Stream,
    plan_stream,
    squared_weights,
    width,
)
from moepack.errors import UnsupportedModelError
from moepack.routing_model import RoutingModel

Array = npt.NDArray[np.float32]

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")

#: Elements of a block of rows.
_BLOCK = 1 << 22

#: Of the logits over the vocabulary: far from certain, and not even.
_HEAD_SPREAD = 1.5
_HEAD_CONTEXT_SHARE = 0.3

#: Logit of the end of a text, so that none ends by chance.
_END_LOGIT = -30.0
END_ID = 0

#: Of what the experts add, where there is a shared one beside them.
_SHARED_SHARE = 0.5

#: Of the logits of its gate, which so stays within a hundredth of one half.
_GATE_SPREAD = 0.01


class Tensor(NamedTuple):
    """One tensor: ``blocks`` gives its rows, float32, in pieces."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]


@dataclass(frozen=True)
class Shape:
    """What of a config decides the tensors."""

    family: str
    layers: int
    hidden: int
    vocab: int
    heads: Heads
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    normalised: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read a config of one of :data:`FAMILIES`.

        Raises
        ------
        UnsupportedModelError
            Of another family, or with tied embeddings.
        """
        family = config.get("model_type")
        if family not in FAMILIES or config.get("tie_word_embeddings"):
            raise UnsupportedModelError(
                f"a model of the family {family} cannot be written; expected one of "
                f"{', '.join(FAMILIES)}, its embeddings not tied"
            )
        queries = config["num_attention_heads"]
        keys = config.get("num_key_value_heads", queries)
        head_dim = config.get("head_dim") or config["hidden_size"] // queries
        mixtral = family == "mixtral"
        return cls(
            family=family,
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            vocab=config["vocab_size"],
            heads=Heads.of(queries, keys, head_dim, config["rope_theta"]),
            experts=config["num_local_experts" if mixtral else "num_experts"],
            top_k=config["num_experts_per_tok"],
            expert_width=config.get("moe_intermediate_size", config["intermediate_size"]),
            shared_width=config.get("shared_expert_intermediate_size", 0),
            normalised=mixtral or bool(config.get("norm_topk_prob")),
        )


def tensors(shape: Shape, model: RoutingModel, seed: int) -> Iterator[Tensor]:
    """Every tensor, in the order of the layers."""
    return _Drawing(shape, model, seed).tensors()


class _Drawing:
    def __init__(self, shape: Shape, model: RoutingModel, seed: int) -> None:
        self._shape, self._model, self._seed = shape, model, seed
        self._stream: Stream = plan_stream(
            model, shape.hidden, len(shape.heads.text), shape.layers, shape.experts, shape.top_k
        )
        self._places = self._stream.places

    def tensors(self) -> Iterator[Tensor]:
        vocab = (self._shape.vocab, self._shape.hidden)
        yield Tensor("model.embed_tokens.weight", vocab, self._embedding)
        for layer in range(self._shape.layers):
            prefix = f"model.layers.{layer}."
            yield self._ones(f"{prefix}input_layernorm.weight", self._shape.hidden)
            yield from self._attention(layer, f"{prefix}self_attn.")
            yield self._ones(f"{prefix}post_attention_layernorm.weight", self._shape.hidden)
            yield from self._moe(layer, prefix)
        yield self._ones("model.norm.weight", self._shape.hidden)
        yield Tensor("lm_head.weight", vocab, self._head)

    def _generator(self, name: str, block: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(name.encode()), block]))

    def _attention(self, layer: int, prefix: str) -> Iterator[Tensor]:
        heads, hidden = self._shape.heads, self._shape.hidden
        queries, keys = heads.queries * heads.head_dim, heads.keys * heads.head_dim

        for name, rows, columns in (
            ("query", queries, hidden),
            ("key", keys, hidden),
            ("value", keys, hidden),
            ("output", hidden, queries),
        ):
            full = f"{prefix}{name[0]}_proj."
            draw = functools.partial(self._projection, layer, name, f"{full}weight")
            yield Tensor(f"{full}weight", (rows, columns), draw)
            if self._shape.family == "qwen2_moe" and name != "output":
                yield self._filled(f"{full}bias", (rows,), 0.0)
        if self._shape.family in ("olmoe", "qwen3_moe"):
            per_head = self._shape.family == "qwen3_moe"
            for letter, size, norm in (("q", queries, QUERY_NORM), ("k", keys, KEY_NORM)):
                sizes = (heads.head_dim,) if per_head else (size,)
                value = norm / math.sqrt(heads.head_dim)  # what the norm leaves as it is
                yield self._filled(f"{prefix}{letter}_norm.weight", sizes, value)

    def _projection(self, layer: int, kind: str, name: str) -> Iterator[Array]:
        tokens = self._model.context_tokens
        made = Attention(self._stream, layer, self._shape.heads, tokens, self._generator(name))
        yield getattr(made, kind)()

    def _moe(self, layer: int, prefix: str) -> Iterator[Tensor]:
        shape = self._shape
        mixtral = shape.family == "mixtral"
        mlp = f"{prefix}{'block_sparse_moe' if mixtral else 'mlp'}."
        yield self._router(layer, f"{mlp}gate.weight")
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        added = self._stream.experts_add(layer)
        shared = _SHARED_SHARE if shape.shared_width else 0.0
        squares = squared_weights(shape.experts, shape.top_k, shape.normalised)
        spread = added * math.sqrt((1 - shared) / squares)
        for expert in range(shape.experts):
            path = f"{mlp}experts.{expert}."
            yield from self._ffn(layer, [path + name for name in names], shape.expert_width, spread)
        if shape.shared_width:
            path = f"{mlp}shared_expert."
            spread = 2 * added * math.sqrt(shared)  # its gate is at one half
            yield from self._ffn(layer, [path + name for name in names], shape.shared_width, spread)
            yield self._shared_gate(layer, f"{mlp}shared_expert_gate.weight")

    def _ffn(self, layer: int, names: list[str], inner: int, spread: float) -> Iterator[Tensor]:
        """A gated feed-forward network whose output has so large a standard deviation."""
        token, columns = self._places.token, [(self._places.token, self._unit(layer))]
        for name in names[:2]:
            yield self._matrix(f"{name}.weight", (inner, self._shape.hidden), columns)
        written = spread / math.sqrt(inner * SILU_ENERGY)
        size = self._shape.hidden, inner
        yield self._matrix(f"{names[2]}.weight", size, [(slice(0, inner), written)], token)

    def _shared_gate(self, layer: int, name: str) -> Tensor:
        """What is as good as one half, but not of a logit of 0: llama.cpp divides by that."""
        columns = [(self._places.token, _GATE_SPREAD * self._unit(layer))]
        return self._matrix(name, (1, self._shape.hidden), columns)

    def _unit(self, layer: int) -> float:
        """Of weights that read the token: what gives a product a standard deviation of 1."""
        gains = self._stream.layers[layer]
        return gains.routed_rms / (gains.amplitude * math.sqrt(width(self._places.token)))

    def _router(self, layer: int, name: str) -> Tensor:
        """Rows that read popularity, text, context and noise, each with its gain."""
        gains, places = self._stream.layers[layer], self._places
        total = math.sqrt(1 + gains.popularity**2 + gains.text**2 + gains.context**2)
        unit = LOGIT_SPREAD * gains.routed_rms / (gains.amplitude * total)
        parts = (
            (slice(0, 1), gains.popularity * gains.amplitude / self._stream.constant),
            (places.text if layer else places.first_text, gains.text),
            (places.context, gains.context),
            (places.token, 1.0),
        )
        columns = [(place, unit * gain / math.sqrt(width(place))) for place, gain in parts]
        return self._matrix(name, (self._shape.experts, self._shape.hidden), columns)

    def _embedding(self) -> Iterator[Array]:
        places = self._places
        for generator, block in self._blocks(
            "model.embed_tokens.weight", (self._shape.vocab, self._shape.hidden)
        ):
            rows = len(block)
            block[:, 0] = self._stream.constant
            block[:, places.salience] = generator.exponential(size=(rows, places.heads))
            stops = generator.random((rows, places.heads)) < STOP_SHARE
            block[:, places.stop] = np.where(stops, STOP, 1.0)
            block[:, places.token] = generator.standard_normal(
                (rows, width(places.token)), dtype=np.float32
            )
            yield block

    def _head(self) -> Iterator[Array]:
        stream, places = self._stream, self._places
        context = stream.layers[-1].amplitude
        parts = (
            (places.context, context, _HEAD_CONTEXT_SHARE),
            (places.token, stream.final, 1 - _HEAD_CONTEXT_SHARE),
        )
        first = True
        for generator, block in self._blocks(
            "lm_head.weight", (self._shape.vocab, self._shape.hidden)
        ):
            for place, size, share in parts:
                scale = _HEAD_SPREAD * stream.final_rms * math.sqrt(share / width(place)) / size
                drawn = generator.standard_normal((len(block), width(place)), dtype=np.float32)
                block[:, place] = drawn * np.float32(scale)
            if first:
                block[END_ID] = 0.0
                block[END_ID, 0] = _END_LOGIT * stream.final_rms / stream.constant
                first = False
            yield block

    def _matrix(
        self,
        name: str,
        size: tuple[int, int],
        columns: Sequence[tuple[slice, float]],
        rows: slice | None = None,
    ) -> Tensor:
        """Normal weights: of each range of columns a standard deviation, of others 0.

        Parameters
        ----------
        rows
            Where they are; others are 0. None: everywhere.
        """

        def blocks() -> Iterator[Array]:
            begin = 0
            for generator, block in self._blocks(name, size):
                low, high = 0, len(block)
                if rows is not None:
                    low = min(max(rows.start - begin, 0), len(block))
                    high = min(max(rows.stop - begin, 0), len(block))
                for place, scale in columns:
                    drawn = generator.standard_normal((high - low, width(place)), dtype=np.float32)
                    drawn *= np.float32(scale)
                    block[low:high, place] = drawn
                begin += len(block)
                yield block

        return Tensor(name, size, blocks)

    def _blocks(
        self, name: str, size: tuple[int, int]
    ) -> Iterator[tuple[np.random.Generator, Array]]:
        """Rows of zeros to be filled in, each block with a generator of its own."""
        step = max(1, _BLOCK // size[1])
        for number, begin in enumerate(range(0, size[0], step)):
            rows = min(step, size[0] - begin)
            yield self._generator(name, number), np.zeros((rows, size[1]), dtype=np.float32)

    def _ones(self, name: str, size: int) -> Tensor:
        return self._filled(name, (size,), 1.0)

    @staticmethod
    def _filled(name: str, size: tuple[int, ...], value: float) -> Tensor:
        return Tensor(name, size, lambda: iter([np.full(size, value, dtype=np.float32)]))
