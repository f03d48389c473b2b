"""Making layouts: a split ratio, moved to where an expert can really be cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from moepack.encodings import ENCODINGS
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import ModelSpec
from moepack.segments import cuts, granularity

#: What the experts of a layer are stored in: all of them, or each by its id.
Stored = str | tuple[str, ...]

#: Length of a prefill block; part of every layout, since it decides the bits of the result.
PREFILL_BLOCK_TOKENS = 512


def layer_layout(
    spec: ModelSpec, layer: int, ratio: float, encoding: str | None = None
) -> LayerLayout:
    """One layer cut as near to ``ratio`` (0 to 1) as its granularity allows.

    Parameters
    ----------
    encoding
        What its experts are stored in (:mod:`moepack.encodings`), here and below; None: the
        model's dtype.

    Raises
    ------
    UnknownEncodingError, GroupMismatchError
        When the experts cannot be stored so; here and below.
    """
    moe = spec.moe(layer)
    options = cuts(moe, spec.hidden_size, encoding or spec.dtype)
    split = min(options, key=lambda cut: abs(cut - ratio * moe.intermediate_size))
    return cut_layout(spec, layer, split, encoding)


def cut_layout(spec: ModelSpec, layer: int, split: int, encoding: str | None = None) -> LayerLayout:
    """One layer cut after so many neurons."""
    moe = spec.moe(layer)
    name = encoding or spec.dtype
    step = granularity(moe, spec.hidden_size, name)
    return LayerLayout(layer, split, moe.intermediate_size, step, name)


def mixed_layout(
    spec: ModelSpec, layer: int, encodings: Sequence[str], *, split: int | None = None
) -> LayerLayout:
    """One layer whose experts are stored in encodings of their own.

    Parameters
    ----------
    encodings
        Of every expert, by its id. Where they are all the same this is :func:`cut_layout`.
    split
        Neurons in the top; None: whole experts.
    """
    moe = spec.moe(layer)
    if len(encodings) != moe.num_experts:
        raise ValueError(f"{len(encodings)} encodings for {moe.num_experts} experts")
    whole = moe.intermediate_size if split is None else split
    if len(set(encodings)) == 1:
        return cut_layout(spec, layer, whole, encodings[0])
    step = max(granularity(moe, spec.hidden_size, name) for name in {*encodings})
    largest = next(name for name in ENCODINGS if name in encodings)
    return LayerLayout(layer, whole, moe.intermediate_size, step, largest, tuple(encodings))


@functools.lru_cache(maxsize=16)
def uniform_layout(
    spec: ModelSpec,
    ratio: float,
    block_tokens: int = PREFILL_BLOCK_TOKENS,
    encodings: tuple[Stored, ...] | None = None,
) -> Layout:
    """Every layer cut near the same ratio; those whose experts differ stay whole.

    Parameters
    ----------
    encodings
        Of each layer that has experts; None: the model's dtype.
    """
    numbers = spec.moe_layers
    stored = encodings or (spec.dtype,) * len(numbers)
    layers = tuple(
        layer_layout(spec, number, ratio, names)
        if isinstance(names, str)
        else mixed_layout(spec, number, names)
        for number, names in zip(numbers, stored, strict=True)
    )
    return Layout(spec.digest, layers, block_tokens)
