"""Tokens are drawn from the distribution that transformers would draw from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moepack_runtime.sampling import LEAST_TEMPERATURE, Sampler, SamplingParams
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moepack.errors import RunError

VOCAB = 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.05, 4),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
)
def test_probabilities_are_those_of_the_transformers_warpers(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    expected = logits(seed)[None]
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    for warper in warpers:
        expected = warper(torch.zeros(1, 1, dtype=torch.int64), expected)
    found = Sampler(SamplingParams(temperature, top_k, top_p)).probabilities(logits(seed))
    torch.testing.assert_close(found, expected.softmax(-1)[0], atol=1e-6, rtol=1e-5)


def test_no_temperature_takes_the_likeliest() -> None:
    sampler = Sampler()
    assert [sampler.draw(logits(seed)) for seed in range(5)] == [
        int(logits(seed).argmax()) for seed in range(5)
    ]


def test_the_likeliest_stays_however_small_top_p() -> None:
    probabilities = Sampler(SamplingParams(1.0, top_p=1e-12)).probabilities(logits(0))
    assert probabilities[logits(0).argmax()] == 1


def test_equal_seeds_draw_equal_tokens_and_others_do_not() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.5, seed=seed))
        return [sampler.draw(logits(place)) for place in range(40)]

    torch.manual_seed(1)
    first = draws(7)
    torch.manual_seed(2)  # the sampler's generator is its own
    assert draws(7) == first
    assert draws(8) != first


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3))
    expected = sampler.probabilities(logits(0))
    counts = torch.bincount(
        torch.tensor([sampler.draw(logits(0)) for _ in range(4000)]), minlength=VOCAB
    )
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"seed": -3}, "seed -3"),
    ],
)
def test_a_parameter_out_of_range_is_named(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(**params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("narrowed", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logits_that_are_no_numbers_are_named_and_not_drawn_from(
    temperature: float, value: float, narrowed: dict[str, Any]
) -> None:
    damaged = logits(0)
    damaged[17] = value
    sampler = Sampler(SamplingParams(temperature, **narrowed))
    with pytest.raises(RunError, match="expected a finite one; check the pack"):
        sampler.draw(damaged)
    damaged[17] = -torch.inf  # a token that is ruled out
    assert sampler.draw(damaged) != 17


def test_a_temperature_too_small_to_divide_by_is_refused() -> None:
    assert Sampler(SamplingParams(LEAST_TEMPERATURE)).draw(logits(0)) == int(logits(0).argmax())
    with pytest.raises(ValueError, match="expected 0"):
        SamplingParams(LEAST_TEMPERATURE / 2)
