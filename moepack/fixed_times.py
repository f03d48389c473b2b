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
    before_s, after_s : float64 [L]
        Until the experts can begin (attention, router, the fixed cost of the pass over them), and
        what needs no routed expert after that (shared expert).
        Layers without experts count to what comes before the next layer with them.
    tail_s : float
        Behind the last layer with experts: layers without, and the head.
    """

    before_s: npt.NDArray[np.float64]
    after_s: npt.NDArray[np.float64]
    tail_s: float


def fixed_times(spec: ModelSpec, compute: ComputeProfile, blocks: Sequence[int]) -> FixedTimes:
    """What one pass over blocks of so many tokens takes beside the routed experts."""
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
    return FixedTimes(np.array(before_s), np.array(after_s), waiting_s + compute.head_s)


def _ffn_s(entry: LayerCompute, blocks: Sequence[int]) -> float:
    return 0.0 if entry.ffn is None else sum(map(entry.ffn.at, blocks))
