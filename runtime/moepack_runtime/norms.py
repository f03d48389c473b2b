"""The norms, in float32 inside and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moepack.model_spec import Norm
from moepack_runtime.weights import Weights

NormFunction = Callable[[torch.Tensor], torch.Tensor]


def rms_norm(weight: torch.Tensor, eps: float) -> NormFunction:
    """Root-mean-square norm over the last dimension, ``weight.shape[0]`` wide."""
    shape = (weight.shape[0],)

    def apply(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == weight.dtype:
            return F.rms_norm(x, shape, weight, eps)
        # Norms that are stored in float32 (GPT-OSS) scale before the rounding, too.
        return F.rms_norm(x.float(), shape, weight.float(), eps).to(x.dtype)

    return apply


def layer_norm(weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> NormFunction:
    """Layer norm over the last dimension, ``weight.shape[0]`` wide."""
    shape = (weight.shape[0],)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, shape, weight, bias, eps)

    return apply


def read_norm(kind: Norm, weights: Weights, eps: float) -> NormFunction:
    """The norm whose ``weight`` (and ``bias``) these are."""
    if kind == "layer":
        return layer_norm(weights["weight"], weights.get("bias"), eps)
    return rms_norm(weights["weight"], eps)
