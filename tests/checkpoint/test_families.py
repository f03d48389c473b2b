"""What a config leaves out, and what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import transformers

from moepack import families
from moepack.errors import (
    CheckpointError,
    DamagedCheckpointError,
    LeftoverTensorError,
    MissingTensorError,
    NotMixtureOfExpertsError,
    TensorMismatchError,
    UnknownArchitectureError,
    UnsupportedEncodingError,
    UnsupportedModelError,
)
from moepack.families.config import Config
from moepack.source_headers import TensorHeader
from tests.conftest import TinyFolder

Headers = dict[str, TensorHeader]
Model = tuple[dict[str, Any], Headers]
Load = Callable[..., Model]


@pytest.fixture
def load(tiny_folder: TinyFolder) -> Load:
    """Config and headers of a tiny model, to be broken."""

    def load(family: str, variant: str = "plain") -> Model:
        from moepack.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(tiny_folder(family, variant))
        return copy.deepcopy(dict(checkpoint.config)), dict(checkpoint.headers)

    return load


def refused(model: Model, error: type[CheckpointError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        families.read_spec(*model, "the-model")
    assert caught.type is error
    assert "the-model" in str(caught.value)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_transformers(family: families.Family) -> None:
    model_class = getattr(transformers, family.architectures[0])
    config = model_class.config_class()
    if config.num_experts_per_tok is None:
        config.num_experts_per_tok = 6
    said: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    if family.name == "glm4_moe":
        said["head_dim"] = 128  # half of its default of 42 would be odd
    silent = {key: said.get(key) for key in ("num_experts_per_tok", "head_dim") if said.get(key)}
    # What transformers keeps elsewhere, or not at all; the values are overridden or neutral.
    elsewhere = {"rope_theta": 1.0, "partial_rotary_factor": 1.0, "moe_layer_freq": 1}

    assert family.outline(Config(silent, family.defaults)) == family.outline(
        Config(said, elsewhere)
    )
    for key in ("vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps"):
        assert family.defaults[key] == said[key]
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
        assert family.defaults.get(key) == said[key]


def test_a_dense_model_is_no_mixture_of_experts() -> None:
    refused(
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, {}),
        NotMixtureOfExpertsError,
        "LlamaForCausalLM",
    )


def test_no_experts_is_no_mixture_of_experts(load: Load) -> None:
    config, headers = load("qwen2_moe")
    refused(({**config, "num_experts": 0}, headers), NotMixtureOfExpertsError, "0 experts")
    only_dense = {**config, "mlp_only_layers": [0, 1, 2]}
    refused((only_dense, headers), NotMixtureOfExpertsError, "every layer dense")


def test_an_unknown_architecture_is_told_the_known_ones() -> None:
    config = {"architectures": ["JetMoeForCausalLM"], "num_local_experts": 8}
    refused((config, {}), UnknownArchitectureError, "JetMoeForCausalLM.*Qwen3MoeForCausalLM")


def test_experts_of_a_nested_config_are_seen() -> None:
    config = {"architectures": ["SeesAndTalks"], "text_config": {"n_routed_experts": 64}}
    refused((config, {}), UnknownArchitectureError, "SeesAndTalks")


def test_a_config_without_architectures_is_known_by_its_type(load: Load) -> None:
    config, headers = load("olmoe")
    del config["architectures"]
    assert families.read_spec(config, headers, "m").family == "olmoe"


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("mixtral", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("mixtral", {"attention_bias": True}, "attention_bias"),
        ("mixtral", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type"),
        ("mixtral", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope"),
        ("mixtral", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mixtral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("mixtral", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("olmoe", {"sliding_window": 8}, "sliding_window"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
        ("qwen2_moe", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("phimoe", {"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ("phimoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act"),
        ("glm4_moe", {"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_is_not_implemented_is_refused(
    load: Load, family: str, change: dict[str, Any], match: str
) -> None:
    config, headers = load(family, "window" if family == "phimoe" else "plain")
    refused(({**config, **change}, headers), UnsupportedModelError, match)


@pytest.mark.parametrize(
    "change", [{"norm_topk_prob": True}, {"mlp_bias": True}, {"scoring_func": "sigmoid"}]
)
def test_deepseek_v2_refuses_what_it_would_have_to_ignore(
    load: Load, change: dict[str, Any]
) -> None:
    config, headers = load("deepseek_v2", "greedy")
    refused(({**config, **change}, headers), UnsupportedModelError, next(iter(change)))


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("mixtral", {"num_hidden_layers": "three"}, "num_hidden_layers = 'three'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("mixtral", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("mixtral", {"num_local_experts": 10**6}, "num_local_experts"),
        ("mixtral", {"num_experts": 5}, "num_local_experts = 8, num_experts = 5"),
        ("mixtral", {"num_experts_per_tok": 9}, "at most the 8"),
        ("mixtral", {"num_key_value_heads": 3}, "a multiple"),
        ("mixtral", {"rms_norm_eps": "small"}, "rms_norm_eps"),
        ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("mixtral", {"eos_token_id": [1.5]}, "eos_token_id"),
        ("mixtral", {"rope_parameters": [1]}, "rope_parameters"),
        ("mixtral", {"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("mixtral", {"head_dim": 7}, "even"),
        ("deepseek_v3", {"n_group": 3}, "equal groups"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "at least 2"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 1}, "room for the 3"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "one a layer"),
    ],
)
def test_a_config_that_breaks_its_own_rules_is_damaged(
    load: Load, family: str, change: dict[str, Any], match: str
) -> None:
    config, headers = load(family)
    refused(({**config, **change}, headers), DamagedCheckpointError, match)


def test_longrope_needs_a_factor_for_each_pair(load: Load) -> None:
    config, headers = load("phimoe", "longrope")
    config["rope_parameters"]["long_factor"].pop()
    refused((config, headers), DamagedCheckpointError, "7 factors of longrope")


@pytest.mark.parametrize(
    ("name", "dtype", "match"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "F8_E4M3", "F8_E4M3"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8", "MXFP4"),
        ("model.norm.weight", "F64", "F64"),
        ("model.norm.weight", "I64", "I64"),
    ],
)
def test_dtypes_that_are_not_read_are_refused(
    load: Load, name: str, dtype: str, match: str
) -> None:
    config, headers = load("mixtral")
    headers[name] = TensorHeader(dtype, (1,), "f", 0, 1)
    refused((config, headers), UnsupportedEncodingError, f"{name}.*{match}")


def test_experts_of_two_dtypes_are_refused(load: Load) -> None:
    config, headers = load("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    headers[name] = TensorHeader("F16", headers[name].shape, "f", 0, 0)
    refused((config, headers), UnsupportedEncodingError, f"{name} is F16")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.embed_tokens.weight"),
        ("mixtral", "lm_head.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.7.w2.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias"),
        ("gpt_oss", "model.layers.3.self_attn.sinks"),
    ],
)
def test_a_missing_tensor_is_named(load: Load, family: str, name: str) -> None:
    config, headers = load(family)
    del headers[name]
    refused((config, headers), MissingTensorError, name)


def test_a_layer_without_any_experts_is_missing_them(load: Load) -> None:
    config, headers = load("qwen3_moe")
    headers = {name: h for name, h in headers.items() if "layers.1.mlp.experts" not in name}
    refused((config, headers), MissingTensorError, "layers.1.mlp.experts")


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.self_attn.q_proj.weight", "extra", "model.layers.0.self_attn.q_proj.bias"],
)
def test_a_tensor_that_nothing_uses_is_named(load: Load, name: str) -> None:
    config, headers = load("mixtral")
    headers[name] = headers["model.norm.weight"]
    headers["zzz"] = headers["model.norm.weight"]
    refused((config, headers), LeftoverTensorError, f"{name} and 1 more")


def test_buffers_of_old_exports_and_tied_heads_are_not_needed(load: Load) -> None:
    config, headers = load("mixtral", "window-llama3-tied")
    names = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    for name in names:
        headers[name] = TensorHeader("F32", (256, 64), "f", 0, 0)
    assert families.read_spec(config, headers, "m").unused == names


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"],
)
def test_a_wrong_shape_is_named(load: Load, name: str) -> None:
    config, headers = load("mixtral")
    headers[name] = TensorHeader("F32", (3, 5), "f", 0, 60)
    refused((config, headers), TensorMismatchError, rf"{name} has shape \[3, 5\]")
