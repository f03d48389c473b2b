"""Small models made of reproducible bits, without a checkpoint: what the packer sees of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moepack.footprint import MemoryBreakdown
from moepack.forecast import PlannerReport, Prediction, Provenance
from moepack.layout import LayerLayout, Layout
from moepack.layouts import mixed_layout
from moepack.model_spec import (
    DTYPE_BYTES,
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
    TensorInfo,
)
from moepack.plan import PLAN_VERSION, LayerPlacement, Placement, Plan
from moepack.segments import Bits

BITS: dict[str, type[np.generic]] = {
    "F64": np.uint64,
    "F32": np.uint32,
    "F16": np.uint16,
    "BF16": np.uint16,
}


def make_spec(
    *,
    hidden: int = 32,
    width: int = 48,
    experts: int = 3,
    moe_layers: int = 2,
    dense_layers: int = 1,
    dtype: str = "BF16",
    bias: bool = False,
    vocab: int = 20,
) -> ModelSpec:
    """A model whose first layers are dense."""
    attention = AttentionSpec(2, 1, hidden // 2, hidden // 2, hidden // 2, 0.25)
    moe = MoeSpec(experts, min(2, experts), width, RouterSpec(), expert_bias=bias)
    layers = [LayerSpec(attention, None, 2 * width)] * dense_layers
    layers += [LayerSpec(attention, moe, None)] * moe_layers
    trunk = [TensorInfo("embed.weight", dtype, (vocab, hidden))]
    for layer in range(len(layers)):
        trunk.append(TensorInfo(f"layers.{layer}.attn_norm.weight", dtype, (hidden,)))
        if layer >= dense_layers:
            trunk.append(TensorInfo(f"layers.{layer}.router.weight", dtype, (experts, hidden)))
            trunk.append(TensorInfo(f"layers.{layer}.router.correction_bias", "F32", (experts,)))
    trunk.append(TensorInfo("norm.weight", dtype, (hidden,)))
    return ModelSpec(
        name="fake",
        family="fake",
        architecture="FakeForCausalLM",
        dtype=dtype,
        vocab_size=vocab,
        hidden_size=hidden,
        context_length=64,
        norm="rms",
        norm_eps=1e-6,
        tied_embeddings=True,
        rope=RopeSpec(10_000.0),
        layers=tuple(layers),
        trunk=tuple(trunk),
    )


@dataclass
class FakeSource:
    """Weights that depend on their name and on ``seed`` alone."""

    spec: ModelSpec
    seed: int = 0
    auxiliary_files: tuple[Path, ...] = ()
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def weights_digest(self) -> str:
        return f"{self.seed:064x}"

    def trunk_tensor(self, name: str) -> Bits:
        info = next(info for info in self.spec.trunk if info.name == name)
        return self._bits(info.shape, info.dtype, hash_of(name))

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        self.asked.append((layer, expert))
        moe, hidden = self.spec.moe(layer), self.spec.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "gate.weight": (moe.intermediate_size, hidden),
            "up.weight": (moe.intermediate_size, hidden),
            "down.weight": (hidden, moe.intermediate_size),
        }
        if moe.expert_bias:
            shapes |= {
                "gate.bias": (moe.intermediate_size,),
                "up.bias": (moe.intermediate_size,),
                "down.bias": (hidden,),
            }
        return {
            name: self._bits(shape, self.spec.dtype, hash_of(f"{layer}.{expert}.{name}"))
            for name, shape in shapes.items()
        }

    def _bits(self, shape: tuple[int, ...], dtype: str, key: int) -> Bits:
        kind = BITS[dtype]
        generator = np.random.default_rng((self.seed, key))
        count = int(np.prod(shape))
        return np.frombuffer(generator.bytes(count * DTYPE_BYTES[dtype]), kind).reshape(shape)


@dataclass
class SmoothSource(FakeSource):
    """The same with experts like trained ones: finite BF16 weights, normally distributed."""

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        bits = super().expert(layer, expert)
        return {name: _normal_bf16(item) for name, item in bits.items()}


def _normal_bf16(bits: Bits) -> Bits:
    """A bell curve, seeded by the bits."""
    random = np.random.default_rng(bits.reshape(-1)[:8].tolist())
    values = random.standard_normal(bits.shape, np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little")


def make_plan(
    spec: ModelSpec,
    splits: Sequence[int],
    *,
    new_tokens: int = 8,
    block_tokens: int = 512,
    encodings: Sequence[str | Sequence[str]] | None = None,
) -> Plan:
    """A plan that cuts the layers with experts at ``splits``; its figures mean nothing.

    ``encodings``: of every layer, or where that is mixed of every expert.
    """
    names = encodings or [spec.dtype] * len(splits)
    layers = tuple(
        LayerLayout(layer, split, spec.moe(layer).intermediate_size, 16, name)
        if isinstance(name, str)
        else mixed_layout(spec, layer, name, split=split)
        for layer, split, name in zip(spec.moe_layers, splits, names, strict=True)
    )
    return Plan(
        version=PLAN_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        max_context_tokens=64,
        layout=Layout(spec.digest, layers, block_tokens),
        placement=Placement(
            device="cpu",
            fast_budget_bytes=1 << 20,
            staging_experts=2,
            context_tokens=64,
            prompt_tokens=16,
            new_tokens=new_tokens,
            memory=MemoryBreakdown(1, 2, 3, 4, 5, 6),
            layers=tuple(
                LayerPlacement(
                    cut.layer, 0, 0, 0, "lru", tuple(range(spec.moe(cut.layer).num_experts))
                )
                for cut in layers
            ),
        ),
        prediction=Prediction(0.1, 0.01, 100.0, 0.5, 0.5, 1e6, 1 << 20, 1 << 22, 1.25),
        baselines={},
        provenance=Provenance("fake", True, "fake", "fake"),
        planner=PlannerReport(0.0, "optimised", None, 0),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
