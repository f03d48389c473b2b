"""How far a rounded model goes along with the exact one's greedy text, beside transformers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.greedy import agreement, choices, common, greedy_texts
from moepack.checkpoint import Checkpoint
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.scored_by_transformers import load

PROMPTS = [[5, 9, 200, 31, 7], [1, 2, 3]]
NEW_TOKENS = 24


@pytest.mark.parametrize(
    ("one", "other", "length"), [([1, 2, 3], [1, 2, 4], 2), ([1], [1], 1), ([0, 5], [1, 5], 0)]
)
def test_texts_have_their_beginning_in_common(
    one: list[int], other: list[int], length: int
) -> None:
    assert common(one, other) == length


def test_agreement_is_that_of_the_choices_of_both_models(tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    checkpoint, model = Checkpoint.open(folder), load(folder)
    spec = checkpoint.spec
    plain, rounded = (mixed_layout(spec, (1.0,), encodings=(name,)) for name in (None, "INT4_G32"))
    place = placement(spec, plain, tops=16, bottoms=0, staging=1)
    with open_engine(checkpoint, plain, place) as engine:
        texts = greedy_texts(engine, PROMPTS, NEW_TOKENS)
        exact = agreement(engine, PROMPTS, texts)
    assert exact == (len(PROMPTS) * NEW_TOKENS, 1.0, (NEW_TOKENS, NEW_TOKENS))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *text]])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(dim=1).tolist() == text
    place = placement(spec, rounded, tops=16, bottoms=0, staging=1)
    with open_engine(checkpoint, rounded, place) as engine:
        found = agreement(engine, PROMPTS, texts)
        forced = [choices(engine, *pair) for pair in zip(PROMPTS, texts, strict=True)]
        alone = greedy_texts(engine, PROMPTS, NEW_TOKENS)
    differ = [
        sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(forced, texts, strict=True)
    ]
    assert found.same == pytest.approx(1 - sum(differ) / (len(PROMPTS) * NEW_TOKENS))
    assert 0 < found.same < 1
    # Up to there both have drawn the same, so both choices are given the same text.
    for length, mine, text, choice in zip(found.along, alone, texts, forced, strict=True):
        assert mine[:length] == text[:length] == choice[:length]
        assert length == NEW_TOKENS or mine[length] == choice[length] != text[length]
