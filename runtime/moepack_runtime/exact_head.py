"""The head of a checkpoint by itself, to compare a model with that rounds its own."""

from __future__ import annotations

import numpy as np
import torch

from moepack.model_spec import ModelSpec
from moepack_runtime.checkpoint_store import ExpertSource
from moepack_runtime.model import Head
from moepack_runtime.weights import TORCH_DTYPE, Weights


def load_head(source: ExpertSource, spec: ModelSpec, device: torch.device) -> Head:
    """Final norm and head as the checkpoint has them, in memory of their own.

    Peak memory: what they take, and the larger of them once more in RAM.
    """
    tensors = {}
    for info in spec.trunk:
        if info.name.startswith(head_prefixes(spec)):
            bits = np.ascontiguousarray(source.trunk_tensor(info.name)).reshape(-1)
            flat = torch.from_numpy(bits.view(np.uint8).copy())
            tensors[info.name] = flat.view(TORCH_DTYPE[info.dtype]).view(info.shape).to(device)
    return Head(spec, Weights(tensors))


def head_prefixes(spec: ModelSpec) -> tuple[str, ...]:
    """What the names of the tensors behind the last layer begin with."""
    return ("norm.", "head.", *(("embed.",) if spec.tied_embeddings else ()))
