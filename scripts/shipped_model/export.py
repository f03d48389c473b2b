"""From the training model to a Hugging Face folder and back, and the proof that they agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shipped_model.model import ModelConfig, MoEModel
from shipped_model.tokenizer import END_OF_TEXT_ID

MAX_POSITIONS = 8192
LOGITS_TOLERANCE = 1e-4
GENERATION = {"temperature": 0.7, "top_k": 40}
LAYER_NAMES = {
    "input_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attention.q_proj": "self_attn.q_proj.weight",
    "attention.k_proj": "self_attn.k_proj.weight",
    "attention.v_proj": "self_attn.v_proj.weight",
    "attention.o_proj": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.router": "mlp.gate.weight",
}


def to_hub_tensors(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and unstack the training model's parameters; the tied head is left out."""
    width = config.moe_intermediate_size
    out = {
        "model.embed_tokens.weight": state["embedding"],
        "model.norm.weight": state["norm.weight"],
    }
    for layer in range(config.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, hub_name in LAYER_NAMES.items():
            out[f"{theirs}.{hub_name}"] = state[f"{ours}.{name}"]
        gate_up, down = state[f"{ours}.mlp.gate_up"], state[f"{ours}.mlp.down"]
        for expert in range(config.experts):
            prefix = f"{theirs}.mlp.experts.{expert}"
            out[f"{prefix}.gate_proj.weight"] = gate_up[expert, :width]
            out[f"{prefix}.up_proj.weight"] = gate_up[expert, width:]
            out[f"{prefix}.down_proj.weight"] = down[expert]
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in out.items()}


def from_hub_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Undo `to_hub_tensors`, in float32."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    out = {
        "embedding": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    for layer in range(config.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        for name, hub_name in LAYER_NAMES.items():
            out[f"{ours}.{name}"] = tensors[f"{theirs}.{hub_name}"]
        experts = [f"{theirs}.mlp.experts.{expert}" for expert in range(config.experts)]
        pairs = [
            torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]])
            for e in experts
        ]
        out[f"{ours}.mlp.gate_up"] = torch.stack(pairs)
        out[f"{ours}.mlp.down"] = torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts])
    return out


def hub_config(config: ModelConfig) -> dict[str, object]:
    """Return ``config.json`` as the hub's Qwen3-MoE checkpoints have it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "eos_token_id": END_OF_TEXT_ID,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        # No layer is dense; the key is required all the same.
        "intermediate_size": config.top_k * config.moe_intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": config.heads,
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "output_router_logits": False,
        "pad_token_id": END_OF_TEXT_ID,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def export(folder: Path, out: Path) -> None:
    """Write the checkpoint of a working folder as a Hugging Face folder."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    config = ModelConfig()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "tokenizer" / name, out / name)
    files = {
        "config.json": hub_config(config),
        "generation_config.json": {
            "do_sample": True,
            "eos_token_id": END_OF_TEXT_ID,
            "pad_token_id": END_OF_TEXT_ID,
            **GENERATION,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    partial = out / "model.safetensors.partial"
    save_file(to_hub_tensors(state, config), str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)  # the library writes files that only their owner can read
    partial.replace(out / "model.safetensors")


def load_exported(model_folder: Path, compute_dtype: torch.dtype = torch.float32) -> MoEModel:
    """Load an exported folder into the training model, to compute in the given dtype."""
    config = ModelConfig(compute_dtype=compute_dtype)
    model = MoEModel(config)
    tensors = load_file(str(model_folder / "model.safetensors"))
    model.load_state_dict(from_hub_tensors(tensors, config))
    return model.eval()


@torch.no_grad()
def check_against_transformers(model_folder: Path, ids: Tensor) -> float:
    """Compare float32 logits with the transformers library's; return the largest difference.

    Raises
    ------
    ValueError
        When they differ by more than ``LOGITS_TOLERANCE``.
    """
    from transformers import AutoModelForCausalLM  # slow to import, and needed only here

    theirs = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ours = load_exported(model_folder)
    difference = float((theirs(ids).logits - ours.logits(ours(ids).hidden)).abs().max())
    if difference > LOGITS_TOLERANCE:
        raise ValueError(f"logits differ from transformers' by {difference:.2e}")
    return difference
