"""A checkpoint whose experts are rounded to codes and back: what quantised engines compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from moepack_runtime.weights import TORCH_DTYPE

from moepack.checkpoint import Checkpoint
from moepack.encodings import encoding
from moepack.quantise import dequantise_expert, quantise_expert
from moepack.segments import Bits


class Dequantised:
    """In the model's dtype: what its float engine then computes with."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint = checkpoint
        self.encoding = encoding(name)

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        weights = self.checkpoint.expert(layer, expert)
        dtype = self.checkpoint.spec.dtype
        quantised = quantise_expert(weights, self.encoding, dtype, "expert")
        exact = dequantise_expert(quantised, self.encoding)
        return {
            name: _bits(exact[name], dtype) if name in exact else bits
            for name, bits in weights.items()
        }

    def trunk_tensor(self, name: str) -> Bits:
        return self.checkpoint.trunk_tensor(name)


def _bits(values: npt.NDArray[np.float32], dtype: str) -> Bits:
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH_DTYPE[dtype])
    return rounded.view(torch.uint8).numpy().view({4: np.uint32, 2: np.uint16}[rounded.itemsize])
