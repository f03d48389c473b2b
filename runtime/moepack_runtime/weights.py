"""The trunk's tensors by name, and the products that are made with most of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from typing_extensions import override

from moepack_runtime.products import linear, several
from moepack_runtime.quantised import Int8Matrix, product

#: Torch's dtype for each that a model is loaded in, or its quantised experts, by safetensors' name.
TORCH_DTYPE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Linear(ABC):
    """``x W^T + b`` with the weight as [out, in]; no copy of either is made."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""


class ExactLinear(Linear):
    """By :func:`moepack_runtime.products.linear`."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @override
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RoundedLinear(Linear):
    """With a weight in codes, by :func:`moepack_runtime.quantised.product`."""

    __slots__ = ("_bias", "_matrix")

    def __init__(self, matrix: Int8Matrix, bias: torch.Tensor | None = None) -> None:
        self._matrix = matrix
        self._bias = bias

    @override
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self._matrix, self._bias)


def beside(maps: Sequence[Linear]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """What several maps make of one ``x``, each to the same bits as by itself."""
    exact = [(each.weight, each.bias) for each in maps if isinstance(each, ExactLinear)]
    if len(exact) == len(maps):
        return lambda x: several(x, exact)
    return lambda x: [each(x) for each in maps]


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

    def linear(self, name: str, bias: str | None = None) -> Linear:
        """The linear map ``name.weight`` (with ``name.scale``: in codes) and ``name.bias``.

        ``bias``: the name of that, where it is another.
        """
        weight, added = self[f"{name}.weight"], self.get(bias or f"{name}.bias")
        scale = self.get(f"{name}.scale")
        if scale is None:
            return ExactLinear(weight, added)
        return RoundedLinear(Int8Matrix(weight, scale), added)

    def embedding(self, name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows of ``name.weight``: from ids, int64 [tokens], to [tokens, width].

        Those of a table in codes are what its product would multiply with, in ``dtype``.
        With the result they take up to 6 bytes for each of their elements meanwhile: less than
        what a plan has for the hidden states of as many tokens.
        """
        table, scale = self[f"{name}.weight"], self.get(f"{name}.scale")
        if scale is None:
            return lambda ids: F.embedding(ids, table)

        def rows(ids: torch.Tensor) -> torch.Tensor:
            floats = table.index_select(0, ids).float()
            return floats.mul_(scale.index_select(0, ids).unsqueeze(1).float()).to(dtype)

        return rows
