"""Scores of tokens are what the definitions say, and take the memory that they are said to take."""

from __future__ import annotations

import math

import pytest
import torch

from moepack.comparing import BYTES_PER_LOGIT, rows_within, score_rows
from tests.support.memory import peak_bytes

VOCAB, WIDTH = 61, 16


def head_of(vocab: int, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(WIDTH, vocab, bias=True).to(dtype)


def probabilities(logits: list[float]) -> list[float]:
    """Softmax, by the book."""
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def test_scores_follow_their_definitions() -> None:
    head = head_of(VOCAB)
    torch.manual_seed(2)
    hidden, exact = 2 * torch.randn(9, WIDTH), 2 * torch.randn(9, WIDTH)
    targets = torch.randint(VOCAB, (9,))
    found = score_rows(head, hidden, targets, exact)
    assert found.exact_nll is not None
    assert found.kl is not None
    assert found.agrees is not None
    for row, token in enumerate(targets.tolist()):
        q = probabilities(head(hidden)[row].tolist())
        p = probabilities(head(exact)[row].tolist())
        assert found.nll[row] == pytest.approx(-math.log(q[token]), abs=1e-5)
        assert found.exact_nll[row] == pytest.approx(-math.log(p[token]), abs=1e-5)
        kl = math.fsum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
        assert found.kl[row] == pytest.approx(kl, abs=1e-5)
        assert found.agrees[row] == (p.index(max(p)) == q.index(max(q)))


def test_equal_states_have_no_divergence_at_all() -> None:
    hidden = 3 * torch.randn(40, WIDTH)
    found = score_rows(head_of(VOCAB), hidden, torch.zeros(40, dtype=torch.int64), hidden.clone())
    assert found.exact_nll is not None
    assert found.kl is not None
    assert found.agrees is not None
    assert found.kl.tolist() == [0.0] * 40
    assert found.agrees.tolist() == [1.0] * 40
    assert found.nll.tolist() == found.exact_nll.tolist()


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    exact = torch.randn(64, WIDTH)
    towards = torch.randn(64, WIDTH)

    def divergence(step: float) -> float:
        hidden = exact + step * towards
        targets = torch.zeros(64, dtype=torch.int64)
        found = score_rows(head_of(VOCAB, torch.float64), hidden.double(), targets, exact.double())
        assert found.kl is not None
        return float(found.kl.mean())

    # It grows with the square of the step.
    assert divergence(1e-4) == pytest.approx(divergence(1e-3) / 100, rel=1e-2)
    assert 0 < divergence(1e-4) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_is_said(dtype: torch.dtype) -> None:
    vocab, rows = 20_000, 16
    linear = head_of(vocab, dtype)
    hidden, exact = torch.randn(rows, WIDTH).to(dtype), torch.randn(rows, WIDTH).to(dtype)
    targets = torch.arange(rows)

    def score() -> None:
        score_rows(lambda states: linear(states).float(), hidden, targets, exact)

    said = BYTES_PER_LOGIT * vocab * rows
    assert 0.7 * said < peak_bytes(score) <= said + 64 * 1024


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 1), (1, 1), (15, 15), (16, 16), (40, 32), (100_000, 512)]
)
def test_as_many_rows_are_taken_as_fit(rows: int, expected: int) -> None:
    assert rows_within(rows * BYTES_PER_LOGIT * VOCAB, VOCAB) == expected
