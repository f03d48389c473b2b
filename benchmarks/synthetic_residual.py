"""What the residual stream of a synthetic checkpoint is made of, and how large each part is.

The routing model of :mod:`moepack.routing_model` says that an expert's score is popularity + text +
context + noise. Random weights do the same where each of them has a place of its own in the
residual stream, and the router's rows read every place with the gain that the model states:

- *constant*: one coordinate, the same for every token. Popularity.
- *text*: attention to one of the first tokens, which stays the same to the end of a text. See
  :mod:`benchmarks.synthetic_attention`.
- *context*: attention that fades with the distance.
- *token*: the embedding, and what the experts add to it. Noise.

What a layer adds after its router was predicted makes the prediction wrong. So every layer adds as
much of each part as leaves the stated share of the next layer's experts predictable, and all parts
keep their proportion while the stream grows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.routing_model import RoutingModel

#: Standard deviation of a token's router logits over the experts.
LOGIT_SPREAD = 1.5

#: Share of the first coordinate in the energy of the stream at the beginning.
_CONSTANT_SHARE = 1 / 16

#: E[silu(z)^2] for a standard normal z (derived, numerically).
SILU_ENERGY = 0.3557

_LEAST_FRESH, _MOST_FRESH = 0.01, 0.95
_CONTEXT_TOKENS = 16384


class Places(NamedTuple):
    """Where the parts are among the coordinates of the residual stream.

    Attributes
    ----------
    heads : int
        Heads that look for the first tokens; each has a coordinate in the next three.
    salience, stop, mean : slice
        Of a token: how much it draws attention; whether the first tokens end before it; and the
        mean of that over the tokens so far, which the first layer writes.
    first_text : slice
        The text as the first layer's router sees it: before that layer the means are not there.
    text, context, token : slice
    """

    heads: int
    salience: slice
    stop: slice
    mean: slice
    first_text: slice
    text: slice
    context: slice
    token: slice

    @classmethod
    def of(cls, hidden: int, heads: int) -> Places:
        """Places for a stream of so many coordinates."""
        sizes = (1, heads, heads, heads, hidden // 16, hidden // 8, hidden // 8)
        ends = np.cumsum(sizes).tolist()
        slices = [slice(a, b) for a, b in zip(ends, [*ends[1:], hidden], strict=True)]
        return cls(heads, *slices)


def width(place: slice) -> int:
    """Coordinates of a place."""
    return int(place.stop - place.start)


class LayerGains(NamedTuple):
    """Sizes at one layer.

    Attributes
    ----------
    popularity, text, context : float
        Gains of the router, in those of the noise.
    amplitude : float
        Standard deviation of the parts when the router sees them; 1 at the first layer.
    before : float
        The same for what is there when the layer begins.
    entering_rms, routed_rms : float
        Root mean square of the stream when the layer begins, and when it is routed.
    """

    popularity: float
    text: float
    context: float
    amplitude: float
    before: float
    entering_rms: float
    routed_rms: float

    @property
    def added(self) -> float:
        """Standard deviation of what this layer's attention adds to the parts that it writes."""
        return math.sqrt(self.amplitude**2 - self.before**2)


@dataclass(frozen=True)
class Stream:
    """The residual stream of a whole model.

    Attributes
    ----------
    constant : float
        The first coordinate.
    layers : tuple of LayerGains
    final : float
        Standard deviation of the parts behind the last layer.
    final_rms : float
    """

    hidden: int
    places: Places
    constant: float
    layers: tuple[LayerGains, ...]
    final: float
    final_rms: float

    def experts_add(self, layer: int) -> float:
        """Standard deviation of what a layer's experts add to each coordinate of *token*."""
        after = [*(gains.amplitude for gains in self.layers), self.final][layer + 1]
        return math.sqrt(after**2 - self.layers[layer].amplitude ** 2)


def plan_stream(
    model: RoutingModel, hidden: int, heads: int, layers: int, experts: int, top_k: int
) -> Stream:
    """Sizes such that scores are those of the routing model, and as predictable.

    Parameters
    ----------
    heads
        Heads that look for the first tokens.
    """
    places = Places.of(hidden, heads)
    constant = math.sqrt(_CONSTANT_SHARE * hidden)
    depths = np.arange(layers) / max(1, layers - 1)
    spreads = [
        tuple(float(np.interp(depth, model.depths, values)) for depth in depths)
        for values in (model.popularity, model.text, model.context)
    ]
    recalls = [*model.first_recall, *[model.recall] * layers][:layers]
    rows = []
    amplitude = 1.0
    for layer, (popularity, text, context) in enumerate(zip(*spreads, strict=True)):
        before = 0.0
        if layer:
            before = amplitude
            kept = predictable_share(experts, top_k, round(recalls[layer], 4))
            text_before = 0.0 if layer == 1 else text**2
            total = 1 + popularity**2 + text**2 + context**2
            fresh = 1 - (kept * total - popularity**2) / (text_before + context**2 + 1)
            amplitude = before / math.sqrt(1 - min(max(fresh, _LEAST_FRESH), _MOST_FRESH))
        written = places.context, (places.text if layer else places.first_text)
        # The first layer finds the embedding alone, the second no text yet.
        found = [places.context, places.text][: max(0, layer)]
        entering = {place.start: before for place in found} | {places.token.start: amplitude}
        routed = entering | {place.start: amplitude for place in written}
        rows.append(
            LayerGains(
                popularity,
                text,
                context,
                amplitude,
                before,
                _rms(hidden, places, constant, entering),
                _rms(hidden, places, constant, routed),
            )
        )
    final = amplitude * (rows[-1].amplitude / rows[-1].before if layers > 1 else 1.0)
    ends = {places.context.start: amplitude, places.text.start: amplitude}
    final_rms = _rms(hidden, places, constant, ends | {places.token.start: final})
    return Stream(hidden, places, constant, tuple(rows), final, final_rms)


def _rms(hidden: int, places: Places, constant: float, parts: dict[int, float]) -> float:
    """Root mean square of the stream; ``parts``: standard deviations by where they begin."""
    energy = constant**2 + 6 * places.heads  # the means of squares of salience, stop and mean
    for place in (places.text, places.context, places.token):
        energy += width(place) * parts.get(place.start, 0.0) ** 2
    energy += width(places.first_text)  # from the first layer on; little enough before it
    return math.sqrt(energy / hidden)


@functools.cache
def predictable_share(experts: int, top_k: int, recall: float) -> float:
    """Squared correlation of two rows of normal scores that have so much of their top-k in common.

    By simulation, the same every time.
    """
    generator = np.random.Generator(np.random.PCG64(experts))
    rows = max(1024, 16384 // top_k)
    scores, noise = (generator.standard_normal((rows, experts)) for _ in range(2))
    chosen = _among_first(scores, top_k)

    def found(share: float) -> float:
        guess = math.sqrt(share) * scores + math.sqrt(1 - share) * noise
        return float((chosen & _among_first(guess, top_k)).sum() / (rows * top_k))

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) > recall else (middle, high)
    return (low + high) / 2


@functools.cache
def squared_weights(experts: int, top_k: int, normalised: bool) -> float:
    """Mean over tokens of the sum of the squares of a token's routing weights."""
    generator = np.random.Generator(np.random.PCG64(experts))
    logits = LOGIT_SPREAD * generator.standard_normal((4096, experts))
    weights = np.exp(logits)
    weights /= weights.sum(axis=1, keepdims=True)
    best = np.sort(weights, axis=1)[:, -top_k:]
    if normalised:
        best /= best.sum(axis=1, keepdims=True)
    return float((best**2).sum(axis=1).mean())


def _among_first(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    least = np.partition(scores, -count, axis=1)[:, -count]
    return np.asarray(scores >= least[:, None])


class Fading(NamedTuple):
    """Attention that fades with the distance, out of rotary embeddings.

    Attributes
    ----------
    amplitudes : tuple of float
        Logit of a pair of dimensions at distance 0, fastest pair first. At distance d it is
        multiplied by the cosine of d times the pair's frequency.
    spread : float
        Standard deviation of the weighted mean of independent standard normal values.
    """

    amplitudes: tuple[float, ...]
    spread: float


def fading(head_dim: int, theta: float, tokens: float, pairs: int) -> Fading:
    """Weights whose mean is as long-lived as one that falls to 1/e in so many tokens.

    The fastest cosine is smooth at 0, so the tokens right before weigh more than they should.
    Therefore the fall is made as much steeper as leaves the correlations with the tokens before
    the same in their sum (derived).
    """
    wanted = 1 / math.expm1(1 / tokens)
    low, high = 0.4 * tokens, tokens
    for _ in range(10):
        middle = (low + high) / 2
        _, shares = _cosines(head_dim, theta, middle, pairs)
        correlations = [float(shares[lag:] @ shares[:-lag]) for lag in range(1, 17)]
        is_long = sum(correlations) / float(shares @ shares) > wanted
        low, high = (low, middle) if is_long else (middle, high)
    amplitudes, shares = _cosines(head_dim, theta, low, pairs)
    return Fading(tuple(amplitudes.tolist()), float(np.sqrt(shares @ shares)))


def _cosines(
    head_dim: int, theta: float, tokens: float, pairs: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Amplitudes of cosines whose sum falls by 1 in so many tokens, and the weights they give.

    By least squares over the distances of a long context.
    """
    lowest = 14.0
    frequencies = theta ** (-2 * np.arange(pairs) / head_dim)
    far = np.geomspace(256, _CONTEXT_TOKENS, 500).astype(np.intp)
    distances = np.unique(np.concatenate([np.arange(256), far])).astype(np.float64)
    weights = np.where(distances <= 8, 30.0, np.where(distances < 256, 1.0, 0.5))
    cosines = np.cos(distances[:, None] * frequencies)
    columns = np.column_stack([cosines, np.ones(len(distances))]) * weights[:, None]
    wanted = -np.minimum(distances / tokens, lowest) * weights
    small = np.sqrt(1e-3 * len(distances)) * np.eye(pairs, pairs + 1)
    found = np.linalg.lstsq(
        np.concatenate([columns, small]), np.concatenate([wanted, np.zeros(pairs)]), rcond=None
    )[0][:pairs]
    logits = np.cos(np.arange(1024)[:, None] * frequencies) @ found
    shares = np.exp(logits - logits.max())
    return found, shares / shares.sum()
