"""In how many bits experts are stored: what is asked for by name, and what a layout comes to."""

from __future__ import annotations

from typing import Literal, NamedTuple

from moepack.budget import layer_segment
from moepack.encodings import ENCODINGS, QUANTISED, fitting
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import ModelSpec
from moepack.segments import PARTS

#: What a plan may be asked for: experts as the model has them, or all of them rounded.
QualityName = Literal["exact", "int8", "int4"]


class Precision(NamedTuple):
    """What the experts of a layout are stored in.

    Attributes
    ----------
    quality : str
        One of those that can be asked for; ``mixed`` where experts differ.
    mean_bits : float
        Of a weight, scales included, biases and padding not.
    """

    quality: str
    mean_bits: float


def encoding_of(spec: ModelSpec, quality: QualityName) -> str:
    """What a model's routed experts are stored in, all of them.

    In 4 bits the smaller the groups, the less is lost: of those that fit, the smallest are taken.

    Raises
    ------
    GroupMismatchError
        When no encoding of so many bits fits the experts.
    """
    if quality == "exact":
        return spec.dtype
    of_kind = [name for name in QUANTISED if ENCODINGS[name].kind == quality]
    widths = {spec.moe(layer).intermediate_size for layer in spec.moe_layers}
    found = set(of_kind).intersection(*(fitting(spec.hidden_size, width) for width in widths))
    best = next((name for name in of_kind if name in found), of_kind[0])
    for width in widths:
        ENCODINGS[best].check_fits(spec.hidden_size, width)
    return best


def precision_of(spec: ModelSpec, layout: Layout) -> Precision:
    """What a layout's experts are stored in."""
    kinds = set()
    stored_bytes = weights = 0
    for cut in layout.layers:
        for name, experts in cut.class_sizes(spec.moe(cut.layer).num_experts).items():
            kinds.add(ENCODINGS[name].kind)
            weights += experts * 3 * cut.width * spec.hidden_size
            stored_bytes += experts * _matrix_bytes(spec, cut, name)
    quality = kinds.pop() if len(kinds) == 1 else "mixed"
    return Precision("exact" if quality == "float" else quality, 8 * stored_bytes / weights)


def _matrix_bytes(spec: ModelSpec, cut: LayerLayout, name: str) -> int:
    """Of one expert in an encoding, with the scales of each of its parts."""
    return sum(
        tensor.size_bytes
        for part in PARTS
        if (shape := layer_segment(spec, cut, part, name)) is not None
        for tensor in shape.tensors
        if not tensor.name.endswith(".bias")
    )
