"""Rotary position embedding: the frequencies of every scaling, and the rotation.

Every style is one formula over the whole width of a head::

    rotated = x * cos + x[partner] * sin

``partner`` swaps the two elements of each pair, whether pairs are halves (i, i + d/2) or
neighbours (2i, 2i + 1); the minus sign of the first element of a pair sits in ``sin``; dimensions
that are not rotated have cos 1 and sin 0. Angles, products and sum are float32, rounded once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from moepack.errors import ContextLengthError
from moepack.model_spec import RopeSpec
from moepack_runtime.parts import is_in_parts, parts


class Rotation(NamedTuple):
    """Cosines and signed sines of a run of positions, each float32 [tokens, 1, head_dim]."""

    cos: torch.Tensor
    sin: torch.Tensor


class RotaryEmbedding:
    """Rotates queries and keys. All layers share one, so a step computes its angles once.

    Memory: the angles of one block.

    Parameters
    ----------
    head_dim, rotary_dim : int
        Width of what is rotated, and how many of its leading dimensions are.
    context_tokens : int
        The longest sequence that will be rotated.

    Raises
    ------
    ContextLengthError
        Dynamic scaling beyond the original context: it changes the angles of cached keys.
    """

    def __init__(
        self,
        rope: RopeSpec,
        *,
        head_dim: int,
        rotary_dim: int,
        context_tokens: int,
        device: torch.device,
    ) -> None:
        original = rope.original_context
        if rope.kind == "dynamic" and original is not None and context_tokens > original:
            raise ContextLengthError(
                f"a context of {context_tokens} tokens exceeds the {original} within which dynamic "
                f"rotary scaling is exact with a cache; plan with --context {original} or less"
            )
        self._rope = rope
        self._head_dim = head_dim
        self._rotary_dim = rotary_dim
        self._device = device
        self._is_whole = rotary_dim == head_dim and not rope.interleaved
        self._partner = _partners(head_dim, rotary_dim, rope.interleaved).to(device)
        self._is_long: bool | None = None
        self._positions: tuple[int, int] | None = None
        self._rotation: Rotation
        self.begin_pass(1)

    def begin_pass(self, length: int) -> None:
        """Tell how long the sequence is once this pass is over.

        LongRoPE has two sets of frequencies and takes the one for ``length``, as the transformers
        library does: keys that are cached keep the angles of the pass that made them. (Its
        ``generate`` computes them anew where a text crosses the length between the two sets; for
        PhiMoE as published, whose two magnitudes are equal, that changes nothing.)
        """
        original = self._rope.original_context
        is_long = self._rope.kind == "longrope" and original is not None and length > original
        if is_long == self._is_long:
            return
        self._is_long = is_long
        frequencies, self._factor = rope_frequencies(self._rope, self._rotary_dim, is_long=is_long)
        self._frequencies = frequencies.to(self._device)
        self._positions = None

    def rotation(self, start: int, tokens: int) -> Rotation:
        """Cosines and sines of the positions from ``start`` on, kept for the next layer."""
        if self._positions != (start, tokens):
            self._rotation = self._compute(start, tokens)
            self._positions = (start, tokens)
        return self._rotation

    def _compute(self, start: int, tokens: int) -> Rotation:
        positions = torch.arange(
            start, start + tokens, dtype=torch.float32, device=self._device
        ).unsqueeze(1)
        angles = positions * self._frequencies  # [tokens, rotary_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        if self._rope.interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        passed = self._head_dim - self._rotary_dim
        if passed:
            cos = torch.cat((cos, cos.new_ones(tokens, passed)), -1)
            sin = torch.cat((sin, sin.new_zeros(tokens, passed)), -1)
        return Rotation(cos.unsqueeze(1), sin.unsqueeze(1))

    def rotate(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """[tokens, heads, head_dim] to the same shape and dtype."""
        if not is_in_parts(x):
            return self._turn(x.float(), *rotation).to(x.dtype)
        rotated = torch.empty(x.shape, dtype=x.dtype)
        for rows, exact, beside in parts(x):
            rotated[rows] = self._turn(exact, rotation.cos[rows], rotation.sin[rows], out=beside)
        return rotated

    def _turn(
        self,
        exact: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._is_whole:
            first, second = exact.chunk(2, -1)
            partner = torch.cat((second, first), -1, out=out)
        else:
            partner = torch.index_select(exact, -1, self._partner, out=out)
        return partner.mul_(sin).addcmul_(exact, cos)


def _partners(head_dim: int, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """For each dimension of a head the other one of its pair, or itself: int64 [head_dim]."""
    partner = torch.arange(head_dim)
    rotated = partner[:rotary_dim]
    if interleaved:
        partner[:rotary_dim] = rotated.view(-1, 2).flip(-1).flatten()
    else:
        partner[:rotary_dim] = rotated.roll(rotary_dim // 2)
    return partner


def rope_frequencies(
    rope: RopeSpec, rotary_dim: int, *, is_long: bool = False
) -> tuple[torch.Tensor, float]:
    """Angle per position of each pair, float32 [rotary_dim / 2], and the factor on cos and sin.

    Computed in float32 in the order of the transformers library, so that angles at far positions
    agree with it.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    periods: torch.Tensor = rope.theta**exponents
    # A dynamic scaling within the original context is none.
    if rope.kind in {"default", "dynamic"}:
        return 1.0 / periods, 1.0
    if rope.kind == "longrope":
        return _longrope(rope, periods, is_long)
    assert rope.factor is not None, f"rope scaling {rope.kind} without a factor"
    if rope.kind == "linear":
        return (1.0 / periods) / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, 1.0 / periods, rope.factor), 1.0
    return _yarn(rope, periods, rope.factor, rotary_dim)


def _yarn(
    rope: RopeSpec, periods: torch.Tensor, factor: float, rotary_dim: int
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): high frequencies stay, low ones are divided, a ramp between."""
    original = rope.original_context
    assert original is not None
    assert rope.attention_factor is not None
    assert rope.beta_fast is not None
    assert rope.beta_slow is not None

    def dimension(rotations: float) -> float:
        return (
            rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = (1.0 / (factor * periods)) * (1 - kept) + (1.0 / periods) * kept
    return frequencies, rope.attention_factor


def _llama3(rope: RopeSpec, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """Llama 3.1: long waves are divided by the factor, short ones stay, a blend between."""
    original, low, high = rope.original_context, rope.low_freq_factor, rope.high_freq_factor
    assert original is not None
    assert low is not None
    assert high is not None
    waves = 2 * math.pi / frequencies
    blend = (original / waves - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(waves > original / low, frequencies / factor, frequencies)
    is_between = ~(waves < original / high) & ~(waves > original / low)
    return torch.where(is_between, blended, scaled)


def _longrope(rope: RopeSpec, periods: torch.Tensor, is_long: bool) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv 2402.13753), as the transformers library computes it.

    A model that states ``short_mscale`` and ``long_mscale`` (PhiMoE) always takes the short
    factors there, and the magnitude by the length; others take the factors by the length, and one
    magnitude.
    """
    assert rope.short_factor is not None
    assert rope.long_factor is not None
    if rope.short_mscale is not None and rope.long_mscale is not None:
        short = torch.tensor(rope.short_factor)
        return 1.0 / (short * periods), rope.long_mscale if is_long else rope.short_mscale
    assert rope.attention_factor is not None
    factors = torch.tensor(rope.long_factor if is_long else rope.short_factor)
    return 1.0 / (factors * periods), rope.attention_factor
