"""Routed experts in a checkpoint: the layouts that exist in the wild, and where an expert lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from moepack.families.tensors import Header, Shape, missing_tensor
from moepack.model_spec import MoeSpec

_EXPERTS = ("mlp.experts", "block_sparse_moe.experts")

#: gate, up and down of one expert: in most releases, and in Mixtral's own.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a canonical tensor lies: a source tensor, or a part of one.

    Read ``name``; take entry ``index`` of the first dimension (a contiguous run of bytes) unless
    it is None; take ``select`` of that; transpose it if ``transpose``.
    """

    name: str
    index: int | None = None
    select: tuple[slice, ...] = ()
    transpose: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one layer's routed experts are stored.

    Attributes
    ----------
    prefix : str
        Source name of the layer's experts.
    kind : {"separate", "fused", "stacked", "interleaved"}
        One tensor per expert and projection; [E, 2 F, hidden] with gate above up; one 3-D tensor
        per projection; or GPT-OSS's [E, hidden, 2 F] with gate and up in alternate columns.
    projections : tuple of str
        Source names of gate, up and down.
    """

    prefix: str
    kind: Literal["separate", "fused", "stacked", "interleaved"]
    projections: tuple[str, str, str]
    moe: MoeSpec
    hidden_size: int

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Every source tensor of the layer's experts, with the shape it must have."""
        experts, width, hidden = self.moe.num_experts, self.moe.intermediate_size, self.hidden_size
        gate, up, down = self.projections
        if self.kind == "separate":
            for e in range(experts):
                yield f"{self.prefix}.{e}.{gate}.weight", (width, hidden)
                yield f"{self.prefix}.{e}.{up}.weight", (width, hidden)
                yield f"{self.prefix}.{e}.{down}.weight", (hidden, width)
        elif self.kind == "stacked":
            yield f"{self.prefix}.{gate}", (experts, width, hidden)
            yield f"{self.prefix}.{up}", (experts, width, hidden)
            yield f"{self.prefix}.{down}", (experts, hidden, width)
        elif self.kind == "fused":
            yield f"{self.prefix}.gate_up_proj", (experts, 2 * width, hidden)
            yield f"{self.prefix}.{down}", (experts, hidden, width)
        else:
            yield f"{self.prefix}.gate_up_proj", (experts, hidden, 2 * width)
            yield f"{self.prefix}.gate_up_proj_bias", (experts, 2 * width)
            yield f"{self.prefix}.{down}", (experts, width, hidden)
            yield f"{self.prefix}.{down}_bias", (experts, hidden)

    def expert(self, expert: int) -> dict[str, TensorSource]:
        """Where one expert's tensors lie, under the names of ``segments.EXPERT_TENSORS``."""
        gate, up, down = self.projections
        width = self.moe.intermediate_size
        if self.kind == "separate":
            return {
                "gate.weight": TensorSource(f"{self.prefix}.{expert}.{gate}.weight"),
                "up.weight": TensorSource(f"{self.prefix}.{expert}.{up}.weight"),
                "down.weight": TensorSource(f"{self.prefix}.{expert}.{down}.weight"),
            }
        if self.kind == "stacked":
            return {
                "gate.weight": TensorSource(f"{self.prefix}.{gate}", expert),
                "up.weight": TensorSource(f"{self.prefix}.{up}", expert),
                "down.weight": TensorSource(f"{self.prefix}.{down}", expert),
            }
        both = f"{self.prefix}.gate_up_proj"
        if self.kind == "fused":
            return {
                "gate.weight": TensorSource(both, expert, (slice(0, width),)),
                "up.weight": TensorSource(both, expert, (slice(width, 2 * width),)),
                "down.weight": TensorSource(f"{self.prefix}.{down}", expert),
            }
        even, odd = slice(0, None, 2), slice(1, None, 2)
        return {
            "gate.weight": TensorSource(both, expert, (slice(None), even), transpose=True),
            "up.weight": TensorSource(both, expert, (slice(None), odd), transpose=True),
            "down.weight": TensorSource(f"{self.prefix}.{down}", expert, transpose=True),
            "gate.bias": TensorSource(f"{both}_bias", expert, (even,)),
            "up.bias": TensorSource(f"{both}_bias", expert, (odd,)),
            "down.bias": TensorSource(f"{self.prefix}.{down}_bias", expert),
        }


def find_experts(
    layer: int,
    moe: MoeSpec,
    hidden_size: int,
    headers: Mapping[str, Header],
    *,
    interleaved: bool,
    what: str,
) -> ExpertLayout:
    """How a layer's experts are stored.

    Raises
    ------
    MissingTensorError
        When the checkpoint has no layout of experts that is known.
    """
    prefixes = [f"model.layers.{layer}.{name}" for name in _EXPERTS]
    if interleaved:
        prefix = prefixes[0]
        if f"{prefix}.gate_up_proj" in headers:
            return ExpertLayout(prefix, "interleaved", _PROJECTIONS[0], moe, hidden_size)
        raise missing_tensor((f"{prefix}.gate_up_proj",), what)
    for prefix in prefixes:
        if f"{prefix}.gate_up_proj" in headers:
            return ExpertLayout(prefix, "fused", _PROJECTIONS[0], moe, hidden_size)
        for projections in _PROJECTIONS:
            if f"{prefix}.{projections[0]}" in headers:
                return ExpertLayout(prefix, "stacked", projections, moe, hidden_size)
            # Any expert will do to know the layout; which of them are there is checked later.
            for expert in range(moe.num_experts):
                if f"{prefix}.{expert}.{projections[0]}.weight" in headers:
                    return ExpertLayout(prefix, "separate", projections, moe, hidden_size)
    raise missing_tensor((f"{prefixes[0]}.0.gate_proj.weight", f"{prefixes[0]}.gate_up_proj"), what)
