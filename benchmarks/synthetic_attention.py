"""Attention of a synthetic checkpoint: heads that remember the context and the text.

Queries are the same for every token, and keys nearly so: they come from the constant coordinate.
Three kinds of heads:

- *context*: logits fall with the distance, by the rotation of the position embeddings alone.
- *mean* (first layer): all tokens weigh the same. A token in four is a *stop* and counts -3, the
  others +1, so the mean over the tokens so far is 1 before the first stop and smaller ever after.
- *text*: logits grow with that mean, so the tokens before the first stop get all of the attention,
  and among them the most salient one. What such a head reads stays the same to the end of a text,
  and is another in another text. In the first layer, where the means are not there yet, salience
  alone decides: the text changes when a more salient token comes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.synthetic_residual import Fading, LayerGains, Stream, fading, width
from moepack.errors import UnsupportedModelError

Array = npt.NDArray[np.float32]

#: How often a token is a stop, and what it counts; the others count 1.
STOP_SHARE = 0.25
STOP = -3.0

_MEAN_GAIN = 100.0
_SALIENCE_GAIN = 3.0

#: Norms of all queries and of all keys, before and after they are normalised. Logits need large
#: ones somewhere; keys are small, because the salient ones must not change the norm of all.
QUERY_NORM = 200.0
KEY_NORM = 30.0


class Heads(NamedTuple):
    """Heads of a model and their kinds. Numbers are of key heads; each query group uses one."""

    queries: int
    keys: int
    head_dim: int
    theta: float
    context: tuple[int, ...]
    mean: int
    text: tuple[int, ...]

    @classmethod
    def of(cls, queries: int, keys: int, head_dim: int, theta: float) -> Heads:
        """Kinds for so many heads.

        Raises
        ------
        UnsupportedModelError
            When the three kinds do not fit.
        """
        if keys < 3 or head_dim < 16:
            raise UnsupportedModelError(
                f"{keys} key heads of {head_dim}, expected at least 3 of at least 16: one for the "
                "context, one for means and one for the text"
            )
        context = max(1, keys // 4)
        text = min(8, keys - context - 1)
        first = context + 1
        kinds = tuple(range(context)), context, tuple(range(first, first + text))
        return cls(queries, keys, head_dim, theta, *kinds)

    def query_of(self, key_head: int) -> int:
        """The query head that uses a key head."""
        return key_head * (self.queries // self.keys)


class Attention:
    """Projections of one layer, float32, [out, in].

    Parameters
    ----------
    generator
        For the values and the output.
    tokens
        In which the context falls to 1/e.
    """

    def __init__(
        self,
        stream: Stream,
        layer: int,
        heads: Heads,
        tokens: float,
        generator: np.random.Generator,
    ) -> None:
        self._stream, self._layer, self._heads = stream, layer, heads
        self._gains: LayerGains = stream.layers[layer]
        self._fading = _fading(heads.head_dim, heads.theta, tokens, heads.head_dim // 2 - 3)
        self._generator = generator
        # Of the pairs of dimensions that rotate together the slowest tells texts; the two before
        # it hold what brings all queries, and all keys, to one norm.
        self._slowest = heads.head_dim // 2 - 1
        self._query_rest, self._key_rest = self._slowest - 2, self._slowest - 1

    def query(self) -> Array:
        """[query heads * head_dim, hidden]."""
        heads = self._heads
        wanted = np.zeros((heads.queries, heads.head_dim))
        for head in heads.context:
            scales, _ = self._context_scales()
            wanted[heads.query_of(head), : len(scales)] = scales
        for head in heads.text:
            wanted[heads.query_of(head), self._slowest] = 0.99 * QUERY_NORM
        rest = QUERY_NORM**2 - (wanted**2).sum(axis=1)
        wanted[:, self._query_rest] = np.sqrt(rest)
        return self._constant(wanted.ravel())

    def key(self) -> Array:
        """[key heads * head_dim, hidden]."""
        heads, places = self._heads, self._stream.places
        wanted = np.zeros((heads.keys, heads.head_dim))
        for head in heads.context:
            _, scales = self._context_scales()
            wanted[head, : len(scales)] = scales
        wanted[:, self._key_rest] = np.sqrt(KEY_NORM**2 - (wanted**2).sum(axis=1))
        weight = self._constant(wanted.ravel())
        scale = math.sqrt(heads.head_dim) / (0.99 * QUERY_NORM) * self._gains.entering_rms
        for index, head in enumerate(heads.text):
            row = head * heads.head_dim + self._slowest
            weight[row, places.salience.start + index] = _SALIENCE_GAIN * scale
            if self._layer:
                weight[row, places.mean.start + index] = _MEAN_GAIN * scale
        return weight

    def value(self) -> Array:
        """[key heads * head_dim, hidden]: unit normal values out of the token's part."""
        heads, places = self._heads, self._stream.places
        rms = self._gains.entering_rms
        weight = np.zeros((heads.keys, heads.head_dim, self._stream.hidden), dtype=np.float32)
        shape = (heads.keys, heads.head_dim, width(places.token))
        drawn = self._generator.standard_normal(shape, dtype=np.float32)
        weight[:, :, places.token] = drawn * (
            rms / (self._gains.amplitude * math.sqrt(width(places.token)))
        )
        weight[heads.mean] = 0.0
        for index in range(places.heads):
            weight[heads.mean, index, places.stop.start + index] = rms
        return weight.reshape(-1, self._stream.hidden)

    def output(self) -> Array:
        """[hidden, query heads * head_dim]."""
        heads, places, gains = self._heads, self._stream.places, self._gains
        weight = np.zeros((self._stream.hidden, heads.queries, heads.head_dim), dtype=np.float32)
        self._write(weight, heads.context, places.context, gains.added / self._fading.spread)
        if self._layer == 0:
            self._write(weight, heads.text, places.first_text, 1 / _text_spread(0.0))
            for index in range(places.heads):
                weight[places.mean.start + index, heads.query_of(heads.mean), index] = 1.0
        else:
            added = gains.amplitude if self._layer == 1 else gains.added
            self._write(weight, heads.text, places.text, added / _text_spread(_MEAN_GAIN))
        return weight.reshape(self._stream.hidden, -1)

    def _write(self, weight: Array, heads: tuple[int, ...], place: slice, spread: float) -> None:
        """Random weights from some heads, for a sum of so large a standard deviation."""
        shape = (width(place), self._heads.head_dim)
        scale = spread / math.sqrt(len(heads) * self._heads.head_dim)
        for head in heads:
            drawn = self._generator.standard_normal(shape, dtype=np.float32)
            weight[place, self._heads.query_of(head)] = drawn * scale

    def _context_scales(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of queries and keys: their products are the amplitudes, undone the usual scaling."""
        amplitudes = np.array(self._fading.amplitudes) * math.sqrt(self._heads.head_dim)
        share = math.sqrt(QUERY_NORM / KEY_NORM)
        size = np.sqrt(np.abs(amplitudes))
        return size * share, np.sign(amplitudes) * size / share

    def _constant(self, wanted: npt.NDArray[np.float64]) -> Array:
        """Weights that give this for every token."""
        weight = np.zeros((len(wanted), self._stream.hidden), dtype=np.float32)
        weight[:, 0] = wanted * (self._gains.entering_rms / self._stream.constant)
        return weight


@functools.cache
def _fading(head_dim: int, theta: float, tokens: float, pairs: int) -> Fading:
    return fading(head_dim, theta, tokens, pairs)


@functools.cache
def _text_spread(mean_gain: float, tokens: int = 256, texts: int = 256) -> float:
    """Standard deviation of what a head for the text reads, of standard normal values."""
    generator = np.random.Generator(np.random.PCG64(tokens))
    stop = generator.random((texts, tokens)) < STOP_SHARE
    means = np.where(stop, STOP, 1.0).cumsum(axis=1) / np.arange(1, tokens + 1)
    logits = mean_gain * means + _SALIENCE_GAIN * generator.exponential(size=stop.shape)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return float(np.sqrt((weights**2).sum(axis=1).mean()))
