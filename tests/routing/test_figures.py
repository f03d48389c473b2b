"""Each figure against a loop that says what it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from moepack.plan import Policy
from moepack.routing_figures import FIGURES, SEGMENT_TOKENS, RoutedTexts
from tests.support.caches import obvious_cache

EXPERTS, TOP_K, LAYERS = 12, 3, 2


def drawn_texts() -> list[npt.NDArray[np.intp]]:
    """Two texts in which low ids are used more, and half the experts stay for the next token."""
    generator = np.random.default_rng(5)
    texts = []
    for tokens in (70, 40):
        ids = np.empty((tokens, LAYERS, TOP_K), dtype=np.intp)
        for layer in range(LAYERS):
            chosen: list[int] = []
            for token in range(tokens):
                chosen = chosen[:1] if generator.random() < 0.5 else []
                while len(chosen) < TOP_K:
                    expert = int(EXPERTS * generator.random() ** 2)
                    chosen += [expert] if expert not in chosen else []
                ids[token, layer] = chosen
        texts.append(ids)
    return texts


TEXTS = drawn_texts()
ROUTED = RoutedTexts(TEXTS, EXPERTS)


def neighbours(layer: int, lag: int) -> Iterator[tuple[list[int], list[int]]]:
    for text in TEXTS:
        rows = text[:, layer].tolist()
        yield from zip(rows[:-lag], rows[lag:], strict=True)


def entropy(ids: npt.NDArray[np.intp]) -> float:
    shares = [float((ids == expert).sum()) / ids.size for expert in range(EXPERTS)]
    return -sum(share * math.log(share) for share in shares if share) / math.log(EXPERTS)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_overlap(layer: int) -> None:
    def share(lag: int) -> float:
        found = [len({*a} & {*b}) / TOP_K for a, b in neighbours(layer, lag)]
        return sum(found) / len(found)

    assert ROUTED.overlap([1])[layer] == pytest.approx(share(1))
    assert ROUTED.overlap([2, 45])[layer] == pytest.approx((share(2) + share(45)) / 2)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_repetitions(layer: int) -> None:
    pairs = list(neighbours(layer, 1))
    some = sum(bool({*a} & {*b}) for a, b in pairs) / len(pairs)
    assert ROUTED.some_expert_repeated()[layer] == pytest.approx(some)
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    assert ROUTED.first_choice_repeated()[layer] == pytest.approx(first)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp"])
def test_hit_rate_of_a_cache_that_was_empty(policy: Policy, share: float, layer: int) -> None:
    hits = total = 0
    for text in TEXTS:
        rows = text[:, layer].tolist()
        held = obvious_cache(round(share * EXPERTS), range(EXPERTS), policy, rows)
        seen: set[int] = set()
        for experts, here in zip(rows, held, strict=True):
            hits += sum(expert in here and expert in seen for expert in experts)
            total += len(experts)
            seen |= {*experts}
    assert ROUTED.hit_rate(policy, share)[layer] == pytest.approx(hits / total)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_segment_f1(layer: int) -> None:
    counts = []
    for text in TEXTS:
        for begin in range(0, len(text) - SEGMENT_TOKENS + 1, SEGMENT_TOKENS):
            segment = text[begin : begin + SEGMENT_TOKENS, layer]
            counts += [int((segment == expert).sum()) for expert in range(EXPERTS)]
    best = 0.0
    for threshold in range(1, SEGMENT_TOKENS + 1):
        chosen = [count for count in counts if count >= threshold]
        if chosen:
            precision = sum(chosen) / (len(chosen) * SEGMENT_TOKENS)
            recall = sum(chosen) / sum(counts)
            best = max(best, 2 * precision * recall / (precision + recall))
    assert ROUTED.segment_f1()[layer] == pytest.approx(best)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_usage(layer: int) -> None:
    together = np.concatenate([text[:, layer] for text in TEXTS])
    assert ROUTED.usage_entropy()[layer] == pytest.approx(entropy(together))
    apart = [entropy(text[:, layer]) for text in TEXTS]
    assert ROUTED.text_entropy()[layer] == pytest.approx(sum(apart) / 2)
    shares = [(together == expert).any(axis=1).mean() for expert in range(EXPERTS)]
    assert ROUTED.usage_spread()[layer] == pytest.approx(np.std(shares))
    found = [len({*a} & {*b}) / TOP_K for a in TEXTS[0][:, layer] for b in TEXTS[1][:, layer]]
    assert ROUTED.other_texts()[layer] == pytest.approx(sum(found) / len(found))


def test_every_figure_has_a_name_and_a_number_for_each_layer() -> None:
    for name, figure in FIGURES.items():
        values = figure(ROUTED)
        assert values.shape == (LAYERS,), name
        assert ((values >= 0) & (values <= 1)).all(), name
