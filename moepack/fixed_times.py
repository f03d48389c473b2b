"""Compute beside the routed experts, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.compute import ComputeProfile, LayerCompute
from moepack.model_spec import ModelSpec


class FixedTimes(NamedTuple):
    """Seconds of one pass beside the routed experts, by layer with experts.

    Attributes
    ----------
    before_s : float64 [L]
        Until the routing is known: attention, router, the fixed cost of the pass over the experts.
        Layers without experts count to what comes before the next layer with them.
    guess_s : float64 [L]
        Of guessing what the next layer with experts will need.
    after_s : float64 [L]
        What needs no routed expert: the shared expert.
    tail_s : float
        Behind the last layer with experts: layers without, and the head.
    """

    before_s: npt.NDArray[np.float64]
    guess_s: npt.NDArray[np.float64]
    after_s: npt.NDArray[np.float64]
    tail_s: float


def fixed_times(
    spec: ModelSpec,
    compute: ComputeProfile,
    blocks: Sequence[int],
    guessed: Sequence[bool] | None = None,
) -> FixedTimes:
    """What one pass over blocks of so many tokens takes beside the routed experts.

    Parameters
    ----------
    guessed
        Of every layer with experts, whether they are guessed while the one before it runs (the
        first layer's while the last one does, from one token); None: nowhere.
    """
    before_s: list[float] = []
    after_s: list[float] = []
    waiting_s = 0.0
    for number, layer in enumerate(spec.layers):
        entry = compute.layer(number)
        if layer.moe is None:
            waiting_s += sum(map(entry.attention.at, blocks)) + _ffn_s(entry, blocks)
            continue
        pieces = (entry.attention, entry.router, entry.fixed)
        before_s.append(
            waiting_s + sum(sum(map(piece.at, blocks)) for piece in pieces if piece is not None)
        )
        after_s.append(_ffn_s(entry, blocks))
        waiting_s = 0.0
    numbers = spec.moe_layers
    asked = guessed or [False] * len(numbers)
    guess_s = [
        sum(map(compute.layer(number).guess_s, blocks)) if wanted else 0.0
        for number, wanted in zip(numbers[1:], asked[1:], strict=True)
    ]
    guess_s.append(compute.layer(numbers[0]).guess_s(1) if asked[0] else 0.0)
    tail_s = waiting_s + compute.head_s
    return FixedTimes(np.array(before_s), np.array(guess_s), np.array(after_s), tail_s)


def _ffn_s(entry: LayerCompute, blocks: Sequence[int]) -> float:
    return 0.0 if entry.ffn is None else sum(map(entry.ffn.at, blocks))
