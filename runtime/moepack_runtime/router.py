"""The router: which experts a token takes, with what weights, and how it ranks them all."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moepack.model_spec import MoeSpec
from moepack_runtime.products import linear
from moepack_runtime.weights import Weights

#: Keeps a sum of sigmoids from being zero, as in the transformers library.
_TINY = 1e-20


class Routing(NamedTuple):
    """What the router decided for a block.

    Attributes
    ----------
    ids : Tensor
        int64 [tokens, top_k], the best liked expert first.
    weights : Tensor
        float32 [tokens, top_k].
    """

    ids: torch.Tensor
    weights: torch.Tensor


class Router:
    """Chooses experts, in float32 from the logits on."""

    def __init__(self, moe: MoeSpec, weights: Weights) -> None:
        self._spec = moe.router
        self._top_k = moe.top_k
        self._num_experts = moe.num_experts
        self._weight = weights["weight"]
        self._bias = weights.get("bias")
        self._correction_bias = weights.get("correction_bias")

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to float32 [tokens, experts]."""
        if not self._spec.float32:
            return linear(x, self._weight, self._bias).float()
        bias = None if self._bias is None else self._bias.float()
        return F.linear(x.float(), self._weight.float(), bias)

    def route(self, x: torch.Tensor) -> Routing:
        """The chosen experts of each token of [tokens, hidden]."""
        logits = self.logits(x)
        if self._spec.scoring == "sparsemixer":
            return self._sparsemixer(logits)
        if self._spec.scoring == "topk_softmax":
            chosen, ids = logits.topk(self._top_k, -1)
            return Routing(ids, chosen.softmax(-1))
        scores = self._scores(logits)
        liked, ids = self._preferences(scores).topk(self._top_k, -1)
        weights = liked if self._correction_bias is None else scores.gather(1, ids)
        if self._spec.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        if self._spec.scaling != 1.0:
            weights = weights * self._spec.scaling
        return Routing(ids, weights)

    def rank(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        """The ``depth`` best liked experts of each token, best first: int64 [tokens, depth].

        The first ``top_k`` are those that :meth:`route` chooses.
        """
        logits = self.logits(x)
        if self._spec.scoring in {"softmax", "sigmoid"}:
            logits = self._preferences(self._scores(logits))
        return logits.topk(min(depth, self._num_experts), -1).indices

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self._spec.scoring == "sigmoid" else logits.softmax(-1)

    def _preferences(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores that decide the choice: corrected, and masked outside the best groups."""
        spec = self._spec
        if self._correction_bias is not None:
            scores = scores + self._correction_bias
        if spec.num_groups == 1:
            return scores
        groups = scores.view(
            scores.shape[0], spec.num_groups, -1
        )  # [tokens, groups, experts of each]
        if spec.group_score == "max":
            of_group = groups.amax(-1)
        else:
            of_group = groups.topk(2, -1).values.sum(-1)
        best = of_group.topk(spec.top_groups, -1).indices
        outside = torch.ones_like(of_group, dtype=torch.bool).scatter_(1, best, False)
        masked = 0.0 if spec.masked_score == "zero" else -torch.inf
        return groups.masked_fill(outside.unsqueeze(-1), masked).flatten(1)

    def _sparsemixer(self, logits: torch.Tensor) -> Routing:
        """PhiMoE's choice (arXiv 2409.12136), one expert after another.

        Each one's weight is its softmax among the experts that are nearly as good; those chosen
        before are out.
        """
        left = logits
        ids, weights = [], []
        for _ in range(self._top_k):
            best, chosen = left.max(-1, keepdim=True)
            distance = (best - logits) / logits.abs().clamp(min=best)
            near = left.masked_fill(distance > 2 * self._spec.jitter, -torch.inf)
            ids.append(chosen)
            weights.append(near.softmax(-1).gather(-1, chosen))
            left = left.scatter(-1, chosen, -torch.inf)
        return Routing(torch.cat(ids, -1), torch.cat(weights, -1))
