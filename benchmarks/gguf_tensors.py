"""Which tensors a GGUF of a checkpoint has, under which names, and in what each is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.gguf_kinds import Kind
from moepack.errors import CheckpointError, GroupMismatchError
from moepack.model_spec import ModelSpec

_Type = gguf.GGMLQuantizationType

PROJECTIONS = ("gate", "up", "down")


def bits_per_weight(kind: gguf.GGMLQuantizationType) -> float:
    """Scales included."""
    weights, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    return float(8 * size_bytes / weights)


class _Family(NamedTuple):
    """What llama.cpp's graph of an architecture takes for granted."""

    architecture: str
    normalises: bool


_FAMILIES = {
    "olmoe": _Family("olmoe", normalises=False),
    "qwen2_moe": _Family("qwen2moe", normalises=False),
    "qwen3_moe": _Family("qwen3moe", normalises=True),
}

#: Our module of a layer -> its name in a GGUF.
_MODULES = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "router": "ffn_gate_inp",
    "shared.gate": "ffn_gate_shexp",
    "shared.up": "ffn_up_shexp",
    "shared.down": "ffn_down_shexp",
    "shared_gate": "ffn_gate_inp_shexp",
}
_TOP = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_FLOAT32_MODULES = ("router", "shared_gate")


class Tensor(NamedTuple):
    """One tensor of the file: read when it is written.

    ``experts`` is the (layer, projection) of one that is stacked of all experts, else None.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    source: str
    experts: tuple[int, str] | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes in the file."""
        weights, size_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape) // weights * size_bytes)


def architecture(spec: ModelSpec) -> str:
    """What llama.cpp calls the family.

    Raises
    ------
    CheckpointError
        When its graph cannot compute this variant of it.
    """
    family = _FAMILIES.get(spec.family)
    if family is None:
        raise CheckpointError(
            f"{spec.name} is {spec.family}; a GGUF can be written for {', '.join(_FAMILIES)}"
        )
    for number, layer in enumerate(spec.layers):
        reasons = {
            "has no routed experts": layer.moe is None,
            "has a sliding window": layer.attention.window is not None,
            "clamps its queries": layer.attention.clip is not None,
            "has an output bias": layer.attention.output_bias,
        }
        if layer.moe is not None:
            router = layer.moe.router
            reasons["normalises its weights otherwise"] = router.normalise != family.normalises
        for reason, holds in reasons.items():
            if holds:
                raise CheckpointError(
                    f"{spec.name}: layer {number} {reason}, which llama.cpp does not compute for "
                    f"{family.architecture}; measure a model without that"
                )
    if spec.rope.kind != "default":
        raise CheckpointError(
            f"{spec.name}: rotary embedding of kind {spec.rope.kind}; only the default is written"
        )
    if spec.dtype != "BF16":
        raise CheckpointError(f"{spec.name} is stored in {spec.dtype}, expected BF16")
    return family.architecture


def tensors(spec: ModelSpec, kind: Kind) -> Iterator[Tensor]:
    """Everything in the order of the layers, as the model is walked through.

    Raises
    ------
    GroupMismatchError
        When the rows of a matrix do not divide into the blocks that it is stored in.
    """
    hidden, stored_in, trunk = spec.hidden_size, _Type[kind.name], _Type[kind.trunk]
    for info in spec.trunk:
        module, leaf = info.name.rsplit(".", 1)
        if module in _TOP:
            yield _tensor(f"{_TOP[module]}.{leaf}", info.shape, info.name, module, trunk)
            continue
        _, number, inner = module.split(".", 2)
        shape = info.shape[1:] if inner == "shared_gate" else info.shape
        yield _tensor(f"blk.{number}.{_MODULES[inner]}.{leaf}", shape, info.name, inner, trunk)
        if inner != "router":
            continue
        moe = spec.moe(int(number))
        experts, width = moe.num_experts, moe.intermediate_size
        for projection in PROJECTIONS:
            matrix = (hidden, width) if projection == "down" else (width, hidden)
            name = f"blk.{number}.ffn_{projection}_exps.weight"
            _require_blocks(name, stored_in, matrix[1])
            yield Tensor(
                name,
                (experts, *matrix),
                stored_in,
                info.name,
                (int(number), projection),
            )


def _require_blocks(name: str, kind: gguf.GGMLQuantizationType, inputs: int) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if inputs % block:
        raise GroupMismatchError(
            f"{name}: rows of {inputs} weights, expected a multiple of {block} for {kind.name}; "
            "choose another kind"
        )


def _tensor(
    name: str,
    shape: tuple[int, ...],
    source: str,
    module: str,
    trunk: gguf.GGMLQuantizationType,
) -> Tensor:
    if len(shape) == 1 or module in _FLOAT32_MODULES:
        return Tensor(name, shape, _Type.F32, source)
    _require_blocks(name, trunk, shape[1])
    return Tensor(name, shape, trunk, source)


def stored(bits: npt.NDArray[np.generic], kind: gguf.GGMLQuantizationType) -> npt.NDArray[Any]:
    """A tensor's elements as a file of this kind has them.

    Raises
    ------
    CheckpointError
        When a matrix is not in bfloat16.
    """
    if kind is _Type.F32:
        return as_float32(bits)
    if bits.dtype != np.uint16:
        raise CheckpointError(f"a matrix is stored in {bits.dtype}, expected bfloat16")
    if kind is _Type.BF16:
        return bits.astype(np.uint16, copy=False)
    rounded: npt.NDArray[np.uint8] = gguf.quants.quantize(as_float32(bits), kind)
    return rounded


def as_float32(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    if bits.dtype == np.uint16:
        wide = bits.astype(np.uint32)
        wide <<= 16  # in place: an embedding may be large
        return wide.view(np.float32)
    return bits.astype(np.float32)
