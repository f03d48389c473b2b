"""Making layouts: a split ratio, moved to where an expert can really be cut."""

from __future__ import annotations

import functools

from moepack.model_spec import ModelSpec
from moepack.plan import LayerLayout, Layout
from moepack.segments import cuts, granularity

#: Length of a prefill block; part of every layout, since it decides the bits of the result.
PREFILL_BLOCK_TOKENS = 512


def layer_layout(spec: ModelSpec, layer: int, ratio: float) -> LayerLayout:
    """One layer cut as near to ``ratio`` (0 to 1) as its granularity allows."""
    moe = spec.moe(layer)
    options = cuts(moe, spec.hidden_size, spec.dtype)
    split = min(options, key=lambda cut: abs(cut - ratio * moe.intermediate_size))
    return cut_layout(spec, layer, split)


def cut_layout(spec: ModelSpec, layer: int, split: int) -> LayerLayout:
    """One layer cut after so many neurons."""
    moe = spec.moe(layer)
    step = granularity(moe, spec.hidden_size, spec.dtype)
    return LayerLayout(layer, split, moe.intermediate_size, step, spec.dtype)


@functools.lru_cache(maxsize=16)
def uniform_layout(
    spec: ModelSpec, ratio: float, block_tokens: int = PREFILL_BLOCK_TOKENS
) -> Layout:
    """Every layer cut near the same ratio."""
    layers = tuple(layer_layout(spec, number, ratio) for number in spec.moe_layers)
    return Layout(spec.digest, layers, block_tokens)
