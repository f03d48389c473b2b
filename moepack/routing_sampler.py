"""Drawing traces from a routing model: reproducible, and quick enough to plan with."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moepack.routing_model import FitSample, RoutingModel
from moepack.trace import NO_PREDICTION, Trace, part_of_tokens

#: Layers drawn at once, so that their scores stay small.
_CHUNK_LAYERS = 8

Array = npt.NDArray[np.float32]


def sample_trace(
    model: RoutingModel,
    layers: Sequence[tuple[int, int, int]],
    *,
    tokens: int,
    sequences: int,
    seed: int,
) -> Trace:
    """Draw a trace.

    The same arguments give the same trace, as far as numpy promises that for its generators.
    Routing weights are not modelled: all of a token's experts weigh the same.

    Parameters
    ----------
    layers
        (decoder layer, experts, top-k) for every layer with experts.
    tokens, sequences
        Tokens in all, and texts that they are split into as evenly as possible.

    Returns
    -------
    Trace
        Its parts as in a recorded one.

    Raises
    ------
    ValueError
        When there are fewer tokens than texts, or no text.
    """
    if not 1 <= sequences <= tokens:
        raise ValueError(f"{tokens} tokens in {sequences} texts, expected one or more in each")
    lengths = [len(part) for part in np.array_split(np.arange(tokens), sequences)]
    width = max((top_k for _, _, top_k in layers), default=0)
    ids = np.zeros((tokens, len(layers), width), dtype=np.uint16)
    weights = np.zeros(ids.shape, dtype=np.float16)
    predicted = np.full((tokens, len(layers), 2 * width), NO_PREDICTION, dtype=np.uint16)
    generator = np.random.Generator(np.random.PCG64(seed))
    for rows, experts, top_k in _chunks(layers):
        scores = _scores(model, rows, len(layers), experts, lengths, generator)
        ids[:, rows, :top_k] = _best(scores, top_k)
        weights[:, rows, :top_k] = 1 / top_k
        depth = min(2 * top_k, experts)
        _disturb(scores, model, rows, top_k, generator)
        predicted[:, rows, :depth] = _best(scores, depth)
    predicted[np.cumsum([0, *lengths[:-1]]), :1] = NO_PREDICTION
    return Trace(
        ids,
        weights,
        predicted,
        sequence=np.repeat(np.arange(sequences, dtype=np.uint32), lengths),
        part=np.concatenate([part_of_tokens(length) for length in lengths]),
    )


def sample_texts(model: RoutingModel, sample: FitSample, seed: int) -> list[npt.NDArray[np.uint16]]:
    """The experts alone, uint16 [tokens, L, K] of each text, best first."""
    lengths = sample.text_tokens
    ids = np.empty((sum(lengths), sample.layers, sample.top_k), dtype=np.uint16)
    generator = np.random.Generator(np.random.PCG64(seed))
    for rows, experts, top_k in _chunks([(0, sample.experts, sample.top_k)] * sample.layers):
        ids[:, rows] = _best(_scores(model, rows, len(ids[0]), experts, lengths, generator), top_k)
    return np.split(ids, np.cumsum(lengths)[:-1])


def _best(scores: Array, count: int) -> npt.NDArray[np.intp]:
    """The experts with the largest scores, in descending order.

    Parameters
    ----------
    scores : [..., experts]
    """
    experts = scores.shape[-1]
    chosen = np.argpartition(scores, experts - count, axis=-1)[..., experts - count :]
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, axis=-1)


def _chunks(layers: Sequence[tuple[int, int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring layers of one shape: where they are, their experts and top-k."""
    begin = 0
    while begin < len(layers):
        _, experts, top_k = layers[begin]
        end = begin + 1
        while end < min(len(layers), begin + _CHUNK_LAYERS) and layers[end][1:] == (experts, top_k):
            end += 1
        yield slice(begin, end), experts, top_k
        begin = end


def _scores(
    model: RoutingModel,
    rows: slice,
    num_layers: int,
    experts: int,
    lengths: Sequence[int],
    generator: np.random.Generator,
) -> Array:
    """Scores of every token, float32 [tokens, layers of the chunk, experts]."""
    depth = np.arange(rows.start, rows.stop) / max(1, num_layers - 1)

    def spread(values: tuple[float, ...]) -> Array:
        return np.interp(depth, model.depths, values).astype(np.float32)[:, None]

    def normal(*shape: int) -> Array:
        return generator.standard_normal((*shape, len(depth), experts), dtype=np.float32)

    lasting = spread(model.popularity) * normal() + spread(model.text) * normal(len(lengths))
    scores = normal(sum(lengths))
    context = _context(normal(sum(lengths)), lengths, model.context_tokens)
    context *= spread(model.context)
    scores += context
    end = 0
    for text, length in zip(lasting, lengths, strict=True):
        scores[end : end + length] += text
        end += length
    return scores


def _context(normal: Array, lengths: Sequence[int], tokens: float) -> Array:
    """Standard normal draws [tokens, ...] made into the process; each text starts it anew."""
    keep = math.exp(-1 / tokens)
    old, new = np.float32(keep), np.float32(math.sqrt(1 - keep * keep))
    kept = np.empty_like(normal[0])
    begin = 0
    for length in lengths:
        for token in range(begin + 1, begin + length):
            np.multiply(normal[token - 1], old, out=kept)
            normal[token] *= new
            normal[token] += kept
        begin += length
    return normal


def _disturb(
    scores: Array, model: RoutingModel, rows: slice, top_k: int, generator: np.random.Generator
) -> None:
    """Add to the scores, in place, what a prediction one layer earlier gets wrong."""
    experts = scores.shape[2]
    noise = generator.standard_normal(scores.shape, dtype=np.float32)
    recalls = [*model.first_recall, *[model.recall] * rows.stop][rows]
    for index, recall in enumerate(recalls):
        ratio = _noise_ratio(experts, top_k, recall)
        if ratio == math.inf:
            scores[:, index] = noise[:, index]
        else:
            spread = float(scores[:, index].std())
            scores[:, index] += np.float32(ratio * spread) * noise[:, index]


@functools.cache
def _noise_ratio(experts: int, top_k: int, recall: float) -> float:
    """Noise that leaves such a share of the top-k among the top-k, over the spread of the scores.

    inf where the share is no more than chance. Scores and noise are normal, so that one table by
    simulation serves all layers of a shape (derived).
    """
    if recall <= top_k / experts:
        return math.inf
    ratios, recalls = _recall_table(experts, top_k)
    return float(np.interp(-recall, [-share for share in recalls], ratios))


@functools.cache
def _recall_table(experts: int, top_k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ratios of noise, ascending, and the recall under each."""
    generator = np.random.Generator(np.random.PCG64(experts))
    rows = max(512, 8192 // top_k)
    scores = generator.standard_normal((rows, experts), dtype=np.float32)
    noise = generator.standard_normal((rows, experts), dtype=np.float32)
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(chosen, _best(scores, top_k), True, axis=1)
    ratios = [0.0, *np.geomspace(0.02, 40, 24).tolist()]
    shares = [
        float(np.take_along_axis(chosen, _best(scores + np.float32(r) * noise, top_k), 1).mean())
        for r in ratios
    ]
    return tuple(ratios), tuple(np.minimum.accumulate(shares).tolist())
