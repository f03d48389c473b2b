"""The configs that the models were published with, and the sizes that are told of them.

The headers come from transformers' own modules, without weights. The configs in ``hub_configs``
are those of the model cards' repositories; only PhiMoE's LongRoPE factors are stand-ins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from moepack import families
from moepack.source_headers import TensorHeader

CONFIGS = Path(__file__).parent / "hub_configs"


class Published(NamedTuple):
    """Parameters in all and those active for a token, in units of 1e9, as they were published."""

    total: float
    active: float
    layers: int
    moe_layers: int


PUBLISHED = {
    "mixtral-8x7b": Published(46.7, 12.9, 32, 32),
    "qwen3-30b-a3b": Published(30.5, 3.3, 48, 48),
    "qwen1.5-moe-a2.7b": Published(14.3, 2.7, 24, 24),
    "deepseek-v2-lite": Published(15.7, 2.4, 27, 26),
    "deepseek-v3": Published(671, 37, 61, 58),
    "kimi-k2": Published(1030, 32, 61, 60),
    "gpt-oss-20b": Published(20.9, 3.6, 24, 24),
    "glm-4.5-air": Published(106, 12, 46, 45),
    "phi-3.5-moe": Published(41.9, 6.6, 32, 32),
    "olmoe-1b-7b": Published(6.9, 1.3, 16, 16),
}


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def headers_of(config: dict[str, Any]) -> dict[str, TensorHeader]:
    """What transformers would hold, in bfloat16, with fused experts."""
    keys = {**config}
    model_type = keys.pop("model_type").replace("kimi_k2", "deepseek_v3")
    parsed = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(keys)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    return {
        name: TensorHeader("BF16", tuple(tensor.shape), "model.safetensors", 0, 0)
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_that_were_published(name: str) -> None:
    config = load(name)
    config.pop("quantization_config", None)
    spec = families.read_spec(config, headers_of(config), name)
    published = PUBLISHED[name]
    assert spec.total_parameters / 1e9 == pytest.approx(published.total, rel=0.01)
    # Some publishers count embedding and head as active, some one of them, some neither.
    active = spec.active_parameters / 1e9
    ends = sum(t.elements for t in spec.trunk if t.name in {"embed.weight", "head.weight"}) / 1e9
    assert 0.97 * (active - ends) <= published.active <= 1.03 * active
    assert (len(spec.layers), len(spec.moe_layers)) == (published.layers, published.moe_layers)


def test_layers_for_multi_token_prediction_are_known_and_not_needed() -> None:
    config = load("glm-4.5-air")
    headers = headers_of(config)
    extra = TensorHeader("BF16", (4096, 8192), "model.safetensors", 0, 0)
    headers["model.layers.46.eh_proj.weight"] = extra
    spec = families.read_spec(config, headers, "glm")
    assert spec.unused == ("model.layers.46.eh_proj.weight",)
    assert spec.digest == families.read_spec(config, headers_of(config), "other name").digest


def test_keys_of_real_configs_arrive_where_they_matter() -> None:
    glm = families.read_spec(load("glm-4.5-air"), headers_of(load("glm-4.5-air")), "glm")
    assert glm.layers[0].attention.rotary_dim == 64
    assert glm.eos_token_ids == (151329, 151336, 151338)
    phi = families.read_spec(load("phi-3.5-moe"), headers_of(load("phi-3.5-moe")), "phi")
    assert (phi.rope.kind, phi.rope.original_context) == ("longrope", 4096)
    qwen = families.read_spec(
        load("qwen1.5-moe-a2.7b"), headers_of(load("qwen1.5-moe-a2.7b")), "qwen"
    )
    assert {layer.attention.window for layer in qwen.layers} == {None}
    lite = load("deepseek-v2-lite")
    attention = families.read_spec(lite, headers_of(lite), "lite").layers[5].attention
    # (128 + 64) ** -0.5 * (0.1 * 0.707 * ln(40) + 1) ** 2, by hand.
    assert attention.scale == pytest.approx(0.114721387, rel=1e-6)
