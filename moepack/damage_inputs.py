"""What of a text an expert gets: its tokens, a sample of them, and what they are like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moepack.quantise import Importance

if TYPE_CHECKING:
    import torch
    from moepack_runtime.ffn import FfnWeights

    from moepack.model_spec import MoeSpec

#: Inputs that errors are measured on, of an expert.
SAMPLED = 256


class Seen(NamedTuple):
    """One block in front of a layer's experts.

    ``inputs`` [tokens, hidden] are what they see, ``norms`` [tokens] those of the residual stream
    in front of them, squared; ``ids`` and ``weights`` [tokens, top_k] the routing.
    """

    inputs: torch.Tensor
    norms: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Drawn(NamedTuple):
    """Some of the tokens that use an expert.

    ``tokens`` [rows] are their places in the text; ``factor`` [rows] is what a squared error of
    each counts for in the mean over all tokens.
    """

    tokens: torch.Tensor
    factor: torch.Tensor


def draw(seen: Seen, expert: int, seed: tuple[int, int]) -> Drawn:
    """At most :data:`SAMPLED` tokens of an expert.

    One that no token uses counts as used once, by any: the text is only a sample itself.
    """
    import torch

    tokens, weights = users(seen, expert)
    total, count = len(seen.ids), len(tokens)
    if count == 0:
        tokens = torch.arange(total, device=seen.ids.device)
        weights = torch.full((total, 1), float(seen.weights.mean()), device=tokens.device)
    if len(tokens) > SAMPLED:
        rows = np.random.default_rng(seed).permutation(len(tokens))[:SAMPLED]
        kept = torch.from_numpy(np.sort(rows)).to(tokens.device)
        tokens, weights = tokens[kept], weights[kept]
    return Drawn(tokens, weights[:, 0].square() * (max(1, count) / len(tokens) / total))


def users(seen: Seen, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that use an expert, [count], and its weight for each, [count, 1]."""
    tokens, places = (seen.ids == expert).nonzero(as_tuple=True)
    return tokens, seen.weights[tokens, places].unsqueeze(1)


def moments_of(seen: Seen, expert: int, weights: FfnWeights, moe: MoeSpec) -> Importance:
    """The moments of an expert's inputs; see :mod:`moepack.calibration`.

    One that no token uses is taken to see what all tokens are.
    """
    import torch
    import torch.nn.functional as F
    from moepack_runtime.ffn import activate

    tokens, factors = users(seen, expert)
    if not len(tokens):
        tokens = torch.arange(len(seen.ids), device=seen.ids.device)
        factors = torch.ones((len(tokens), 1), device=tokens.device)
    inputs = seen.inputs[tokens].float()
    counts = factors.square() / seen.norms[tokens].unsqueeze(1)
    neurons = activate(
        F.linear(inputs, weights.gate, weights.gate_bias),
        F.linear(inputs, weights.up, weights.up_bias),
        moe.activation_spec,
    )
    total = counts.sum()
    hidden, inner = ((counts * each.square()).sum(dim=0) / total for each in (inputs, neurons))
    return Importance(hidden.cpu().numpy(), inner.cpu().numpy())


def joined(blocks: Sequence[Seen]) -> Seen:
    """Some blocks as one."""
    import torch

    return Seen(*(torch.cat(column) for column in zip(*blocks, strict=True)))
