"""Quantised checkpoints run as transformers runs them: read as they are, and packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from moepack_runtime.store import PackStore

from moepack.checkpoint import Checkpoint
from moepack.pack import pack
from tests.support.engines import greedy, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.quantised_sources import QUANTISED, dequantised_model, quantised_model

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
NEW_TOKENS = 16

every_model = pytest.mark.parametrize("key", [made.key for made in QUANTISED])


@torch.inference_mode()
def reference(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits at each prompt position and the greedy continuation, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return model(ids).logits[0].float(), tokens[0, len(PROMPT) :].tolist()


@every_model
def test_logits_are_those_of_transformers_on_the_dequantised_model(
    tmp_path: Path, key: str
) -> None:
    """From the checkpoint as it is, and from a pack of it."""
    folder = quantised_model(key, tmp_path / "source")
    logits, tokens = reference(dequantised_model(folder, tmp_path / "plain"))
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.3, 1.0, 0.5, 0.0))
    place = placement(spec, layout, tops=2, bottoms=1, staging=2, context=96)
    pack(checkpoint, plan_for(spec, layout, place), tmp_path / "pack")
    for store in (None, PackStore.open(tmp_path / "pack")):
        with open_engine(checkpoint, layout, place, store=store) as engine:
            found = engine.forward(PROMPT, all_logits=True)
            torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
            engine.reset()
            assert greedy(engine, PROMPT, NEW_TOKENS) == tokens


@every_model
@torch.inference_mode()
def test_transformers_reads_the_same_model_from_the_same_files(tmp_path: Path, key: str) -> None:
    """Its own loader, which has to dequantise where there is no GPU."""
    pytest.importorskip("accelerate")
    folder = quantised_model(key, tmp_path / "source")
    logits, _ = reference(dequantised_model(folder, tmp_path / "plain"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(model(torch.tensor([PROMPT])).logits[0], logits)


@pytest.mark.parametrize(("dtype", "trunk"), [("bfloat16", "INT8"), ("float16", "")])
@every_model
@torch.inference_mode()
def test_a_pack_of_a_quantised_model_is_that_of_the_dequantised_one(
    tmp_path: Path, key: str, dtype: str, trunk: str
) -> None:
    """But for the identity of the weights, which is that of the files."""
    source = quantised_model(key, tmp_path / "source", dtype)
    packs = []
    for folder in (source, dequantised_model(source, tmp_path / "plain")):
        checkpoint = Checkpoint.open(folder)
        layout = dataclasses.replace(mixed_layout(checkpoint.spec, (0.5, 1.0)), trunk=trunk)
        place = placement(checkpoint.spec, layout, tops=2, bottoms=2, staging=2, context=96)
        packs.append(tmp_path / f"{folder.name}-pack")
        pack(checkpoint, plan_for(checkpoint.spec, layout, place), packs[-1])
    quantised, plain = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in packs
    )
    assert len(quantised) > 3
    assert quantised == plain
