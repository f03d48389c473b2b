"""An evaluation takes the memory of the plan: neither model is there whole, nor a text's logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moepack.budget import slow_bytes
from moepack.checkpoint import Checkpoint
from moepack.layouts import uniform_layout
from moepack.pack import pack
from moepack.units import MIB
from tests.support.packs import plan_for
from tests.support.plans import placement
from tests.support.tiny_models import byte_tokenizer

CHILD = Path(__file__).with_name("memory_run.py")
ROOT = Path(__file__).resolve().parents[2]

VOCAB, TOKENS = 32_768, 3000

#: What is not the model's: kernels that torch makes for new shapes, the allocator's slack.
SLACK_BYTES = 64 * MIB


@pytest.mark.slow
def test_neither_a_model_nor_a_text_is_in_memory_whole(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=512,
        num_experts=96,
        num_experts_per_tok=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    del model
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    checkpoint = Checkpoint.open(tmp_path / "model")
    spec = checkpoint.spec
    layout = uniform_layout(spec, 1.0)
    place = placement(spec, layout, tops=4, bottoms=0, staging=8, context=1024)
    pack(checkpoint, plan_for(spec, layout, place), tmp_path / "pack")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + 7 * n * n % 90) for n in range(TOKENS)))

    planned_bytes = place.memory.total_bytes
    allowed_bytes = planned_bytes + SLACK_BYTES
    assert slow_bytes(spec, layout) > 2 * allowed_bytes
    logits_bytes = TOKENS * VOCAB * 4
    assert logits_bytes > 2 * allowed_bytes

    folders = [str(tmp_path / name) for name in ("pack", "model", "text.txt")]
    done = subprocess.run(
        [sys.executable, str(CHILD), *folders, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["tokens"] == TOKENS - 1
    assert measured["kl"] == 0
    assert measured["peak_bytes"] - measured["base_bytes"] <= allowed_bytes
