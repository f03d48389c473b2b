"""Specs and tensors against the transformers library: its modules say what a model is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moepack import segments
from moepack.checkpoint import Checkpoint
from tests.conftest import TinyFolder
from tests.support.safetensors_files import read_file, write_file
from tests.support.tiny_models import TINY_MODELS, TinyModel, build_tiny

every_model = pytest.mark.parametrize("tiny", TINY_MODELS, ids=lambda tiny: tiny.key)

#: What transformers calls the modules of a layer in memory.
MODULES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.q_a": "self_attn.q_a_proj",
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b": "self_attn.q_b_proj",
    "attn.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b": "self_attn.kv_b_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}


@cache
def oracle(family: str, variant: str) -> Any:
    return build_tiny(family, variant)


def oracle_of(tiny: TinyModel) -> Any:
    return oracle(tiny.family, tiny.variant)


def oracle_name(family: str, canonical: str) -> str:
    """The state dict's name of a trunk tensor."""
    if not canonical.startswith("layers."):
        top = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
        module, leaf = canonical.split(".")
        return f"{top[module]}.{leaf}"
    _, layer, inner = canonical.split(".", 2)
    module, leaf = inner.rsplit(".", 1)
    if module == "router":
        name = "mlp.router" if family in {"gpt_oss", "phimoe"} else "mlp.gate"
        leaf = {"correction_bias": "e_score_correction_bias"}.get(leaf, leaf)
    elif module.startswith("shared."):
        shared = "mlp.shared_expert" if family == "qwen2_moe" else "mlp.shared_experts"
        name = f"{shared}.{module.removeprefix('shared.')}_proj"
    else:
        name = MODULES[module]
    return f"model.layers.{layer}.{name}.{leaf}"


def oracle_expert(model: Any, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """One expert out of transformers' fused parameters, in the canonical orientation."""
    experts = model.model.layers[layer].mlp.experts
    both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS: x @ W, alternating columns
        bias = experts.gate_up_proj_bias[expert]
        return {
            "gate.weight": both[:, ::2].T,
            "up.weight": both[:, 1::2].T,
            "down.weight": down.T,
            "gate.bias": bias[::2],
            "up.bias": bias[1::2],
            "down.bias": experts.down_proj_bias[expert],
        }
    gate, up = both.chunk(2)
    return {"gate.weight": gate, "up.weight": up, "down.weight": down}


@every_model
def test_every_trunk_tensor_is_the_one_of_transformers(
    tiny: TinyModel, tiny_folder: TinyFolder
) -> None:
    checkpoint = Checkpoint.open(tiny_folder(tiny.family, tiny.variant))
    state = oracle_of(tiny).state_dict()
    seen = set()
    for info in checkpoint.spec.trunk:
        name = oracle_name(tiny.family, info.name)
        seen.add(name)
        tensor = checkpoint.trunk_tensor(info.name)
        assert tensor.shape == info.shape
        np.testing.assert_array_equal(tensor, state[name].numpy(), err_msg=info.name)
    rest = {name for name in state if ".mlp.experts." not in name} - seen
    assert rest <= ({"lm_head.weight"} if checkpoint.spec.tied_embeddings else set())


@every_model
def test_every_expert_is_the_one_of_transformers(tiny: TinyModel, tiny_folder: TinyFolder) -> None:
    checkpoint = Checkpoint.open(tiny_folder(tiny.family, tiny.variant))
    for layer in checkpoint.spec.moe_layers:
        for expert in range(checkpoint.spec.moe(layer).num_experts):
            tensors = checkpoint.expert(layer, expert)
            wanted = oracle_expert(oracle_of(tiny), layer, expert)
            assert list(tensors) == [name for name in segments.EXPERT_TENSORS if name in wanted]
            for name, tensor in tensors.items():
                assert tensor.flags.c_contiguous
                np.testing.assert_array_equal(tensor, wanted[name].detach().numpy())


@every_model
def test_the_spec_says_what_the_modules_do(tiny: TinyModel, tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder(tiny.family, tiny.variant)).spec
    model = oracle_of(tiny)
    assert spec.family == tiny.family
    assert spec.architecture == type(model).__name__
    assert spec.dtype == "F32"
    assert spec.head_bias == (model.lm_head.bias is not None)
    assert spec.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert (spec.vocab_size, spec.hidden_size) == tuple(model.model.embed_tokens.weight.shape)
    assert spec.context_length == model.config.max_position_embeddings
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert len(spec.layers) == len(model.model.layers)
    assert spec.norm == ("layer" if isinstance(model.model.norm, torch.nn.LayerNorm) else "rms")
    assert spec.norm_eps == epsilon(model.model.norm)
    numel = sum(t.numel() for n, t in model.state_dict().items() if n != "lm_head.weight")
    numel += 0 if spec.tied_embeddings else model.lm_head.weight.numel()
    assert spec.total_parameters == numel
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        assert (layer.moe is not None) == hasattr(module.mlp, "experts")


def epsilon(norm: Any) -> float:
    return float(norm.eps if isinstance(norm, torch.nn.LayerNorm) else norm.variance_epsilon)


@every_model
def test_attention_is_that_of_the_modules(tiny: TinyModel, tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder(tiny.family, tiny.variant)).spec
    model = oracle_of(tiny)
    rotary = model.model.rotary_emb
    for i, layer in enumerate(spec.layers):
        kind, module = layer.attention, model.model.layers[i].self_attn
        assert kind.scale == pytest.approx(module.scaling, rel=1e-12)
        assert kind.rotary_dim == 2 * rotary.inv_freq.numel()
        assert kind.num_heads // kind.num_kv_heads == module.num_key_value_groups
        assert kind.window == oracle_window(tiny.family, model.config, i)
        assert kind.clip == getattr(model.config, "clip_qkv", None)
        norm = getattr(module, "q_norm", None)
        widths = {"none": None, "head": kind.head_dim, "full": kind.head_dim * kind.num_heads}
        assert widths[kind.qk_norm] == (None if norm is None else norm.weight.numel())
        assert norm is None or epsilon(norm) == spec.norm_eps
        if kind.mla is not None:
            assert kind.head_dim == module.qk_head_dim
            assert kind.value_dim == module.v_head_dim
        else:
            assert kind.head_dim == kind.value_dim == module.head_dim
    assert spec.rope.interleaved == oracle_interleaved(tiny.family, model.config)
    assert spec.rope.kind == rotary.rope_type
    if spec.rope.attention_factor is not None:
        assert spec.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


def oracle_window(family: str, config: Any, layer: int) -> int | None:
    """The window that the family's masks give a layer (see its ``create_*_mask`` call)."""
    if family in {"qwen2_moe", "gpt_oss"}:
        sliding = config.layer_types[layer] == "sliding_attention"
        return int(config.sliding_window) if sliding else None
    if family in {"mixtral", "qwen3_moe", "phimoe"}:
        return None if config.sliding_window is None else int(config.sliding_window)
    return None


def oracle_interleaved(family: str, config: Any) -> bool:
    return family == "deepseek_v2" or bool(getattr(config, "rope_interleave", False))


@every_model
def test_routing_is_that_of_the_modules(tiny: TinyModel, tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder(tiny.family, tiny.variant)).spec
    model = oracle_of(tiny)
    for layer in spec.moe_layers:
        moe, block = spec.moe(layer), model.model.layers[layer].mlp
        gate = block.router if hasattr(block, "router") else block.gate
        assert (moe.num_experts, moe.top_k) == (gate.num_experts, gate.top_k)
        always = tiny.family == "mixtral"
        assert moe.router.normalise == getattr(gate, "norm_topk_prob", always)
        assert moe.router.scaling == getattr(gate, "routed_scaling_factor", 1.0)
        assert moe.router.bias == (getattr(gate, "bias", None) is not None)
        assert moe.router.correction_bias == hasattr(gate, "e_score_correction_bias")
        assert moe.router.jitter == getattr(gate, "router_jitter_noise", 0.0)
        groups = getattr(gate, "num_group", None) or 1, getattr(gate, "topk_group", None) or 1
        assert (moe.router.num_groups, moe.router.top_groups) == groups
        shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
        width = 0 if shared is None else shared.up_proj.weight.shape[0]
        assert moe.shared_intermediate_size == width
        assert moe.shared_gate == hasattr(block, "shared_expert_gate")
        assert moe.expert_bias == hasattr(block.experts, "gate_up_proj_bias")
        if moe.activation == "clamped_swiglu":
            limits = block.experts.alpha, block.experts.limit
            assert (moe.activation_alpha, moe.activation_limit) == limits


@every_model
def test_experts_can_be_cut_in_at_least_four_places(
    tiny: TinyModel, tiny_folder: TinyFolder
) -> None:
    spec = Checkpoint.open(tiny_folder(tiny.family, tiny.variant)).spec
    for layer in spec.moe_layers:
        cuts = segments.cuts(spec.moe(layer), spec.hidden_size, spec.dtype)
        assert len(cuts) - 2 >= segments.MIN_INTERIOR_CUTS


FUSED = [tiny for tiny in TINY_MODELS if tiny.family != "gpt_oss"]


@pytest.mark.parametrize("stacked", [False, True], ids=["fused", "stacked"])
@pytest.mark.parametrize("tiny", FUSED, ids=lambda tiny: tiny.key)
def test_layouts_of_experts_give_the_same_bits(
    tiny: TinyModel, stacked: bool, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    separate = Checkpoint.open(tiny_folder(tiny.family, tiny.variant))
    other = Checkpoint.open(in_memory_layout(tiny, tiny_folder, tmp_path, stacked=stacked))
    assert other.spec.digest == separate.spec.digest
    for layer in separate.spec.moe_layers:
        for expert in range(separate.spec.moe(layer).num_experts):
            wanted = separate.expert(layer, expert)
            for name, tensor in other.expert(layer, expert).items():
                np.testing.assert_array_equal(tensor, wanted[name])
    for info in separate.spec.trunk:
        np.testing.assert_array_equal(
            other.trunk_tensor(info.name), separate.trunk_tensor(info.name)
        )


def in_memory_layout(
    tiny: TinyModel, tiny_folder: TinyFolder, folder: Path, *, stacked: bool
) -> Path:
    """The state dict as it is in memory, its fused experts split by projection if asked."""
    tensors = {}
    for name, tensor in oracle_of(tiny).state_dict().items():
        if name == "lm_head.weight" and oracle_of(tiny).config.tie_word_embeddings:
            continue
        if stacked and name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            tensors[name.replace("gate_up_proj", "gate_proj")] = gate.numpy()
            tensors[name.replace("gate_up_proj", "up_proj")] = up.numpy()
        else:
            tensors[name] = tensor.numpy()
    write_file(folder / "model.safetensors", tensors)
    config = (tiny_folder(tiny.family, tiny.variant) / "config.json").read_text()
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("dtype", [np.float16, np.uint16], ids=["F16", "BF16"])
def test_narrow_dtypes_come_as_they_are_stored(
    dtype: Any, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    source = tiny_folder("mixtral", "plain")
    tensors: dict[str, Any] = {
        name: tensor.astype(np.float16).view(dtype)
        for name, tensor in read_file(source / "model.safetensors").items()
    }
    norm = np.linspace(0, 1, 64, dtype=np.float32)
    tensors["model.norm.weight"] = norm  # one of another dtype
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.spec.dtype == {np.float16: "F16", np.uint16: "BF16"}[dtype]
    by_name = {info.name: info.dtype for info in checkpoint.spec.trunk}
    assert by_name.pop("norm.weight") == "F32"
    assert set(by_name.values()) == {checkpoint.spec.dtype}
    assert checkpoint.trunk_tensor("norm.weight").dtype == np.float32
    expert = checkpoint.expert(1, 3)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert expert["down.weight"].dtype == dtype
    np.testing.assert_array_equal(expert["down.weight"], tensors[name])


def test_old_and_new_spellings_of_rope_are_one(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = tiny_folder("deepseek_v3", "plain")
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")

    assert Checkpoint.open(tmp_path).spec.digest == Checkpoint.open(source).spec.digest
