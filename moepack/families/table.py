"""The table of families: one row per architecture.

``defaults`` are what transformers' configuration class of the architecture assumes for a key that
a ``config.json`` leaves out; ``outline`` is how its config describes the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moepack.families import outlines
from moepack.families.config import Config
from moepack.families.outlines import Outline


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes
    ----------
    name : str
        As transformers' ``model_type`` spells it.
    architectures : tuple of str
        What ``config["architectures"]`` calls it.
    defaults : mapping
        Values of the keys that a config leaves out.
    outline : callable
        The layers of a config.
    extra_layers : bool
        Layers beyond the last one are for multi-token prediction: known, and not needed.
    interleaved_experts : bool
        Fused experts are stored [E, in, out] with gate and up in alternate columns (GPT-OSS).
    """

    name: str
    architectures: tuple[str, ...]
    defaults: Mapping[str, Any]
    outline: Callable[[Config], Outline]
    extra_layers: bool = False
    interleaved_experts: bool = False


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        {
            **_COMMON,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "vocab_size": 32000,
        },
        outlines.mixtral,
    ),
    Family(
        "qwen2_moe",
        ("Qwen2MoeForCausalLM",),
        {
            **_COMMON,
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        outlines.qwen2_moe,
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        {
            **_COMMON,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 32768,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        outlines.qwen3_moe,
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        {
            **_COMMON,
            "attention_bias": False,
            "eos_token_id": 50279,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": 50304,
        },
        outlines.olmoe,
    ),
    Family(
        "deepseek_v2",
        ("DeepseekV2ForCausalLM",),
        {
            **_DEEPSEEK,
            "first_k_dense_replace": 0,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
        outlines.deepseek_v2,
    ),
    Family(
        "deepseek_v3",
        ("DeepseekV3ForCausalLM",),
        {
            **_DEEPSEEK,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "max_position_embeddings": 4096,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "rope_interleave": True,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
            "vocab_size": 129280,
        },
        outlines.deepseek_v3,
        extra_layers=True,
    ),
    Family(
        "phimoe",
        ("PhimoeForCausalLM", "PhiMoEForCausalLM"),
        {
            **_COMMON,
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "router_jitter_noise": 0.01,
            "vocab_size": 32064,
        },
        outlines.phimoe,
    ),
    Family(
        "gpt_oss",
        ("GptOssForCausalLM",),
        {
            **_COMMON,
            "attention_bias": True,
            "head_dim": 64,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 150_000.0,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
        outlines.gpt_oss,
        interleaved_experts=True,
    ),
    Family(
        "glm4_moe",
        ("Glm4MoeForCausalLM",),
        {
            **_COMMON,
            "attention_bias": False,
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
        outlines.glm4_moe,
        extra_layers=True,
    ),
)
