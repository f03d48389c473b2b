"""The trunk's tensors by canonical name, and the one product that is made with most of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moepack_runtime.products import linear

#: Torch's dtype for each that a model is loaded in, or its quantised experts, by safetensors' name.
TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Linear:
    """``x W^T + b`` with the weight as [out, in]; no copy of either is made.

    By :func:`moepack_runtime.products.linear`.
    """

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        return linear(x, self.weight, self.bias)


class Weights:
    """The tensors whose names start with a prefix."""

    def __init__(self, trunk: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        self._trunk = trunk
        self._prefix = prefix

    def within(self, part: str) -> Weights:
        """The tensors of a part, such as ``layers.0.attn``."""
        return Weights(self._trunk, f"{self._prefix}{part}.")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._trunk[self._prefix + name]

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None where the model has none of this name."""
        return self._trunk.get(self._prefix + name)

    def linear(self, name: str) -> Linear:
        """The linear map ``name.weight``, ``name.bias``."""
        return Linear(self[f"{name}.weight"], self.get(f"{name}.bias"))
