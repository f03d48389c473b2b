"""The published settings of MoEpic (arXiv 2509.08342), as far as they are stated.

Shapes are those of the models' own configurations. Times are the paper's; what it does not state is
assumed here, and :data:`ASSUMPTIONS` says so. Everything is built in code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from moepack.budget import stored_bytes
from moepack.compute import COMPUTE_VERSION, ComputeProfile, Curve, LayerCompute
from moepack.hardware import find_hardware
from moepack.layouts import uniform_layout
from moepack.model_spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
    TensorInfo,
)
from moepack.plan_request import PlanRequest
from moepack.presets import preset_path
from moepack.routing_model import load_routing_model
from moepack.routing_presets import synthetic_profile
from moepack.strategies import FULL_ENGINE
from moepack.units import parse_size

#: Whole-expert loading of a Qwen1.5-MoE token against its compute: 165 ms and 57 ms.
QWEN_LOADING_S, QWEN_COMPUTE_S = 0.165, 0.057

#: Pre-gated keeps nothing and loads two experts a layer: its 248 ms are 64 transfers.
MIXTRAL_LOADING_S = 0.248

#: Of one token of Mixtral, resident.
MIXTRAL_COMPUTE_S = 0.060

PROMPT_TOKENS, NEW_TOKENS, CONTEXT_TOKENS = 512, 128, 1024

#: Of the trace that is drawn; a fifth of them is *test*.
TRACE_TOKENS, TRACE_TEXTS = 2048, 4

_RAM_BYTES = parse_size("1T")

# Of a layer's compute for one token: attention and router, routed experts; the rest is shared.
_ATTENTION_SHARE, _ROUTED_SHARE = 0.4, 0.5

ASSUMPTIONS = (
    "stated in the paper: budgets, shapes, an A6000 on PCIe 4.0 x16, hit rates of Qwen1.5-MoE",
    "stated: 165 ms of loading against 57 ms of compute for a token of Qwen1.5-MoE",
    "assumed: Mixtral's transfer of 3.9 ms (Pre-gated's 248 ms are 64), its compute of 60 ms",
    "assumed: Mixtral's routing: counts and repetitions published elsewhere",
    "assumed: two fifths of a layer's compute come before its routing",
    "assumed: a block of a prompt takes what a token takes, since launches decide",
    "assumed: prompts of 512 tokens",
    "assumed: 85 % of the predictions right, 39 % and 59 % in the first two layers",
    "budgets count whole experts in the cache; staging of up to twice top-k comes on top",
)


@dataclass(frozen=True)
class PaperSetting:
    """One model on the paper's machine.

    Attributes
    ----------
    transfer_s : float
        Of one whole expert; parts take their share of it.
    compute_s : float
        Of one token, everything resident.
    routing : str
        The routing preset.
    """

    spec: ModelSpec
    transfer_s: float
    compute_s: float
    routing: str

    @property
    def expert_bytes(self) -> int:
        """Of one whole expert in a slot."""
        return stored_bytes(self.spec, uniform_layout(self.spec, 1.0).layers[0], "top")

    def link(self, size_bytes: int) -> float:
        """Seconds of one transfer."""
        return self.transfer_s * size_bytes / self.expert_bytes

    @functools.cached_property
    def request(self) -> PlanRequest:
        """What a plan would be asked for; its budget is the caller's to say."""
        profile = synthetic_profile(
            load_routing_model(preset_path(self.routing, "routing")),
            self.spec,
            tokens=TRACE_TOKENS,
            texts=TRACE_TEXTS,
        )
        return PlanRequest(
            spec=self.spec,
            # The paper's machine held all experts in RAM.
            hardware=replace(find_hardware("a6000"), ram_bytes=_RAM_BYTES),
            hardware_is_this_machine=False,
            compute=_compute(self.spec, self.compute_s),
            routing=profile,
            routing_is_assumed=True,
            engine=FULL_ENGINE,
            assumed_engine=True,
            device="cuda",
            fast_budget_bytes=0,
            context_tokens=CONTEXT_TOKENS,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
        )


def qwen(
    transfer_s: float = QWEN_LOADING_S / (24 * 4), routing: str = "qwen1.5-moe-paper"
) -> PaperSetting:
    """Qwen1.5-MoE-A2.7B in 16 bits: 24 layers of 60 experts, 4 of them for a token."""
    moe = MoeSpec(
        num_experts=60,
        top_k=4,
        intermediate_size=1408,
        router=RouterSpec(),
        shared_intermediate_size=5632,
        shared_gate=True,
    )
    heads = AttentionSpec(16, 16, 128, 128, 128, 128**-0.5, qkv_bias=True)
    spec = decoder("Qwen1.5-MoE-A2.7B", "qwen2_moe", 24, heads, moe, hidden=2048, vocab=151936)
    return PaperSetting(spec, transfer_s, QWEN_COMPUTE_S, routing)


def mixtral(compute_s: float = MIXTRAL_COMPUTE_S) -> PaperSetting:
    """Mixtral-8x7B: 32 layers of 8 experts, 2 of them for a token.

    The paper's experts are in 2 bits; what counts here is the time of one transfer.
    """
    moe = MoeSpec(num_experts=8, top_k=2, intermediate_size=14336, router=RouterSpec())
    heads = AttentionSpec(32, 8, 128, 128, 128, 128**-0.5)
    spec = decoder("Mixtral-8x7B", "mixtral", 32, heads, moe, hidden=4096, vocab=32000)
    return PaperSetting(spec, MIXTRAL_LOADING_S / (32 * 2), compute_s, "mixtral-paper")


def decoder(
    name: str,
    family: str,
    layers: int,
    attention: AttentionSpec,
    moe: MoeSpec,
    *,
    hidden: int,
    vocab: int,
) -> ModelSpec:
    """A decoder of equal layers, with the matrices of its trunk."""
    width = attention.num_heads * attention.head_dim
    kv_width = attention.num_kv_heads * attention.head_dim
    shared = moe.shared_intermediate_size
    matrices: list[tuple[str, tuple[int, ...]]] = []
    for number in range(layers):
        matrices += [
            (f"layers.{number}.attn.q.weight", (width, hidden)),
            (f"layers.{number}.attn.k.weight", (kv_width, hidden)),
            (f"layers.{number}.attn.v.weight", (kv_width, hidden)),
            (f"layers.{number}.attn.o.weight", (hidden, width)),
            (f"layers.{number}.router.weight", (moe.num_experts, hidden)),
        ]
        if shared:
            matrices += [
                (f"layers.{number}.shared.gate.weight", (shared, hidden)),
                (f"layers.{number}.shared.up.weight", (shared, hidden)),
                (f"layers.{number}.shared.down.weight", (hidden, shared)),
            ]
    matrices += [("embed.weight", (vocab, hidden)), ("head.weight", (vocab, hidden))]
    return ModelSpec(
        name=name,
        family=family,
        architecture=name,
        dtype="BF16",
        vocab_size=vocab,
        hidden_size=hidden,
        context_length=8192,
        norm="rms",
        norm_eps=1e-6,
        tied_embeddings=False,
        rope=RopeSpec(1e6),
        layers=(LayerSpec(attention, moe, None),) * layers,
        trunk=tuple(TensorInfo(tensor, "BF16", shape) for tensor, shape in matrices),
    )


def _compute(spec: ModelSpec, token_s: float) -> ComputeProfile:
    layer_s = token_s / len(spec.layers)
    moe = spec.moe(0)
    shared_share = 1.0 - _ATTENTION_SHARE - _ROUTED_SHARE if moe.shared_intermediate_size else 0.0
    routed_share = 1.0 - _ATTENTION_SHARE - shared_share
    expert = Curve((1,), (layer_s * routed_share / moe.top_k,))
    shared = Curve((1,), (layer_s * shared_share,))
    layers = LayerCompute(
        layers=tuple(range(len(spec.layers))),
        attention=Curve((1,), (layer_s * _ATTENTION_SHARE,)),
        router=Curve((1,), (0.0,)),
        expert=expert,
        expert_split=expert,
        ffn=shared if shared_share else None,
    )
    return ComputeProfile(
        version=COMPUTE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        device="cuda",
        threads=1,
        source="derived",
        how="the paper's time for one token, divided evenly",
        recorded_utc="",
        context_tokens=CONTEXT_TOKENS,
        head_s=0.0,
        spread=0.0,
        layers=(layers,),
    )
