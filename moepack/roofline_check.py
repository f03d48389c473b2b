"""The roofline beside a measurement: how far off the times are that it derives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moepack.compute import ComputeProfile, Curve, LayerCompute, block_seconds, token_seconds
from moepack.hardware import HardwareProfile
from moepack.model_spec import ModelSpec
from moepack.roofline import derive_compute

#: Derived over measured lies between one over this and this, for a token and for a block of the
#: whole model that ships, on a machine that has nothing else to do.
TOLERANCE = 2.5


class Checked(NamedTuple):
    """One piece of a layer: seconds for one token and for the largest block that was measured."""

    layers: tuple[int, ...]
    piece: str
    token_s: float
    derived_token_s: float
    block_s: float
    derived_block_s: float


class RooflineCheck(NamedTuple):
    """A model measured, and derived from the same machine's rates.

    Attributes
    ----------
    block_tokens : int
    token_s, derived_token_s : float
        Compute of one token through the whole model, everything resident.
    block_s, derived_block_s : float
        Of a block that uses all experts evenly.
    pieces : tuple of Checked
    """

    block_tokens: int
    token_s: float
    derived_token_s: float
    block_s: float
    derived_block_s: float
    pieces: tuple[Checked, ...]

    @property
    def token_ratio(self) -> float:
        """Derived over measured."""
        return self.derived_token_s / self.token_s

    @property
    def block_ratio(self) -> float:
        """Derived over measured."""
        return self.derived_block_s / self.block_s


def check_roofline(
    spec: ModelSpec, hardware: HardwareProfile, measured: ComputeProfile
) -> RooflineCheck:
    """Derive what was measured, and put the two side by side."""
    derived = derive_compute(spec, hardware, context_tokens=measured.context_tokens)
    return RooflineCheck(
        block_tokens=max(measured.layers[0].attention.tokens),
        token_s=token_seconds(spec, measured),
        derived_token_s=token_seconds(spec, derived),
        block_s=block_seconds(spec, measured),
        derived_block_s=block_seconds(spec, derived),
        pieces=tuple(
            piece
            for entry in measured.layers
            for piece in _pieces(entry, derived.layer(entry.layers[0]))
        ),
    )


def _pieces(measured: LayerCompute, derived: LayerCompute) -> Iterator[Checked]:
    block = max(measured.attention.tokens)
    others = _curves(derived)
    for piece, curve in _curves(measured).items():
        other = others[piece]
        yield Checked(
            measured.layers, piece, curve.at(1), other.at(1), curve.at(block), other.at(block)
        )


def _curves(entry: LayerCompute) -> dict[str, Curve]:
    """Those that there are, by their names; in an encoding as ``expert INT8``."""
    pieces = ("attention", "router", "fixed", "expert", "expert_split", "ffn")
    found = {piece: curve for piece in pieces if (curve := getattr(entry, piece)) is not None}
    for item in entry.quantised:
        found[f"expert {item.encoding}"] = item.whole
        found[f"expert_split {item.encoding}"] = item.split
    if entry.rounded is not None:
        found["attention INT8"] = entry.rounded.attention
        if entry.rounded.ffn is not None:
            found["ffn INT8"] = entry.rounded.ffn
    return found
