"""One model on one machine: seconds of each piece of a layer over the number of tokens.

Measured by running the model's own layers (:mod:`moepack.profiling`), or derived from the
machine's rates by a roofline (:func:`moepack.roofline.derive_compute`) where the model has not been
run here; a plan says which.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moepack import records
from moepack.atomic import write_atomically
from moepack.encodings import ENCODINGS
from moepack.errors import ProfileError
from moepack.records import added, record
from moepack.trunk import trunk_name

if TYPE_CHECKING:
    from moepack.model_spec import ModelSpec

COMPUTE_VERSION = 3


@record
class Curve:
    """Seconds over a number of tokens: linear between the points, and beyond the last two.

    Attributes
    ----------
    tokens : tuple of int
        Ascending, from 1.
    seconds : tuple of float
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if not self.tokens or len(self.tokens) != len(self.seconds) or not ascending:
            raise ValueError("a curve needs ascending token counts and as many times")
        if self.tokens[0] < 1 or not all(0 <= seconds < math.inf for seconds in self.seconds):
            raise ValueError(
                f"a curve of {self.seconds} seconds from {self.tokens[0]} tokens on, expected 1 "
                "token or more, and times that are finite and not negative"
            )

    def at(self, tokens: float) -> float:
        """Seconds for a number of tokens; below the first point, the first point's."""
        if tokens <= self.tokens[0] or len(self.tokens) == 1:
            return self.seconds[0]
        right = min(max(1, bisect_right(self.tokens, tokens)), len(self.tokens) - 1)
        x0, x1 = self.tokens[right - 1], self.tokens[right]
        y0, y1 = self.seconds[right - 1], self.seconds[right]
        return max(0.0, y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))


@record
class QuantisedExpert:
    """One routed expert in a quantised encoding, over the tokens that it gets.

    Attributes
    ----------
    encoding : str
        Its name in :mod:`moepack.encodings`.
    whole, split : Curve
        In one segment, and in two.
    """

    encoding: str
    whole: Curve
    split: Curve


@record
class RoundedLayer:
    """What of a layer changes where the trunk's large matrices are INT8 (:mod:`moepack.trunk`).

    Attributes
    ----------
    attention : Curve
    ffn : Curve or None
        As those of :class:`LayerCompute`.
    """

    attention: Curve
    ffn: Curve | None


@record
class LayerCompute:
    """The pieces of all layers of one kind (equal attention and FFN).

    Attributes
    ----------
    layers : tuple of int
        The decoder's numbers of these layers.
    attention : Curve
        Norm, attention and residual of one block; at one token, behind
        ``ComputeProfile.context_tokens`` of context.
    router : Curve or None
        Norm and routing; None for a dense layer.
    expert, expert_split : Curve or None
        One routed expert over the tokens that it gets, in one segment and in two, in the model's
        dtype: what each one more of them adds to a pass.
    ffn : Curve or None
        The dense FFN, or the shared expert; None where there is neither.
    fixed : Curve or None
        What a pass over the routed experts costs whatever their number: stepping the caches,
        making room for the sum, adding it; None for a dense layer.
    transfer_s : float
        What one transfer costs the computing thread beside the link's own time.
    burst_s : float
        What a pass that transfers anything costs it beside that, however much it is: threads that
        wake one another, and the time until the first of it comes.
    quantised : tuple of QuantisedExpert
        The expert in every quantised encoding that fits it.
    rounded : RoundedLayer or None
        The pieces that have matrices of the trunk, where those are INT8; None: not known.
    ahead_transfer_s, ahead_burst_s : float or None
        What one transfer that was asked for ahead costs it, needed or not, and having any of them
        in a pass that demands nothing: they come while it computes. None where they were not
        measured apart.
    prompt_transfer_s, prompt_burst_s : float or None
        ``transfer_s`` and ``burst_s`` in a pass over a prompt, which computes meanwhile instead of
        waiting; None where they were not measured apart.
    """

    layers: tuple[int, ...]
    attention: Curve
    router: Curve | None
    expert: Curve | None
    expert_split: Curve | None
    ffn: Curve | None
    transfer_s: float = 0.0
    fixed: Curve | None = None
    burst_s: float = 0.0
    quantised: tuple[QuantisedExpert, ...] = ()
    rounded: RoundedLayer | None = added(default=None)
    prompt_transfer_s: float | None = added(default=None)
    prompt_burst_s: float | None = added(default=None)
    ahead_transfer_s: float | None = added(default=None)
    ahead_burst_s: float | None = added(default=None)

    @property
    def of_ahead(self) -> tuple[float, float]:
        """What one transfer that was asked for ahead costs, and having any of those."""
        return self._or_demanded(self.ahead_transfer_s, self.ahead_burst_s)

    @property
    def of_prompt(self) -> tuple[float, float]:
        """What one transfer, and transferring anything, costs the thread that computes a prompt."""
        return self._or_demanded(self.prompt_transfer_s, self.prompt_burst_s)

    def _or_demanded(self, transfer_s: float | None, burst_s: float | None) -> tuple[float, float]:
        """Costs that older profiles did not tell from those of demands."""
        return (
            self.transfer_s if transfer_s is None else transfer_s,
            self.burst_s if burst_s is None else burst_s,
        )

    def expert_times(self, encoding: str, *, cut: bool) -> Curve:
        """One routed expert in an encoding, in one segment or (``cut``) in two.

        Raises
        ------
        ProfileError
            When the encoding is a quantised one that has no times.
        """
        whole, split = self.expert, self.expert_split
        if ENCODINGS[encoding].quantised:
            known = {item.encoding: item for item in self.quantised}
            if encoding not in known:
                raise ProfileError(
                    f"layers {self.layers[0]} to {self.layers[-1]}: the compute profile has no "
                    f"times of experts in {encoding}, it has {', '.join(known) or 'none'}; run "
                    "moepack profile"
                )
            whole, split = known[encoding].whole, known[encoding].split
        found = split if cut else whole
        assert found is not None, f"layers {self.layers} have experts, their times are not there"
        return found

    def guess_s(self, tokens: float) -> float:
        """Seconds of guessing, for one block, which experts this layer will need: its router's."""
        return 0.0 if self.router is None else self.router.at(tokens)

    def around_s(self, tokens: float) -> float:
        """Seconds of everything in a layer but its routed experts, for one block."""
        pieces = (self.attention, self.router, self.fixed, self.ffn)
        return sum(piece.at(tokens) for piece in pieces if piece is not None)


@record
class ComputeProfile:
    """Compute times of one model on one machine.

    Attributes
    ----------
    source : {"measured", "derived"}
    how, recorded_utc : str
        In words, and when (UTC, ISO 8601).
    layers : tuple of LayerCompute
        Every layer of the model stands in exactly one.
    head_s : float
        Embedding, final norm, head and sampling of one token.
    yardstick_s : float
        What :mod:`moepack.yardstick` took on average while all of this was measured: all times are
        for that speed of the processor. 0 where it is not known: derived, of a device, or measured
        by an older moepack.
    spread : float
        Of the time of a token, or of a block, through the whole model, whichever varies more: the
        interquartile range between rounds over the median; 0 where derived.
    rounded_head_s : float or None
        ``head_s`` where the trunk's large matrices are INT8; None: not known.
    """

    version: int
    model_name: str
    model_digest: str
    device: str
    threads: int
    source: Literal["measured", "derived"]
    how: str
    recorded_utc: str
    context_tokens: int
    head_s: float
    spread: float
    layers: tuple[LayerCompute, ...]
    yardstick_s: float = added(default=0.0)
    rounded_head_s: float | None = added(default=None)

    def with_trunk(self, encoding: str) -> ComputeProfile:
        """The times of the model whose trunk is stored so; empty: as the checkpoint has it.

        Raises
        ------
        ProfileError
            When they are not known.
        """
        if not encoding:
            return self
        layers = [
            replace(entry, attention=entry.rounded.attention, ffn=entry.rounded.ffn)
            for entry in self.layers
            if entry.rounded is not None
        ]
        if self.rounded_head_s is None or len(layers) < len(self.layers):
            raise ProfileError(
                f"the compute profile of {self.model_name} has no times of a trunk in "
                f"{trunk_name(encoding)}, it was made by an older moepack; run moepack profile"
            )
        return replace(self, head_s=self.rounded_head_s, layers=tuple(layers))

    def layer(self, number: int) -> LayerCompute:
        """The entry that a decoder layer stands in."""
        return next(entry for entry in self.layers if number in entry.layers)

    def save(self, path: Path) -> None:
        """Write as YAML, atomically."""
        header = "Seconds of each piece of a layer over tokens: made by moepack profile."
        write_atomically(path, records.to_yaml(self, header=header))


def token_seconds(spec: ModelSpec, profile: ComputeProfile) -> float:
    """Compute of one token through the whole model, everything resident."""
    total_s = profile.head_s
    for entry in profile.layers:
        moe = spec.layers[entry.layers[0]].moe
        layer_s = entry.around_s(1)
        if moe is not None and entry.expert is not None:
            layer_s += moe.top_k * entry.expert.at(1)
        total_s += len(entry.layers) * layer_s
    return total_s


def block_seconds(spec: ModelSpec, profile: ComputeProfile) -> float:
    """Compute of the largest measured block, everything resident and its experts used evenly."""
    total_s = profile.head_s
    for entry in profile.layers:
        moe = spec.layers[entry.layers[0]].moe
        block = max(entry.attention.tokens)
        layer_s = entry.around_s(block)
        if moe is not None and entry.expert is not None:
            layer_s += moe.num_experts * entry.expert.at(block * moe.top_k / moe.num_experts)
        total_s += len(entry.layers) * layer_s
    return total_s


def load_compute(path: Path) -> ComputeProfile:
    """Read a compute profile.

    Raises
    ------
    ProfileError
        When it cannot be read or is not one.
    """
    return records.load_yaml(
        ComputeProfile,
        path,
        what="compute profile",
        error=ProfileError,
        remedy="make one with moepack profile",
        version=COMPUTE_VERSION,
    )
