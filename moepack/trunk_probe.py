"""Measuring a trunk in 8 bits: layers like the model's, whose codes are made up.

What a product takes depends on no code, and rounding a trunk takes far longer than walking through
it. The layers are walked through as the model's own are (:mod:`moepack.layer_walk`), with the
model's own experts between them, so that weights are found where a run finds them.

Memory beyond the engine's: the trunk of the layers that are walked through, embedding and head in
8 bits, and a cache for these layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from moepack.layer_walk import Experts
from moepack.layouts import PREFILL_BLOCK_TOKENS
from moepack.trunk import ROUNDED, stored_trunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.kv_cache import KvCache
    from moepack_runtime.model import Decoder
    from moepack_runtime.token_graphs import TokenGraphs

    from moepack.encodings import EncodedTensor
    from moepack.model_spec import ModelSpec, TensorInfo

# All codes, and all other numbers: no product overflows, since infinities and denormal numbers are
# slow.
_CODE, _SCALE = 3, 2.0**-8


class RoundedWalk(NamedTuple):
    """What a walk needs of an engine: layers 0, 1 ... are some of a model's, in 8 bits."""

    spec: ModelSpec
    device: torch.device
    kv: KvCache
    decoder: Decoder
    token_graphs: TokenGraphs | None


def rounded_walk(engine: Engine, numbers: Sequence[int]) -> RoundedWalk:
    """Layers like those of these numbers, and a head.

    Parameters
    ----------
    engine
        Open on the model; its weights and its cache stay as they are.
    """
    from moepack_runtime.device import prepare_device
    from moepack_runtime.kv_cache import KvCache
    from moepack_runtime.model import Decoder
    from moepack_runtime.token_graphs import TokenGraphs

    spec, device = _of_layers(engine.spec, numbers), engine.device
    kv = KvCache.allocate(
        spec,
        context_tokens=engine.kv.context_tokens,
        block_tokens=PREFILL_BLOCK_TOKENS,
        device=device,
    )
    trunk = {tensor.name: _made_up(tensor, device) for tensor in stored_trunk(spec, ROUNDED)}
    decoder = Decoder(spec, trunk, kv)
    graphs = None
    if engine.token_graphs is not None:
        graphs = TokenGraphs(spec, decoder, kv, prepare_device(device))
    return RoundedWalk(spec, device, kv, decoder, graphs)


def renumbered(experts: Experts, numbers: Sequence[int]) -> Experts:
    """The same experts for layers that are numbered from 0 on."""
    return Experts(
        lambda index, hidden, each: experts.run(numbers[index], hidden, each), experts.each
    )


def _of_layers(spec: ModelSpec, numbers: Sequence[int]) -> ModelSpec:
    """The model with some of its layers alone."""
    trunk: list[TensorInfo] = [info for info in spec.trunk if not info.name.startswith("layers.")]
    for index, number in enumerate(numbers):
        prefix = f"layers.{number}."
        trunk += [
            replace(info, name=f"layers.{index}.{info.name.removeprefix(prefix)}")
            for info in spec.trunk
            if info.name.startswith(prefix)
        ]
    layers = tuple(spec.layers[number] for number in numbers)
    return replace(spec, layers=layers, trunk=tuple(trunk))


def _made_up(tensor: EncodedTensor, device: torch.device) -> torch.Tensor:
    import torch
    from moepack_runtime.weights import TORCH_DTYPE

    value = _CODE if tensor.dtype == "I8" else _SCALE
    return torch.full(tensor.shape, value, dtype=TORCH_DTYPE[tensor.dtype], device=device)
