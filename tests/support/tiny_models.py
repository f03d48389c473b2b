"""Small random checkpoints of every family, made by transformers: the oracle's own models.

Every feature of an architecture is on in one of its variants, and nothing is accidentally an
identity: all parameters are drawn at random, norms and biases included. Weights are float32, so
that comparisons are sharp, and experts are wide enough to be cut in five places.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

transformers.logging.disable_progress_bar()

VOCAB_SIZE = 256
HIDDEN_SIZE = 64
#: 96 neurons leave five interior cuts at the smallest granularity.
EXPERT_WIDTH = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_DEEPSEEK_YARN = {**_YARN, "mscale": 0.8, "mscale_all_dim": 1.2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}


@dataclasses.dataclass(frozen=True, slots=True)
class TinyModel:
    """One variant of one family: a configuration class and what differs from its defaults."""

    family: str
    variant: str
    config_class: str
    changes: Mapping[str, Any]

    @property
    def key(self) -> str:
        return f"{self.family}-{self.variant}"

    def config(self) -> Any:
        """The transformers configuration."""
        # The configuration classes write into the nested objects they are given.
        changes = json.loads(json.dumps({**_COMMON, **self.changes}))
        return getattr(transformers, self.config_class)(**changes)


TINY_MODELS: tuple[TinyModel, ...] = (
    TinyModel(
        "mixtral",
        "plain",
        "MixtralConfig",
        {"intermediate_size": EXPERT_WIDTH, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    TinyModel(
        "mixtral",
        "window-llama3-tied",
        "MixtralConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "num_local_experts": 4,
            "head_dim": 24,
            "sliding_window": 9,
            "rope_parameters": _LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    TinyModel(
        "qwen2_moe",
        "plain",
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": EXPERT_WIDTH,
            "shared_expert_intermediate_size": 112,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "mlp_only_layers": [0],
        },
    ),
    TinyModel(
        "qwen2_moe",
        "window-yarn-normalised",
        "Qwen2MoeConfig",
        {
            "num_hidden_layers": 4,
            "moe_intermediate_size": EXPERT_WIDTH,
            "shared_expert_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 3,
            "rope_parameters": _YARN,
        },
    ),
    TinyModel(
        "qwen3_moe",
        "plain",
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": EXPERT_WIDTH,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-5,
        },
    ),
    TinyModel(
        "qwen3_moe",
        "bias-window-linear-tied",
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 4,
            "moe_intermediate_size": EXPERT_WIDTH,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 11,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
            "tie_word_embeddings": True,
        },
    ),
    TinyModel(
        "olmoe",
        "plain",
        "OlmoeConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 4,
        },
    ),
    TinyModel(
        "olmoe",
        "clip-bias-normalised",
        "OlmoeConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "clip_qkv": 0.9,
        },
    ),
    TinyModel(
        "deepseek_v2",
        "greedy",
        "DeepseekV2Config",
        {**_MLA, "q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": _DEEPSEEK_YARN},
    ),
    TinyModel(
        "deepseek_v2",
        "grouped",
        "DeepseekV2Config",
        {
            **_MLA,
            "q_lora_rank": 20,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "attention_bias": True,
            "rms_norm_eps": 1e-4,
        },
    ),
    TinyModel(
        "deepseek_v3",
        "plain",
        "DeepseekV3Config",
        {
            **_MLA,
            "q_lora_rank": 20,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _DEEPSEEK_YARN,
            "rms_norm_eps": 1e-4,
        },
    ),
    TinyModel(
        "deepseek_v3",
        "halves-ungrouped",
        "DeepseekV3Config",
        {
            **_MLA,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "attention_bias": True,
        },
    ),
    TinyModel(
        "phimoe",
        "longrope",
        "PhimoeConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.1,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0 + 0.05 * i for i in range(8)],
                "long_factor": [1.5 + 0.25 * i for i in range(8)],
                "short_mscale": 1.1,
                "long_mscale": 1.25,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    TinyModel(
        "phimoe",
        "window",
        "PhimoeConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "sliding_window": 10,
        },
    ),
    TinyModel(
        "gpt_oss",
        "plain",
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "intermediate_size": EXPERT_WIDTH,
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "sliding_window": 8,
            "swiglu_limit": 0.6,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    TinyModel(
        "gpt_oss",
        "unbiased-attention",
        "GptOssConfig",
        {
            "intermediate_size": EXPERT_WIDTH,
            "head_dim": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    TinyModel(
        "glm4_moe",
        "plain",
        "Glm4MoeConfig",
        {
            "moe_intermediate_size": EXPERT_WIDTH,
            "head_dim": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    TinyModel(
        "glm4_moe",
        "grouped",
        "Glm4MoeConfig",
        {
            "moe_intermediate_size": EXPERT_WIDTH,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "partial_rotary_factor": 0.25,
        },
    ),
)

TINY_KEYS = tuple(model.key for model in TINY_MODELS)


def tiny_model(family: str, variant: str, folder: Path) -> Path:
    """Save one of :data:`TINY_MODELS` as transformers does, with a tokenizer of bytes."""
    path = folder / f"{family}-{variant}"
    build_tiny(family, variant).save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, in the order of their stand-in characters."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: token for token, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def build_tiny(family: str, variant: str) -> Any:
    """One of :data:`TINY_MODELS` in memory, with the same weights every time."""
    wanted = f"{family}-{variant}"
    tiny = next(model for model in TINY_MODELS if model.key == wanted)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        tiny.config(), dtype=torch.float32, attn_implementation="eager"
    )
    randomise(model, seed=TINY_KEYS.index(wanted))
    return model.eval()


def randomise(model: Any, seed: int) -> None:
    """Draw every parameter and every saved buffer anew, so that none is an identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1.0 + 0.2 * noise)
        elif name.endswith(("bias", "sinks")) or "_bias" in name:
            tensor.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            # Fan-in scaling, a little larger: experts and positions must matter.
            tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
