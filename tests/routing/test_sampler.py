from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moepack.routing_model import FitSample, RoutingModel
from moepack.routing_sampler import sample_texts, sample_trace
from moepack.stack_ranks import stack_ranks
from moepack.trace import NO_PREDICTION, LayerShape, part_of_tokens


def model(
    *,
    popularity: float = 0.3,
    text: float = 0.7,
    context: float = 0.8,
    context_tokens: float = 2.0,
    first_recall: tuple[float, ...] = (0.4, 0.6),
    recall: float = 0.8,
) -> RoutingModel:
    return RoutingModel(
        version=1,
        name="made-up",
        how="made up",
        depths=(0.0,),
        popularity=(popularity,),
        text=(text,),
        context=(context,),
        context_tokens=context_tokens,
        first_recall=first_recall,
        recall=recall,
    )


def alike(count: int, experts: int, top_k: int) -> list[LayerShape]:
    return [LayerShape(layer, experts, top_k) for layer in range(count)]


def shared(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    """Share of the last axis of one that is in the last axis of the other, by layer."""
    return np.asarray((a[..., :, None] == b[..., None, :]).any(axis=-1).mean(axis=(0, 2)))


def entropy(ids: npt.NDArray[Any], experts: int) -> float:
    shares = np.bincount(ids.ravel(), minlength=experts) / ids.size
    return float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())


MIXED = [LayerShape(1, 8, 2), LayerShape(2, 16, 4), LayerShape(4, 16, 4), LayerShape(7, 3, 2)]


@pytest.mark.parametrize("layers", [alike(9, 16, 4), MIXED])
def test_every_token_has_distinct_experts_of_its_layer(layers: Sequence[LayerShape]) -> None:
    trace = sample_trace(model(), layers, tokens=200, sequences=3, seed=0)
    for row, (_, experts, top_k) in enumerate(layers):
        depth = min(2 * top_k, experts)
        for ids in (trace.ids[:, row, :top_k], trace.predicted[:, row, :depth]):
            known = ids[ids[:, 0] != NO_PREDICTION]
            assert known.max() == experts - 1
            assert (np.diff(np.sort(known, axis=1)) > 0).all()
        assert (trace.predicted[:, row, depth:] == NO_PREDICTION).all()
        assert trace.weights[0, row, :top_k].tolist() == pytest.approx(
            [1 / top_k] * top_k, rel=1e-3
        )


def test_texts_and_parts_are_as_in_a_recorded_trace() -> None:
    trace = sample_trace(model(), alike(2, 8, 2), tokens=101, sequences=3, seed=0)
    assert np.bincount(trace.sequence).tolist() == [34, 34, 33]
    assert trace.part[:34].tolist() == part_of_tokens(34).tolist()
    blind = np.argwhere((trace.predicted == NO_PREDICTION).any(axis=2)).tolist()
    assert blind == [[0, 0], [34, 0], [68, 0]]


def test_a_trace_is_its_seeds() -> None:
    layers = alike(10, 16, 4)
    first, again, other = (
        sample_trace(model(), layers, tokens=64, sequences=2, seed=seed) for seed in (7, 7, 8)
    )
    assert (first.ids == again.ids).all()
    assert (first.predicted == again.predicted).all()
    assert (first.ids != other.ids).any()


@pytest.mark.parametrize(("tokens", "sequences"), [(3, 4), (3, 0)])
def test_a_text_has_a_token(tokens: int, sequences: int) -> None:
    with pytest.raises(ValueError, match="one or more in each"):
        sample_trace(model(), MIXED, tokens=tokens, sequences=sequences, seed=0)


def test_without_preferences_a_cache_hits_its_share_of_the_experts() -> None:
    even = model(popularity=0.0, text=0.0, context=0.0, first_recall=(), recall=0.0)
    layers = alike(8, 32, 4)
    trace = sample_trace(even, layers, tokens=1500, sequences=1, seed=1)
    for policy in ("lru", "lfu", "lcp", "pinned"):
        ranks = stack_ranks(trace, layers, [range(32)] * 8, policy).ids
        for slots in (4, 8, 16, 24):
            # 48,000 activations: four standard errors are less than 1 %.
            assert (ranks < slots).mean() == pytest.approx(slots / 32, abs=0.01)
    assert shared(trace.ids, trace.predicted[:, :, :4])[1:].mean() == pytest.approx(
        4 / 32, abs=0.01
    )


def test_more_popularity_is_less_entropy_and_texts_have_their_own() -> None:
    layers = alike(4, 32, 4)

    def drawn(**changes: float) -> npt.NDArray[Any]:
        trace = sample_trace(model(**changes), layers, tokens=800, sequences=2, seed=2)  # type: ignore[arg-type]
        return trace.ids

    found = [
        entropy(drawn(popularity=spread, text=0.0)[:, 0], 32) for spread in (0.0, 0.4, 0.8, 1.6)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] + 0.5
    ids = drawn(popularity=0.0, text=1.5)[:, 0]
    assert entropy(ids, 32) > max(entropy(ids[:400], 32), entropy(ids[400:], 32)) + 0.1


def test_more_context_is_more_reuse_and_it_lasts_as_long_as_it_says() -> None:
    layers = alike(8, 32, 4)

    def reuse(lag: int, context: float, tokens: float) -> float:
        spreads = model(popularity=0.0, text=0.0, context=context, context_tokens=tokens)
        ids = sample_trace(spreads, layers, tokens=1000, sequences=1, seed=3).ids
        return float(shared(ids[lag:], ids[:-lag]).mean())

    rising = [reuse(1, context, 2.0) for context in (0.0, 0.5, 1.0, 2.0)]
    assert rising == sorted(rising)
    assert rising[0] == pytest.approx(4 / 32, abs=0.01)
    assert rising[-1] > 0.3
    assert reuse(8, 1.5, 1.0) == pytest.approx(4 / 32, abs=0.01)
    assert reuse(8, 1.5, 16.0) > 0.25


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (60, 4), (64, 8), (256, 8)])
def test_the_share_of_experts_that_is_foreseen_is_the_one_asked_for(
    experts: int, top_k: int
) -> None:
    foreseen = model(first_recall=(0.4, 0.6), recall=0.85)
    trace = sample_trace(foreseen, alike(10, experts, top_k), tokens=600, sequences=1, seed=4)
    found = shared(trace.ids[1:], trace.predicted[1:, :, :top_k])
    assert found[0] == pytest.approx(0.4, abs=0.05)
    assert found[1] == pytest.approx(0.6, abs=0.05)
    assert found[2:].mean() == pytest.approx(0.85, abs=0.02)
    deeper = shared(trace.ids[1:], trace.predicted[1:])
    assert (deeper > found).all()


def test_prediction_is_perfect_or_blind_where_that_is_asked_for() -> None:
    layers = alike(6, 64, 4)
    perfect = sample_trace(model(recall=1.0), layers, tokens=200, sequences=1, seed=5)
    assert (perfect.ids[:, 2:] == perfect.predicted[:, 2:, :4]).all()
    blind = sample_trace(model(recall=0.05), layers, tokens=900, sequences=1, seed=5)
    assert shared(blind.ids, blind.predicted[:, :, :4])[2:].mean() == pytest.approx(
        1 / 16, abs=0.01
    )


def test_spreads_change_with_depth() -> None:
    rising = RoutingModel(
        version=1,
        name="made-up",
        how="made up",
        depths=(0.5, 1.0),
        popularity=(0.0, 3.0),
        text=(0.0, 0.0),
        context=(0.0, 0.0),
        context_tokens=1.0,
        first_recall=(),
        recall=0.0,
    )
    ids = sample_trace(rising, alike(9, 32, 4), tokens=500, sequences=1, seed=6).ids
    found = [entropy(ids[:, layer], 32) for layer in range(9)]
    assert found[:5] == pytest.approx([found[0]] * 5, abs=0.02)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_texts_alone_are_texts_of_the_same_model() -> None:
    sample = FitSample(layers=10, experts=32, top_k=4, text_tokens=(300, 200), draws=1)
    texts = sample_texts(model(), sample, seed=9)
    assert [text.shape for text in texts] == [(300, 10, 4), (200, 10, 4)]
    trace = sample_trace(model(), alike(10, 32, 4), tokens=500, sequences=2, seed=9)
    own = float(shared(texts[0][1:], texts[0][:-1]).mean())
    assert own == pytest.approx(float(shared(trace.ids[1:250], trace.ids[:249]).mean()), abs=0.02)
