"""A step that can be recorded computes what the decoder computes, wherever its token is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from moepack_runtime.predict import NextRouter
from moepack_runtime.token_graphs import TokenStep, recorded_lengths
from typing_extensions import override

from tests.conftest import TinyFolder
from tests.decoder.reference import Runner, Weights, load
from tests.support.tiny_models import TINY_MODELS

KEYS = [(model.family, model.variant) for model in TINY_MODELS]
CONTEXT = 48
PROMPT = [(11 * place * place + 5 * place + 7) % 250 + 3 for place in range(22)]


class StepByStep(Runner):
    """Takes one token at a time through steps as they are recorded, where layers have them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, context_tokens=CONTEXT)
        self.token = TokenStep(self.spec, self.decoder, CONTEXT, torch.device("cpu"))
        self.steps = 0

    @override
    def _layer(self, number: int, block: torch.Tensor, start: int) -> torch.Tensor:
        layer = self.decoder.layers[number]
        if len(block) > 1 or not layer.is_recordable:
            return super()._layer(number, block, start)
        self.steps += 1
        self.token.move_to(start)
        self.token.take(block)
        reached = self.token.reach(number, layer, min(CONTEXT, start + 1 + start % 5))
        self.kv.layers[number].count(start)
        if reached.inputs is None or reached.routing is None:
            return reached.residual
        return self.add_experts(number, reached.residual, reached.inputs, reached.routing)


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_step_by_step_is_what_the_decoder_gives(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    """Also where a longer sequence left its rows, and where more rows are read than there are."""
    weights = load(tiny_folder(family, variant))
    ordinary, stepping = Runner(weights, context_tokens=CONTEXT), StepByStep(weights)
    stepping.run(PROMPT[::-1])
    stepping.kv.truncate(0)
    torch.testing.assert_close(stepping.run(PROMPT[:10]), ordinary.run(PROMPT[:10]))
    for token in PROMPT[10:]:
        found, expected = stepping.run([token]), ordinary.run([token])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    kinds = [layer.attention for layer in weights.spec.layers]
    layers = sum(kind.window is None and not kind.sinks for kind in kinds)
    assert stepping.steps == layers * len(PROMPT[10:])


@torch.inference_mode()
def test_the_next_layers_ranking_lies_behind_the_ids(tiny_folder: TinyFolder) -> None:
    runner = Runner(load(tiny_folder("mixtral", "plain")), context_tokens=CONTEXT)
    runner.run(PROMPT[:5])
    layers = runner.decoder.layers
    predictor = NextRouter(layers)
    rankings = {0: partial(predictor.rank, 1, depth=3)}
    token = TokenStep(runner.spec, runner.decoder, CONTEXT, torch.device("cpu"), rankings)
    token.move_to(5)
    token.take(runner.decoder.embed(torch.tensor(PROMPT[5:6])))
    for number, more in ((0, 3), (1, 0)):
        reached = token.reach(number, layers[number], CONTEXT)
        assert reached.routing is not None
        assert reached.named is not None
        ids = reached.routing.ids[0].tolist()
        ranking = predictor.rank(1, reached.residual, 3)[0].tolist()
        assert reached.named.tolist() == [ids + ranking[:more]]


@pytest.mark.parametrize(
    ("context_tokens", "expected"),
    [(1, [1]), (512, [512]), (513, [512, 513]), (3000, [512, 1024, 2048, 3000])],
)
def test_lengths_double_up_to_the_context(context_tokens: int, expected: list[int]) -> None:
    assert recorded_lengths(context_tokens) == expected
