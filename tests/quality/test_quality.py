"""The figures are the plain ones, and their intervals hold what they promise."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from moepack.quality import BLOCK_TOKENS, LEAST_BLOCKS, Estimate, TokenScores, empty_scores, quality


def scored(seed: int, tokens: int) -> TokenScores:
    draw = np.random.default_rng(seed)
    nll, exact = draw.gamma(2.0, 1.5, tokens), draw.gamma(2.0, 1.4, tokens)
    agrees = (draw.random(tokens) < 0.9).astype(np.float64)
    return TokenScores(nll, exact, draw.gamma(0.3, 0.1, tokens), agrees)


def test_figures_of_a_text_are_plain_means() -> None:
    text = scored(1, 1000)
    assert text.exact_nll is not None
    assert text.kl is not None
    assert text.agrees is not None
    found = quality([text])
    assert found.tokens == 1000
    assert found.nearness is not None
    assert found.perplexity.value == pytest.approx(math.exp(math.fsum(text.nll) / 1000))
    exact = math.exp(math.fsum(text.exact_nll) / 1000)
    assert found.nearness.exact_perplexity.value == pytest.approx(exact)
    assert found.nearness.perplexity_ratio.value == pytest.approx(found.perplexity.value / exact)
    assert found.nearness.kl.value == pytest.approx(math.fsum(text.kl) / 1000)
    assert found.nearness.top1_agreement.value == pytest.approx(math.fsum(text.agrees) / 1000)


def test_of_several_texts_every_token_weighs_the_same() -> None:
    texts = [scored(1, 1500), scored(2, 700), scored(3, 90)]
    whole = empty_scores(2290, compared=True)
    for begin, text in zip((0, 1500, 2200), texts, strict=True):
        whole.put(begin, text)
    alone = quality([whole])
    assert quality(texts).perplexity.value == pytest.approx(alone.perplexity.value, rel=1e-12)
    assert quality(texts).tokens == alone.tokens == 2290


def test_without_an_exact_model_there_is_perplexity_alone() -> None:
    text = scored(1, 1000)
    alone = quality([TokenScores(text.nll)])
    assert alone.nearness is None
    beside = quality([text]).perplexity
    assert dataclasses.astuple(alone.perplexity) == pytest.approx(dataclasses.astuple(beside))


def series(draw: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """Series of correlated numbers of mean 3, [count, tokens]: each keeps 0.8 of the one before."""
    noise = draw.normal(size=(count, tokens))
    values = np.empty_like(noise)
    values[:, 0] = noise[:, 0] / math.sqrt(1 - 0.8**2)
    for place in range(1, tokens):
        values[:, place] = 0.8 * values[:, place - 1] + noise[:, place]
    return 3.0 + values


def test_intervals_hold_the_truth_as_often_as_they_say_though_tokens_are_correlated() -> None:
    texts = [TokenScores(values) for values in series(np.random.default_rng(7), 120, 8000)]
    truth = math.exp(3.0)

    def covered(texts: list[TokenScores], block_tokens: int) -> float:
        found = [quality([text], block_tokens=block_tokens).perplexity for text in texts]
        return sum(within(estimate, truth) for estimate in found) / len(found)

    assert covered(texts, BLOCK_TOKENS) >= 0.88
    assert covered(texts[:30], 1) < 0.7, "what taking tokens for independent would have given"


def within(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_an_interval_is_as_wide_as_the_spread_of_block_means_says() -> None:
    text = TokenScores(np.random.default_rng(3).normal(2.0, 0.5, 200 * BLOCK_TOKENS))
    means = text.nll.reshape(200, BLOCK_TOKENS).mean(axis=1)
    expected = 2 * 1.96 * means.std() / math.sqrt(200)
    found = quality([text]).perplexity
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.high / found.low) == pytest.approx(expected, rel=0.1)


def test_that_texts_differ_widens_no_interval() -> None:
    draw = np.random.default_rng(5)
    texts = [TokenScores(draw.normal(mean, 0.5, 50 * BLOCK_TOKENS)) for mean in (1.0, 2.0, 6.0)]
    together = quality(texts).perplexity
    assert together.low is not None
    assert together.high is not None
    expected = 2 * 1.96 * 0.5 / math.sqrt(3 * 50 * BLOCK_TOKENS)
    assert math.log(together.high / together.low) == pytest.approx(expected, rel=0.15)


def test_what_both_models_find_hard_is_not_in_the_interval_of_the_ratio() -> None:
    exact = np.random.default_rng(4).gamma(2.0, 2.0, 4000)
    text = TokenScores(exact + math.log(1.25), exact, np.zeros(4000), np.ones(4000))
    found = quality([text])
    assert found.nearness is not None
    assert width(found.perplexity) > 0.5
    ratio = found.nearness.perplexity_ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.25, 1.25, 1.25))


def test_of_too_few_blocks_there_is_no_interval() -> None:
    blocks = LEAST_BLOCKS - 1
    short = TokenScores(np.random.default_rng(6).normal(2.0, 0.5, blocks * BLOCK_TOKENS))
    assert quality([short]).perplexity.low is None
    long = TokenScores(np.random.default_rng(6).normal(2.0, 0.5, LEAST_BLOCKS * BLOCK_TOKENS))
    assert quality([long]).perplexity.low is not None


def test_many_short_texts_have_an_interval_together() -> None:
    draw = np.random.default_rng(8)
    texts = [TokenScores(np.full(50, draw.normal(2.0, 1.0))) for _ in range(100)]
    means = [text.nll[0] for text in texts]
    found = quality(texts).perplexity
    assert found.low is not None
    assert found.high is not None
    expected = 2 * 1.96 * float(np.std(means)) / math.sqrt(100)
    assert math.log(found.high / found.low) == pytest.approx(expected, rel=0.15)


def test_one_short_text_beside_long_ones_takes_no_interval_away() -> None:
    texts = [scored(1, 3000), scored(2, 3000), scored(3, 20)]
    assert width(quality(texts).perplexity) > 0


def test_equal_scores_have_equal_intervals() -> None:
    random.seed(1)
    first = quality([scored(1, 3000)])
    random.seed(2)
    assert quality([scored(1, 3000)]) == first
