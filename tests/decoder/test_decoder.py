"""The decoder computes what transformers computes, in prefill and in cached decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import TinyFolder
from tests.decoder.reference import Runner, load, oracle
from tests.support.tiny_models import TINY_MODELS, build_tiny

KEYS = [(model.family, model.variant) for model in TINY_MODELS]

#: Longer than every sliding window, and no multiple of the block.
PROMPT = [(11 * place * place + 5 * place + 7) % 250 + 3 for place in range(45)]
NEW_TOKENS = 32


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_transformers(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    folder = tiny_folder(family, variant)
    model = oracle(folder)
    runner = Runner(load(folder))
    expected = model(torch.tensor([PROMPT]), use_cache=True)
    found = runner.run(PROMPT)
    torch.testing.assert_close(found, expected.logits[0], atol=1e-4, rtol=0)
    for _ in range(NEW_TOKENS):
        token = int(expected.logits[0, -1].argmax())
        assert int(found[-1].argmax()) == token
        expected = model(
            torch.tensor([[token]]), past_key_values=expected.past_key_values, use_cache=True
        )
        found = runner.run([token])
        torch.testing.assert_close(found, expected.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_the_length_of_blocks_changes_no_more_than_rounding(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    weights = load(tiny_folder(family, variant))
    whole = Runner(weights, block_tokens=64).run(PROMPT)
    for block_tokens in (1, 7):
        parts = Runner(weights, block_tokens=block_tokens).run(PROMPT)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@torch.inference_mode()
def test_equal_shapes_give_equal_bits(tiny_folder: TinyFolder, family: str) -> None:
    """Whatever was in the cache before, and wherever the weights lie."""
    first, second = (Runner(load(tiny_folder(family, "plain"))) for _ in range(2))
    second.run(PROMPT[::-1])
    second.kv.truncate(0)
    assert torch.equal(first.run(PROMPT), second.run(PROMPT))


@pytest.mark.parametrize(("family", "variant"), KEYS)
@torch.inference_mode()
def test_a_kept_cache_can_be_gone_on_from(
    tiny_folder: TinyFolder, family: str, variant: str
) -> None:
    weights = load(tiny_folder(family, variant))
    expected = Runner(weights).run(PROMPT)
    runner = Runner(weights)
    runner.run(PROMPT[:5])
    runner.run([99, 98])
    assert runner.kv.can_truncate(5)
    runner.kv.truncate(5)
    found = runner.run(PROMPT[5:])
    torch.testing.assert_close(found, expected[5:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("block_tokens", [1, 64])
@torch.inference_mode()
def test_the_error_of_bfloat16_is_no_larger_than_that_of_transformers(
    tmp_path: Path, family: str, block_tokens: int
) -> None:
    """Of one layer (attention, router, experts, head) against float64, over all logits."""
    model = build_tiny(family, "plain")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:1]
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    ids = torch.randint(3, 250, (1, 200), generator=torch.Generator().manual_seed(0))
    exact = oracle(tmp_path, torch.float64)(ids).logits[0]
    theirs = oracle(tmp_path, torch.bfloat16)(ids).logits[0]
    runner = Runner(load(tmp_path), context_tokens=200, block_tokens=block_tokens)
    ours = runner.run(ids[0].tolist())
    # The median: where rounding flips a choice of the router, the error says nothing.
    assert (ours - exact).abs().median() <= (theirs - exact).abs().median()
