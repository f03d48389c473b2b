"""Routers choose the experts that the transformers routers choose, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moepack_runtime.router import Router
from moepack_runtime.weights import Weights

from moepack.model_spec import MoeSpec
from tests.conftest import TinyFolder
from tests.decoder.reference import load
from tests.support.tiny_models import HIDDEN_SIZE, TINY_MODELS, build_tiny

KEYS = [(model.family, model.variant) for model in TINY_MODELS]
TOKENS = 500


def routers(tiny_folder: TinyFolder, family: str, variant: str) -> tuple[Router, Any, MoeSpec]:
    """Ours and transformers', of the last layer."""
    spec, trunk, _ = load(tiny_folder(family, variant))
    layer = spec.moe_layers[-1]
    moe = spec.moe(layer)
    theirs = build_tiny(family, variant).model.layers[layer].mlp
    theirs = theirs.router if hasattr(theirs, "router") else theirs.gate
    return Router(moe, Weights(trunk).within(f"layers.{layer}.router")), theirs, moe


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_choice_and_weights_are_those_of_transformers(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    ours, theirs, moe = routers(tiny_folder, family, variant)
    ids, weights = ours.route(inputs())
    _, their_weights, their_ids = theirs(inputs())
    assert ids.shape == weights.shape == (TOKENS, moe.top_k)
    assert weights.dtype == torch.float32
    order, their_order = ids.argsort(-1), their_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, their_order))
    # Not to the last bit: a sum of weights may be taken in another order.
    torch.testing.assert_close(
        weights.gather(1, order), their_weights.gather(1, their_order), atol=0, rtol=1e-6
    )


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_the_ranking_begins_with_the_choice_and_goes_on_as_a_larger_choice_would(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    ours, theirs, moe = routers(tiny_folder, family, variant)
    ranked = ours.rank(inputs(), moe.num_experts)
    assert torch.equal(ranked[:, : moe.top_k], ours.route(inputs()).ids)
    assert torch.equal(ranked.sort(-1).values[0], torch.arange(moe.num_experts))
    if moe.router.scoring == "sparsemixer":  # transformers' always takes two
        return
    theirs.top_k = moe.top_k + 1
    if moe.router.num_groups > 1:
        theirs.top_k = min(
            theirs.top_k, moe.num_experts * moe.router.top_groups // moe.router.num_groups
        )
    chosen = theirs(inputs())[2].sort(-1).values
    assert torch.equal(ranked[:, : theirs.top_k].sort(-1).values, chosen)


@torch.inference_mode()
def test_logits_of_a_bfloat16_model_are_float32_where_the_spec_says_so(
    tiny_folder: TinyFolder,
) -> None:
    _, theirs, moe = routers(tiny_folder, "deepseek_v3", "plain")
    theirs.to(torch.bfloat16)
    ours = Router(moe, Weights({"weight": theirs.weight}))
    x = inputs().bfloat16()
    assert torch.equal(ours.logits(x), theirs(x)[0])
