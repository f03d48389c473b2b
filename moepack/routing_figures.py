"""What sums up routing: the figures that models of routing are fitted to, and judged by.

Texts are uint arrays [tokens, L, K] of expert ids; a figure is an array of one number for each
layer. All are averages over what the texts hold together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack.plan import Policy
from moepack.stack_ranks import stack_ranks
from moepack.trace import NO_PREDICTION, LayerShape, Trace

Ids = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
Figure = npt.NDArray[np.float64]

#: Tokens of the segments of :meth:`RoutedTexts.segment_f1`.
SEGMENT_TOKENS = 16


class RoutedTexts:
    """Some texts that one model has routed.

    Parameters
    ----------
    texts : sequence of [tokens, L, K]
        Distinct experts of every token; in the order of their scores for
        :meth:`first_choice_repeated` alone.
    """

    def __init__(self, texts: Sequence[Ids], num_experts: int) -> None:
        self._texts = [np.asarray(text, dtype=np.uint16) for text in texts]
        self._experts = num_experts
        self._top_k = texts[0].shape[2]

    @cached_property
    def _used(self) -> list[Flags]:
        """Which experts every token uses, bool [tokens, L, experts] of each text."""
        found = []
        for text in self._texts:
            used = np.zeros((*text.shape[:2], self._experts), dtype=np.bool_)
            np.put_along_axis(used, text.astype(np.intp), True, axis=2)
            found.append(used)
        return found

    @cached_property
    def _shares(self) -> Figure:
        """Share of the tokens of each text that use an expert, [texts, L, experts]."""
        return np.array([used.mean(axis=0) for used in self._used])

    @cached_property
    def _ranks(self) -> dict[Policy, list[npt.NDArray[np.uint16]]]:
        return {}

    def overlap(self, lags: Sequence[int]) -> Figure:
        """Share of a token's experts that the token some places further on uses too."""
        return np.asarray(np.mean([self._overlap(lag) for lag in lags], axis=0))

    def _overlap(self, lag: int) -> Figure:
        long = [used for used in self._used if len(used) > lag]
        both = sum((used[lag:] & used[:-lag]).sum(axis=(0, 2)) for used in long)
        return np.asarray(both / (self._top_k * sum(len(used) - lag for used in long)))

    def some_expert_repeated(self) -> Figure:
        """Share of the tokens that use at least one expert of the token before."""
        return self._of_pairs(lambda used: (used[1:] & used[:-1]).any(axis=2), self._used)

    def first_choice_repeated(self) -> Figure:
        """Share of the tokens whose first expert is that of the token before."""
        return self._of_pairs(lambda ids: ids[1:, :, 0] == ids[:-1, :, 0], self._texts)

    @staticmethod
    def _of_pairs(same: Callable[[Any], Flags], texts: Sequence[npt.NDArray[Any]]) -> Figure:
        return np.asarray(np.concatenate([same(text) for text in texts]).mean(axis=0))

    def hit_rate(self, policy: Policy, share: float) -> Figure:
        """Of a whole-expert cache for a share of the experts that is empty before each text."""
        if policy not in self._ranks:
            self._ranks[policy] = [self._cold_ranks(text, policy) for text in self._texts]
        slots = round(share * self._experts)
        ranks = np.concatenate(self._ranks[policy])
        return np.asarray((ranks < slots).mean(axis=(0, 2)))

    def _cold_ranks(self, ids: Ids, policy: Policy) -> npt.NDArray[np.uint16]:
        """Ranks in the stack of a policy; those of experts not used before are past every size."""
        tokens, num_layers, top_k = ids.shape
        layers = [LayerShape(layer, self._experts, top_k) for layer in range(num_layers)]
        none = np.full((tokens, num_layers, 1), NO_PREDICTION, dtype=np.uint16)
        zeros = np.zeros(tokens, dtype=np.uint8)
        trace = Trace(
            ids.astype(np.uint16), np.zeros(ids.shape, np.float16), none, zeros.astype("u4"), zeros
        )
        hot = [range(self._experts)] * num_layers
        ranks = stack_ranks(trace, layers, hot, policy).ids
        first = np.full((num_layers, self._experts), tokens)
        layer = np.broadcast_to(np.arange(num_layers)[:, None], ids.shape)
        token = np.broadcast_to(np.arange(tokens)[:, None, None], ids.shape)
        np.minimum.at(first, (layer, ids), token)
        return np.where(first[layer, ids] < token, ranks, np.iinfo(np.uint16).max)

    def segment_f1(self) -> Figure:
        """How well one choice of experts stands for all tokens of a segment, as an F1 score.

        The segment routing best performance of arXiv 2505.16056: an expert counts as chosen for
        all :data:`SEGMENT_TOKENS` tokens of a segment where it is used more often than a threshold,
        the best one for the layer.
        """
        counts = []
        for used in self._used:
            segments = len(used) // SEGMENT_TOKENS
            cut = used[: segments * SEGMENT_TOKENS]
            counts.append(cut.reshape(segments, SEGMENT_TOKENS, *used.shape[1:]).sum(axis=1))
        return np.array([_best_f1(layer) for layer in np.concatenate(counts).swapaxes(0, 1)])

    def usage_entropy(self) -> Figure:
        """Entropy of the usage of experts in all texts together, over its maximum."""
        tokens = np.array([len(text) for text in self._texts], dtype=np.float64)
        return _entropy(np.average(self._shares, axis=0, weights=tokens))

    def text_entropy(self) -> Figure:
        """The same within one text, on average over the texts."""
        return np.asarray(_entropy(self._shares).mean(axis=0))

    def usage_spread(self) -> Figure:
        """Standard deviation over the experts of the share of tokens that use them."""
        tokens = np.array([len(text) for text in self._texts], dtype=np.float64)
        return np.asarray(np.average(self._shares, axis=0, weights=tokens).std(axis=1))

    def other_texts(self) -> Figure:
        """Share of a token's experts that a token of another text uses, on average over tokens."""
        tokens = np.array([len(text) for text in self._texts], dtype=np.float64)
        both = np.einsum("ile,jle->ijl", self._shares, self._shares) / self._top_k
        pairs = np.outer(tokens, tokens) * (1 - np.eye(len(tokens)))
        return np.average(both.reshape(-1, both.shape[2]), axis=0, weights=pairs.ravel())

    def figure(self, name: str) -> Figure:
        """A figure by its name in :data:`FIGURES`."""
        return FIGURES[name](self)


def _best_f1(counts: npt.NDArray[np.integer]) -> float:
    """The best F1 of :meth:`RoutedTexts.segment_f1`; counts [segments, experts] of one layer."""
    times = np.arange(SEGMENT_TOKENS + 1)
    pairs = np.bincount(counts.ravel(), minlength=len(times))
    found = np.cumsum((pairs * times)[::-1])[::-1][1:]
    chosen = np.cumsum(pairs[::-1])[::-1][1:] * SEGMENT_TOKENS
    return float((2 * found / (chosen + counts.sum())).max())


def _entropy(shares: Figure) -> Figure:
    """Of numbers [..., experts] in proportion, over that of equal ones."""
    parts = shares / shares.sum(axis=-1, keepdims=True)
    logs = np.log(np.where(parts > 0, parts, 1.0))
    return np.asarray(-(parts * logs).sum(axis=-1) / np.log(shares.shape[-1]))


def _of_cache(policy: Policy, percent: int) -> Callable[[RoutedTexts], Figure]:
    return lambda texts: texts.hit_rate(policy, percent / 100)


_POLICIES: tuple[Policy, ...] = ("lru", "lfu", "lcp")

#: Every figure, by the name that presets list it under.
FIGURES: dict[str, Callable[[RoutedTexts], Figure]] = {
    "reuse by the next token": lambda texts: texts.overlap([1]),
    "reuse after 2 to 4 tokens": lambda texts: texts.overlap([2, 3, 4]),
    "reuse after 8 to 16 tokens": lambda texts: texts.overlap(range(8, 17, 2)),
    "reuse in another text": RoutedTexts.other_texts,
    "some expert repeated": RoutedTexts.some_expert_repeated,
    "first choice repeated": RoutedTexts.first_choice_repeated,
    "segment F1": RoutedTexts.segment_f1,
    "usage entropy": RoutedTexts.usage_entropy,
    "text entropy": RoutedTexts.text_entropy,
    "usage spread": RoutedTexts.usage_spread,
    **{
        f"{policy} {percent} %": _of_cache(policy, percent)
        for policy in _POLICIES
        for percent in (25, 33, 50, 75)
    },
}
