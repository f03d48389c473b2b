"""Engines whose trunk is in 8 bits: transformers' numbers with it, the same bits everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.store import PackStore

from moepack.budget import trunk_bytes
from moepack.checkpoint import Checkpoint
from moepack.errors import CapabilityError, NonFiniteWeightError, UnknownEncodingError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.segments import Bits
from moepack.trunk import rounded_matrices
from tests.conftest import TinyFolder
from tests.decoder.reference import Runner, load
from tests.decoder.test_token_step import StepByStep
from tests.support.conditions import any_placement, disturbed
from tests.support.engines import all_logits, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.tiny_models import byte_tokenizer, randomise

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
FOLLOWING = [17, 99, 4, 250]
CONTEXT = 96


def rounded_layout(
    spec: ModelSpec, ratios: tuple[float, ...] = (1.0,), names: tuple[str | None, ...] = (None,)
) -> Layout:
    return dataclasses.replace(mixed_layout(spec, ratios, encodings=names), trunk="INT8")


def packed(checkpoint: Checkpoint, layout: Layout, out: Path) -> Path:
    place = placement(checkpoint.spec, layout, tops=9, bottoms=9, staging=1, context=CONTEXT)
    pack(checkpoint, plan_for(checkpoint.spec, layout, place), out)
    return out


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """The matrices of a pack's trunk that are codes, read by the safetensors library."""
    found = safetensors.torch.load_file(folder / "trunk.safetensors")
    return {
        name: tensor.float() * found[name.replace(".weight", ".scale")].float()[:, None]
        for name, tensor in found.items()
        if tensor.dtype is torch.int8
    }


def by_transformers(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> Any:
    """Logits of the prompt and what follows, with some weights of the model replaced."""
    assert checkpoint.folder is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32
    ).eval()
    state = model.state_dict()
    for name, weight in weights.items():
        source = checkpoint._sources.trunk[name]
        assert state[source].shape == weight.shape
        state[source].copy_(weight)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT + FOLLOWING])).logits[0]


@pytest.mark.parametrize(
    ("family", "variant", "rounded"),
    [
        ("mixtral", "window-llama3-tied", {"embed", "attn.q", "attn.o"}),
        ("qwen2_moe", "plain", {"embed", "head", "attn.q", "attn.o", "mlp.gate", "shared.down"}),
        ("qwen3_moe", "plain", {"embed", "head", "attn.q", "attn.k", "attn.v", "attn.o"}),
        ("deepseek_v3", "plain", {"embed", "head", "attn.o", "shared.up"}),
        ("phimoe", "longrope", {"embed", "head", "attn.q", "attn.o"}),
        ("gpt_oss", "plain", {"embed", "head", "attn.q", "attn.o"}),
    ],
)
def test_an_engine_computes_what_transformers_does_with_the_dequantised_trunk(
    tiny_folder: TinyFolder, tmp_path: Path, family: str, variant: str, rounded: set[str]
) -> None:
    """From a pack and from the checkpoint: to the same bits."""
    checkpoint = Checkpoint.open(tiny_folder(family, variant))
    spec = checkpoint.spec
    layout = rounded_layout(spec, (0.3, 1.0, 0.0))
    folder = packed(checkpoint, layout, tmp_path / "pack")
    weights = dequantised(folder)
    kinds = {name.split(".", 2)[-1] if "layers" in name else name for name in weights}
    assert {kind.removesuffix(".weight") for kind in kinds} >= rounded
    assert not any("router" in name or "norm" in name or "kv_b" in name for name in weights)
    assert ("head.weight" in weights) != spec.tied_embeddings
    expected = by_transformers(checkpoint, weights)
    exact = by_transformers(checkpoint, {})
    place = placement(spec, layout, tops=2, bottoms=1, staging=2, context=CONTEXT)
    found = []
    for store in (None, PackStore.open(folder)):
        with open_engine(checkpoint, layout, place, store=store) as engine:
            found.append(all_logits(engine, PROMPT, FOLLOWING))
    assert torch.equal(*found), "a pack holds what is rounded on the fly"
    torch.testing.assert_close(found[0], expected, atol=2e-4, rtol=0)
    assert (found[0] - exact).abs().max() > 2e-3, "nothing was rounded"


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Qwen2-MoE of a hidden size that torch's kernel takes, with tensors worth rounding."""
    folder = tmp_path_factory.mktemp("tiny") / "bf16"
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=144,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed=1)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return Checkpoint.open(folder)


def test_models_in_bfloat16_are_as_near_as_their_dtype_lets_them(
    in_bf16: Checkpoint, tmp_path: Path
) -> None:
    """By the kernel for few tokens and by dequantising for many."""
    spec = in_bf16.spec
    matrices = {info.name for info in rounded_matrices(spec, "INT8")}
    assert matrices >= {"layers.0.mlp.gate.weight", "layers.1.shared.down.weight"}
    layout = rounded_layout(spec)
    expected = by_transformers(in_bf16, dequantised(packed(in_bf16, layout, tmp_path / "pack")))
    exact = mixed_layout(spec, (1.0,))
    usual = logits(in_bf16, exact) - by_transformers(in_bf16, {})
    found = logits(in_bf16, layout) - expected
    assert found.abs().mean() <= 1.5 * usual.abs().mean()


def logits(checkpoint: Checkpoint, layout: Layout, *, slots: int = 99) -> torch.Tensor:
    place = placement(
        checkpoint.spec, layout, tops=slots, bottoms=slots, staging=1, context=CONTEXT
    )
    with open_engine(checkpoint, layout, place) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


@pytest.mark.parametrize("names", [(None,), ("INT8",)])
def test_the_bits_do_not_depend_on_placement_or_order_of_arrival(
    in_bf16: Checkpoint, tmp_path: Path, names: tuple[str | None, ...]
) -> None:
    layout = rounded_layout(in_bf16.spec, (0.5,), names)
    folder = packed(in_bf16, layout, tmp_path / "pack")
    expected = logits(in_bf16, layout)
    random = Random(3)
    for trial in range(4):
        place = any_placement(in_bf16, layout, random, pooled=False)
        with disturbed(in_bf16, layout, place, folder, random) as engine:
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected), (trial, place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_bits_of_a_device_do_not_depend_on_placement(in_bf16: Checkpoint) -> None:
    layout = rounded_layout(in_bf16.spec, (0.5,))
    found = []
    for slots, staging in ((99, 1), (0, 1), (2, 3)):
        place = placement(
            in_bf16.spec,
            layout,
            tops=slots,
            bottoms=slots,
            staging=staging,
            context=CONTEXT,
            device="cuda",
        )
        with open_engine(in_bf16, layout, place) as engine:
            found.append(all_logits(engine, PROMPT, FOLLOWING))
            assert engine.stats().peak_fast_bytes <= place.memory.total_bytes
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    usual = logits(in_bf16, mixed_layout(in_bf16.spec, (1.0,))) - by_transformers(in_bf16, {})
    difference = found[0].cpu() - logits(in_bf16, layout)
    assert difference.abs().mean() <= 3 * usual.abs().mean()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@torch.inference_mode()
def test_a_recorded_step_is_what_the_decoder_gives(tiny_folder: TinyFolder, family: str) -> None:
    """What a device records and replays, launched on the processor one token after the other."""
    folder = tiny_folder(family, "plain")
    checkpoint = Checkpoint.open(folder)
    layout = rounded_layout(checkpoint.spec)
    trunk = CheckpointStore(checkpoint, checkpoint.spec, layout).load_trunk()
    weights = load(folder)._replace(trunk=trunk)
    ordinary, stepping = Runner(weights, context_tokens=48), StepByStep(weights)
    for tokens in (PROMPT[:10], *([token] for token in PROMPT[10:15])):
        found, expected = stepping.run(tokens), ordinary.run(tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert stepping.steps == 5 * len(checkpoint.spec.layers)


def test_the_trunk_takes_what_is_planned_and_no_more(in_bf16: Checkpoint) -> None:
    """One block: codes and scales are views of it, and nothing is dequantised into it."""
    spec = in_bf16.spec
    layout = rounded_layout(spec)
    exact_bytes, planned_bytes = trunk_bytes(spec), trunk_bytes(spec, "INT8")
    assert planned_bytes < 0.6 * exact_bytes
    place = placement(spec, layout, tops=1, bottoms=0, staging=1, context=CONTEXT)
    exact = placement(
        spec, mixed_layout(spec, (1.0,)), tops=1, bottoms=0, staging=1, context=CONTEXT
    )
    assert place.memory.trunk_bytes == planned_bytes
    assert place.memory.workspace_bytes > exact.memory.workspace_bytes
    loaded = CheckpointStore(in_bf16, spec, layout).load_trunk()
    assert {tensor.untyped_storage().nbytes() for tensor in loaded.values()} == {planned_bytes}
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


class Changed:
    """A checkpoint of which one matrix of the trunk holds another weight."""

    def __init__(self, checkpoint: Checkpoint, value: float) -> None:
        self.checkpoint = checkpoint
        self.value = value

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        return self.checkpoint.expert(layer, expert)

    def trunk_tensor(self, name: str) -> Bits:
        bits = self.checkpoint.trunk_tensor(name)
        if name == "layers.1.attn.o.weight":
            bits = np.array(bits)
            bits.view(np.float32)[3] = self.value
        return bits


def test_weights_that_are_no_numbers_are_named(tiny_folder: TinyFolder) -> None:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    source = Changed(checkpoint, float("nan"))
    with pytest.raises(NonFiniteWeightError, match=r"layers\.1\.attn\.o\.weight: nan in row 3"):
        CheckpointStore(source, spec, rounded_layout(spec)).load_trunk()


def test_rows_of_zeros_stay_zeros(tiny_folder: TinyFolder) -> None:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    source = Changed(checkpoint, 0.0)
    loaded = CheckpointStore(source, spec, rounded_layout(spec)).load_trunk()
    assert not loaded["layers.1.attn.o.weight"][3].any()
    assert loaded["layers.1.attn.o.scale"][3] == 0
    assert loaded["layers.1.attn.o.scale"][4] != 0


def test_an_encoding_that_there_is_not_is_named(tiny_folder: TinyFolder) -> None:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    layout = dataclasses.replace(mixed_layout(spec, (1.0,)), trunk="INT3")
    with pytest.raises(
        UnknownEncodingError, match="a trunk in int3, expected one in exact or int8"
    ):
        CheckpointStore(checkpoint, spec, layout)
    plain = mixed_layout(spec, (1.0,))
    place = placement(spec, plain, tops=1, bottoms=0, staging=1, context=CONTEXT)
    with pytest.raises(CapabilityError, match="holds the trunk in int3"):
        open_engine(checkpoint, layout, place, store=CheckpointStore(checkpoint, spec, plain))
