"""Synthetic checkpoints open in transformers and here, and route as they are meant to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from moepack_runtime.tokenizer import Tokenizer

from benchmarks import synthetic_check
from benchmarks.synthetic import SHAPES, main, shape_config
from benchmarks.synthetic_folder import write_checkpoint
from moepack.checkpoint import Checkpoint
from moepack.errors import DiskFullError, OutputInUseError, UnsupportedModelError
from moepack.layouts import uniform_layout
from moepack.presets import preset_path
from moepack.progress import NO_PROGRESS
from moepack.routing_figures import RoutedTexts
from moepack.routing_model import load_routing_model
from tests.support.engines import open_engine
from tests.support.plans import placement

OLMOE = load_routing_model(preset_path("olmoe-1b-7b", "routing"))
EXPERTS, TOP_K = 32, 4

Written = Callable[[str], Path]


def small(shape: str, **changes: Any) -> dict[str, Any]:
    """The config of a real model with everything smaller."""
    config = shape_config(shape, layers=4)
    experts = "num_local_experts" if shape.startswith("mixtral") else "num_experts"
    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "vocab_size": 4200,
        "num_experts_per_tok": TOP_K,
        experts: EXPERTS,
        "head_dim": 32,
    }
    return config | {key: value for key, value in sizes.items() if key in config} | changes


def test_layers_and_vocabulary_are_cut_and_nothing_else() -> None:
    whole, cut = shape_config("qwen1.5-moe-a2.7b"), shape_config("qwen1.5-moe-a2.7b", 3, 1, 19_000)
    assert whole | {"num_hidden_layers": 3, "vocab_size": 19_000} == cut


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folders: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in folders:
            folders[shape] = tmp_path_factory.mktemp("synthetic") / shape
            recipe = {"shape": shape}
            write_checkpoint(small(shape), OLMOE, folders[shape], dtype="F32", recipe=recipe)
        return folders[shape]

    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same(written: Written, shape: str) -> None:
    folder = written(shape)
    prompt = np.random.default_rng(0).integers(1, 4200, 40).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([prompt])).logits[0]
    checkpoint = Checkpoint.open(folder)
    layout = uniform_layout(checkpoint.spec, 1.0)
    place = placement(checkpoint.spec, layout, tops=2, bottoms=0, staging=2, context=48)
    with open_engine(checkpoint, layout, place) as engine:
        found = engine.forward(prompt, all_logits=True)
    assert 1 < expected.std() < 2
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_the_gate_of_a_shared_expert_is_near_one_half_and_never_exactly(written: Written) -> None:
    folder = written("qwen1.5-moe-a2.7b")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.shared_expert_gate.register_forward_hook(
            lambda _module, _inputs, found: logits.append(found)
        )
    with torch.inference_mode():
        model(torch.arange(1, 400)[None])
    spread = torch.stack(logits).std()
    assert 0.002 < spread < 0.04
    assert all(bool(found.count_nonzero() == found.numel()) for found in logits)


def test_the_tokenizer_covers_the_vocabulary(written: Written) -> None:
    folder = written("olmoe-1b-7b")
    mine, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.vocab_size == len(theirs) == 4200
    text = "In the beginning, 12 * x"
    assert mine.decode(mine.encode(text)) == text
    assert theirs(text)["input_ids"] == mine.encode(text)
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len({raw.id_to_token(token) for token in range(4200)}) == 4200
    assert mine.decode([4199]).strip().isalpha()


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(
            small("olmoe-1b-7b"), OLMOE, tmp_path / name, seed=seed, shard_bytes=1 << 20
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    for name in names:
        first, second, third = ((tmp_path / run / name).read_bytes() for run in "abc")
        assert first == second
        assert (first == third) == (
            ("safetensors" not in name and name != "synthetic.json") or "index" in name
        )


def test_routing_follows_the_model(tmp_path: Path) -> None:
    """Popularity, locality and how well the next layer is predicted, each where it should be."""
    folder = tmp_path / "model"
    write_checkpoint(small("olmoe-1b-7b", hidden_size=256, num_attention_heads=8), OLMOE, folder)
    even = dataclasses.replace(
        OLMOE, depths=(0.0,), popularity=(0.0,), text=(0.0,), context=(0.0,), recall=0.5
    )
    write_checkpoint(small("olmoe-1b-7b", hidden_size=256), even, tmp_path / "even")
    run, blind = (
        synthetic_check.run_checkpoint(
            Checkpoint.open(path), [160] * 4, draws=1, generate=False, progress=NO_PROGRESS
        )["random tokens"]
        for path in (folder, tmp_path / "even")
    )
    chance = TOP_K / EXPERTS
    routed, evenly = RoutedTexts(run.texts, EXPERTS), RoutedTexts(blind.texts, EXPERTS)
    assert routed.usage_entropy().max() < evenly.usage_entropy().min()
    next_token, later = routed.overlap([1]), routed.overlap(range(32, 64))
    assert (next_token > later).all()
    assert (later > routed.other_texts()).all(), "a text has experts of its own"
    assert later.min() > 1.2 * chance
    np.testing.assert_allclose(evenly.overlap([1])[1:], chance, atol=0.08)
    assert run.recall is not None
    assert blind.recall is not None
    np.testing.assert_allclose(run.recall[0][2:], OLMOE.recall, atol=0.06)
    np.testing.assert_allclose(blind.recall[0][2:], 0.5, atol=0.08)
    assert (run.recall[1] > run.recall[0]).all()


def test_a_check_prints_its_figures_as_json(
    written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", str(written("olmoe-1b-7b")), "--draws", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["figures"].keys() == {"preset", "random tokens", "drawn tokens", "shipped texts"}
    drawn = found["figures"]["drawn tokens"]
    assert drawn["lru 25 %"] < drawn["lru 50 %"] < drawn["belady 50 %"]


def test_what_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match="family deepseek_v3"):
        write_checkpoint({"model_type": "deepseek_v3"}, OLMOE, out)
    with pytest.raises(UnsupportedModelError, match="2 key heads"):
        write_checkpoint(small("qwen3-30b-a3b", num_key_value_heads=2), OLMOE, out)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError, match=r"1\.00 MiB are free"):
            write_checkpoint(small("olmoe-1b-7b"), OLMOE, out)
    out.mkdir()
    with pytest.raises(OutputInUseError):
        write_checkpoint(small("olmoe-1b-7b"), OLMOE, out)
    assert list(tmp_path.iterdir()) == [out]
