"""What of a text an expert gets: its tokens, a sample of them, and what they are like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moepack.quantise import Importance
from moepack.second_moments import Factor, factorised

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


class Inputs(NamedTuple):
    """What an expert's weights are multiplied with, and what errors count for there.

    ``hidden`` [tokens, hidden] for gate and up, ``neurons`` [tokens, F] for down, ``counts``
    [tokens, 1]; float32.
    """

    hidden: torch.Tensor
    neurons: torch.Tensor
    counts: torch.Tensor

    def moments(self) -> Importance:
        """Mean squares; see :mod:`moepack.calibration`."""
        total = self.counts.sum()
        hidden, neurons = (
            (self.counts * each.square()).sum(dim=0) / total for each in (self.hidden, self.neurons)
        )
        return Importance(hidden.cpu().numpy(), neurons.cpu().numpy())


def inputs_of(seen: Seen, expert: int, weights: FfnWeights, moe: MoeSpec) -> Inputs:
    """What an expert gets.

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
    neurons = activate(
        F.linear(inputs, weights.gate, weights.gate_bias),
        F.linear(inputs, weights.up, weights.up_bias),
        moe.activation_spec,
    )
    return Inputs(inputs, neurons, factors.square() / seen.norms[tokens].unsqueeze(1))


def layer_factor(seen: Seen, width: int) -> Factor:
    """Second moments of what all experts of a layer get, each token by the weights of all."""
    counts = seen.weights.square().sum(dim=1) / seen.norms
    return factor_of(seen.inputs.float(), counts.unsqueeze(1), width)


def factor_of(inputs: torch.Tensor, counts: torch.Tensor, width: int) -> Factor:
    """Second moments of inputs, in blocks of so many neighbours.

    In float64: of inputs that are much the same, little is left.

    Parameters
    ----------
    inputs, counts
        float32 [tokens, n] and [tokens, 1].
    """
    import torch

    tokens, size = inputs.shape
    grouped = inputs.double().reshape(tokens, size // width, width).transpose(0, 1)
    blocks = torch.matmul((grouped * counts.double()).transpose(1, 2), grouped)
    return factorised(blocks.cpu().numpy(), tokens)


def joined(blocks: Sequence[Seen]) -> Seen:
    """Some blocks as one."""
    import torch

    return Seen(*(torch.cat(column) for column in zip(*blocks, strict=True)))


def unshared(blocks: Sequence[Seen], shared: Sequence[int]) -> Seen | None:
    """Some blocks as one, without so many of the first tokens of each; None if half is not left.

    What is fitted to many products of inputs suits the tokens that it was fitted to better than
    others. What is to tell how well must not be among them, if there are enough others.
    """
    left = joined(
        [
            Seen(*(column[count:] for column in block))
            for block, count in zip(blocks, shared, strict=True)
        ]
    )
    return left if 2 * len(left.ids) >= sum(len(block.ids) for block in blocks) else None
