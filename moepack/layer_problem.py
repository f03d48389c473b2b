"""One layer as the optimiser sees it: what may be chosen for it, and what decides the price."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.cost import Array, LayerTimes, LinkSeconds
from moepack.layout import LayerLayout
from moepack.model_spec import ModelSpec, MoeSpec
from moepack.plan import EngineCapabilities, Policy
from moepack.segments import PARTS, PIECE_BYTES, cuts, segment_shape

#: Cuts of a layer that are tried; where its granularity gives more, they are thinned evenly. Layers
#: of many experts make do with fewer, down to the least: their slots are small already.
MAX_CUTS = 64
LEAST_CUTS = 25

# Options of a layer, cuts times states of its slots, that are priced without thinning further.
_OPTIONS = 6400

Integers = npt.NDArray[np.int64]


class Cuts(NamedTuple):
    """Where the experts of a layer may be cut.

    Attributes
    ----------
    splits : int64 [C]
        Neurons of the top.
    width : int
        Neurons of an expert.
    top_bytes, bottom_bytes : int64 [C]
        Stored bytes of each part; 0 where there is none.
    """

    splits: Integers
    width: int
    top_bytes: Integers
    bottom_bytes: Integers

    @property
    def interior(self) -> npt.NDArray[np.bool_]:
        """Whether there are two parts, [C]."""
        return (self.top_bytes > 0) & (self.bottom_bytes > 0)


class PromptTimes(NamedTuple):
    """Compute seconds of one layer for the whole prompt.

    ``other_s`` is everything but the routed experts; these, all of them together, in one segment
    and in two.
    """

    other_s: float
    experts_s: float
    split_s: float


@dataclass(frozen=True, eq=False)
class DiskProblem:
    """A disk behind RAM that does not hold every expert of a layer.

    Attributes
    ----------
    link : callable
        Seconds of one read of so many bytes.
    bounces : int
        Reads that may be on their way at once.
    held : int
        Experts that RAM holds: the hottest.
    shares : mapping of str to float64 [N + 1]
        Of what 0, 1 ... N slots lack under each policy, the share that RAM lacks too.
    predicted_shares : mapping of str to float64 [D, N + 1]
        The same of the expert predicted at each rank.
    """

    link: LinkSeconds
    bounces: int
    held: int
    shares: Mapping[Policy, Array]
    predicted_shares: Mapping[Policy, Array]


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """What is known of one layer. ``N`` experts, ``D`` ranks of the prediction (may be none).

    Attributes
    ----------
    layer, top_k : int
    cuts : Cuts
        What may be chosen: from :func:`cut_options`, or the one that is kept.
    link : callable
        Seconds of one transfer of so many bytes.
    token : LayerTimes
        One token; ``expert_s`` is of an expert in one segment.
    split_s : float
        The same of an expert in two segments.
    prompt : PromptTimes
    used : float64 [N]
        How likely the prompt needs an expert, in the order in which slots are filled.
    new_tokens : int
        Tokens that are generated; the first of them comes with the prompt.
    hits : mapping of str to float64 [N + 1]
        Hit rate of 0, 1 ... N slots under each policy.
    staging_experts : int
        Experts in flight at once.
    engine : EngineCapabilities
        What else may be chosen.
    gap_s : float
        Compute between the experts of the layer before and this layer's routing: this layer's
        attention and router, dense layers in between; for the first layer with experts the rest of
        the token before, head included.
    guess_s : float
        Compute of guessing this layer's experts while the layer before runs.
    accuracy : float64 [D]
        How likely the expert predicted at rank r is activated.
    predicted_held : mapping of str to float64 [D, N + 1]
        How likely it is held by 0, 1 ... N slots under each policy.
    disk : DiskProblem or None
        What RAM does not hold of what the slots lack; None where it holds everything.
    in_pieces : bool
        Whether transfers ahead go in pieces, behind which they can be broken off.
    """

    layer: int
    top_k: int
    cuts: Cuts
    link: LinkSeconds
    token: LayerTimes
    split_s: float
    prompt: PromptTimes
    used: Array
    new_tokens: int
    hits: Mapping[Policy, Array]
    staging_experts: int
    engine: EngineCapabilities
    gap_s: float = 0.0
    guess_s: float = 0.0
    accuracy: Array = field(default_factory=lambda: np.zeros(0))
    predicted_held: Mapping[Policy, Array] = field(default_factory=dict)
    disk: DiskProblem | None = None
    in_pieces: bool = False

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return len(self.used)

    def pieces(self, size_bytes: npt.NDArray[Any]) -> Array:
        """In how many pieces transfers go; in one where they cannot be broken off."""
        pieces = size_bytes / PIECE_BYTES if self.in_pieces else np.ones(size_bytes.shape)
        return np.maximum(pieces, 1.0)


def cut_options(spec: ModelSpec, layer: int, encoding: str) -> Cuts:
    """The cuts of a layer stored in an encoding that are worth trying, uncut first.

    All that its granularity allows, thinned evenly where there are many: on recorded routing and
    on shapes of real models twice as many gain 0.2 % at most. Experts with everything in the bottom
    are left out: the same bytes at the same price.
    """
    return _cut_options(spec.moe(layer), spec.hidden_size, encoding, spec.dtype)


def kept_cut(spec: ModelSpec, layout: LayerLayout) -> Cuts:
    """The one cut of a layout that is to be kept."""
    sizes = [stored_bytes(spec, layout, part) for part in PARTS]
    return Cuts(np.array([layout.split]), layout.width, *(np.array([size]) for size in sizes))


@functools.cache
def _cut_options(moe: MoeSpec, hidden_size: int, encoding: str, bias_dtype: str) -> Cuts:
    width = moe.intermediate_size
    interior = cuts(moe, hidden_size, encoding)[-2:0:-1]
    most = min(MAX_CUTS, max(LEAST_CUTS, _OPTIONS // (2 * moe.num_experts + 1)))
    splits = [width, *_thinned(interior, most - 1)]
    sizes = [
        [
            0
            if (shape := segment_shape(moe, hidden_size, encoding, split, part, bias_dtype)) is None
            else shape.stored_bytes
            for split in splits
        ]
        for part in PARTS
    ]
    return Cuts(np.array(splits), width, *(np.array(part_bytes) for part_bytes in sizes))


def _thinned(options: Sequence[int], most: int) -> list[int]:
    if len(options) <= most:
        return list(options)
    return [options[place] for place in np.linspace(0, len(options) - 1, most).round().astype(int)]
