"""How good a model is on a text: perplexity, and how near it is to the exact one.

Of a token that came, with ``p`` the exact model's distribution over the vocabulary and ``q`` the
packed model's, both given the tokens before it:

- perplexity is exp of the mean of -ln q(token);
- the divergence is KL(p || q) = sum p (ln p - ln q), in nats: what the packed model loses, on
  average, where the exact one is right. It is the natural direction, with the reference first;
- the two agree where the likeliest token is the same.

Each is a mean over tokens, or a function of means. Over several texts all tokens weigh the same.

Tokens of one text are correlated, so an interval comes from whole blocks of them (Künsch, The
jackknife and the bootstrap for general stationary observations, Annals of Statistics 17, 1989; here
with blocks that do not overlap, as in Carlstein 1986): blocks are drawn with replacement within
each text, all figures from the same draws, and the interval is that between percentiles. Texts are
taken as they are: it says how far another stretch of the same texts would differ, not what other
texts would give. Where every block agrees, it is a point.

How long a block has to be was measured on the shipped texts, with experts of 4 bits. Of 1, 64, 256
and 512 tokens the intervals of the divergence were 0.48, 0.75, 1 and 1.22 times as wide as now, of
the ratio of perplexities 0.86, 0.92, 1 and 1.09, of perplexity itself 0.34, 0.70, 1 and 1.29: its
texts consist of documents, some harder than others, beyond the length of any block that leaves
enough of them. So take the interval of perplexity for too narrow rather than too wide, and compare
models by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.records import record

Floats = npt.NDArray[np.float64]

#: Level of every interval.
CONFIDENCE = 0.95

#: Tokens of a block.
BLOCK_TOKENS = 256

#: Fewer blocks say nothing of their spread; then there is no interval.
LEAST_BLOCKS = 8

RESAMPLES = 2000


class TokenScores(NamedTuple):
    """What became of each token of one text, in order, float64 [tokens].

    Attributes
    ----------
    nll : array
        -ln q of the token, in nats.
    exact_nll, kl, agrees : array or None
        -ln p of the token, KL(p || q) there, and 1 where the likeliest token is the same; all or
        none of them.
    """

    nll: Floats
    exact_nll: Floats | None = None
    kl: Floats | None = None
    agrees: Floats | None = None

    def put(self, begin: int, scores: TokenScores) -> None:
        """Fill in consecutive tokens from place ``begin`` on."""
        for column, found in zip(self, scores, strict=True):
            if column is not None and found is not None:
                column[begin : begin + len(found)] = found

    def columns(self) -> Floats:
        """Everything there is, [tokens, 1 or 4]."""
        return np.stack([column for column in self if column is not None], axis=1)


def empty_scores(tokens: int, *, compared: bool) -> TokenScores:
    """Room for the scores of a text; ``compared``: with an exact model."""
    return TokenScores(*(np.full(tokens, np.nan) for _ in range(4 if compared else 1)))


@record
class Estimate:
    """A figure and, where there were blocks enough, its interval of :data:`CONFIDENCE`."""

    value: float
    low: float | None = None
    high: float | None = None


@record
class Nearness:
    """How near the packed model is to the exact one.

    Attributes
    ----------
    exact_perplexity : Estimate
        Of the exact model.
    perplexity_ratio : Estimate
        Packed over exact; its interval is that of the ratio, much narrower than either's own.
    kl : Estimate
        Mean divergence, nats.
    top1_agreement : Estimate
        Share of the tokens at which the likeliest one is the same.
    """

    exact_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    top1_agreement: Estimate


@record
class Quality:
    """One text, or several together; ``nearness`` where there was an exact model."""

    tokens: int
    perplexity: Estimate
    nearness: Nearness | None = None


def quality(texts: Sequence[TokenScores], *, block_tokens: int = BLOCK_TOKENS) -> Quality:
    """Of some texts together, every token weighing the same."""
    columns = [scores.columns() for scores in texts]
    tokens = sum(len(column) for column in columns)
    means = np.sum([column.sum(axis=0) for column in columns], axis=0) / tokens
    draws = _resampled([_blocks(column, block_tokens) for column in columns])

    def estimate(figure: Callable[[Floats], Floats]) -> Estimate:
        """Parameter of ``figure``: means, [..., columns]."""
        value = float(figure(means))
        if draws is None:
            return Estimate(value)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(figure(draws), [tail, 1 - tail])
        return Estimate(value, float(low), float(high))

    nearness = None
    if len(means) > 1:
        nearness = Nearness(
            exact_perplexity=estimate(lambda mean: np.exp(mean[..., 1])),
            perplexity_ratio=estimate(lambda mean: np.exp(mean[..., 0] - mean[..., 1])),
            kl=estimate(lambda mean: mean[..., 2]),
            top1_agreement=estimate(lambda mean: mean[..., 3]),
        )
    return Quality(tokens, estimate(lambda mean: np.exp(mean[..., 0])), nearness)


class _Blocks(NamedTuple):
    """Sums over blocks of consecutive tokens, [blocks, columns], and the tokens of each."""

    sums: Floats
    tokens: npt.NDArray[np.int64]


def _blocks(columns: Floats, block_tokens: int) -> _Blocks:
    """The last block is shorter where they do not divide."""
    begins = np.arange(0, len(columns), block_tokens)
    tokens = np.diff(np.append(begins, len(columns)))
    return _Blocks(np.add.reduceat(columns, begins), tokens)


def _resampled(texts: Sequence[_Blocks]) -> Floats | None:
    """Means over drawn blocks, [resamples, columns]; None where there are too few to draw."""
    strata = _strata(texts)
    if strata is None:
        return None
    generator = np.random.default_rng(0)  # equal scores, equal intervals
    draws = np.empty((RESAMPLES, strata[0].sums.shape[1]))
    for number in range(RESAMPLES):
        sums = np.zeros(draws.shape[1])
        tokens = 0
        for stratum in strata:
            count = len(stratum.tokens)
            chosen = generator.integers(count, size=count)
            sums += stratum.sums[chosen].sum(axis=0)
            tokens += int(stratum.tokens[chosen].sum())
        draws[number] = sums / tokens
    return draws


def _strata(texts: Sequence[_Blocks]) -> list[_Blocks] | None:
    """Within what blocks are exchanged: a text; all short ones; or, of few blocks, everything."""
    strata = [text for text in texts if len(text.tokens) >= LEAST_BLOCKS]
    short = [text for text in texts if len(text.tokens) < LEAST_BLOCKS]
    if short:
        pooled = _pooled(short)
        strata = [*strata, pooled] if len(pooled.tokens) >= LEAST_BLOCKS else [_pooled(texts)]
    return strata if all(len(stratum.tokens) >= LEAST_BLOCKS for stratum in strata) else None


def _pooled(texts: Sequence[_Blocks]) -> _Blocks:
    return _Blocks(
        np.concatenate([text.sums for text in texts]),
        np.concatenate([text.tokens for text in texts]),
    )
