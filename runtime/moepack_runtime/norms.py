"""The norms, in float32 inside and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moepack.model_spec import Norm
from moepack_runtime.parts import is_in_parts, parts
from moepack_runtime.weights import Weights

NormFunction = Callable[[torch.Tensor], torch.Tensor]


def rms_norm(weight: torch.Tensor, eps: float) -> NormFunction:
    """Root-mean-square norm over the last dimension, ``weight.shape[0]`` wide."""
    shape = (weight.shape[0],)

    def apply(x: torch.Tensor) -> torch.Tensor:
        if is_in_parts(x):
            return _rms_norm_in_parts(x, weight, eps)
        if x.dtype == weight.dtype:
            return F.rms_norm(x, shape, weight, eps)
        # Norms that are stored in float32 (GPT-OSS) scale before the rounding, too.
        return F.rms_norm(x.float(), shape, weight.float(), eps).to(x.dtype)

    return apply


def _rms_norm_in_parts(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The steps of ``F.rms_norm`` on a processor, to the same bits."""
    normed = torch.empty(x.shape, dtype=x.dtype)
    scale = weight.float()
    for rows, exact, squares in parts(x):
        torch.pow(exact, 2, out=squares)
        factors = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed[rows] = exact.mul_(factors).mul_(scale)
    return normed


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
