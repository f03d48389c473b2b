"""Small checkpoints in FP8 and MXFP4 as they are published, and the same ones dequantised.

Transformers makes the models and does the dequantising; only the quantising is done here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.tiny_models import TinyModel, byte_tokenizer, randomise

BLOCK = 128
_E4M3_MAX = 448.0

_DEEPSEEK = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 120,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-4,
}
_QWEN = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
_GPT_OSS = {
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 8,
    "swiglu_limit": 0.6,
}


class Quantised(NamedTuple):
    """A model to quantise, and how.

    Attributes
    ----------
    scales : torch.dtype
        Of FP8's scales.
    """

    tiny: TinyModel
    method: str
    scales: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        return f"{self.tiny.family}-{self.method}"


QUANTISED = (
    Quantised(TinyModel("deepseek_v3", "fp8", "DeepseekV3Config", _DEEPSEEK), "fp8"),
    Quantised(TinyModel("qwen3_moe", "fp8", "Qwen3MoeConfig", _QWEN), "fp8", torch.bfloat16),
    Quantised(TinyModel("gpt_oss", "mxfp4", "GptOssConfig", _GPT_OSS), "mxfp4"),
)


def quantised_model(key: str, folder: Path, dtype: str = "float32", **changes: object) -> Path:
    """Save one of :data:`QUANTISED`; ``dtype`` is the model's, as its config spells it.

    Further ``changes`` are keys of the config.
    """
    made = next(made for made in QUANTISED if made.key == key)
    tiny = dataclasses.replace(made.tiny, changes={**made.tiny.changes, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny.config(), dtype=torch.float32)
    randomise(model, seed=7)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tensors = load_file(folder / "model.safetensors")
    quantise = _to_fp8 if made.method == "fp8" else _to_mxfp4
    save_file(quantise(tensors, made.scales), folder / "model.safetensors")
    method: dict[str, Any] = {"quant_method": made.method}
    if made.method == "fp8":
        method |= {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate"],
        }
    change_config(folder, quantization_config=method)
    return folder


def dequantised_model(source: Path, folder: Path) -> Path:
    """The same in the dtype of its config, every value made by transformers."""
    folder.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    dtype = getattr(torch, config["dtype"])
    tensors = load_file(source / "model.safetensors")
    fp8 = Fp8Dequantize(None)
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.replace("_blocks", "_scales")]
            values = convert_moe_packed_tensors(tensor, scales, dtype=dtype)
            plain[name.removesuffix("_blocks")] = values
        elif tensor.dtype == torch.float8_e4m3fn:
            plain[name] = fp8._dequantize_one(tensor, tensors[f"{name}_scale_inv"], dtype)
        elif not name.endswith(("_scales", "_scale_inv")):
            plain[name] = tensor
    save_file(plain, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    change_config(folder, quantization_config=None)
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Change keys of a ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Put tensors in place of others, or remove them."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def _to_fp8(tensors: dict[str, torch.Tensor], scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What DeepSeek quantises: the linear weights of layers, but for the router's."""
    made = {}
    for name, tensor in tensors.items():
        if re.search(r"\.\w+_proj\w*\.weight$", name) is None:
            made[name] = tensor
            continue
        rows, columns = (-(-size // BLOCK) for size in tensor.shape)
        scales = torch.empty(rows, columns)
        codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                block = (
                    slice(row * BLOCK, (row + 1) * BLOCK),
                    slice(column * BLOCK, (column + 1) * BLOCK),
                )
                values = tensor[block].float()
                scale = (values.abs().max() / _E4M3_MAX).to(scale_dtype).float()
                codes[block] = (values / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(codes.dtype)
                scales[row, column] = scale
        made[name] = codes
        made[f"{name}_scale_inv"] = scales.to(scale_dtype)
    return made


def _to_mxfp4(tensors: dict[str, torch.Tensor], _: torch.dtype) -> dict[str, torch.Tensor]:
    """Experts drawn anew, in the order of size of those that were there."""
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            made[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        groups = (experts, rows, columns // 32)
        made[f"{name}_blocks"] = torch.randint(
            256, (*groups, 16), dtype=torch.uint8, generator=generator
        )
        made[f"{name}_scales"] = torch.randint(
            121, 125, groups, dtype=torch.uint8, generator=generator
        )
    return made
