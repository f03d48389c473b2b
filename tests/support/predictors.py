"""Predictors that are wrong on purpose."""

from __future__ import annotations

from random import Random

import torch
from moepack_runtime.predict import Predictor
from typing_extensions import override


class Guesses(Predictor):
    """Any experts at all, as many as are asked for."""

    def __init__(self, experts: int, seed: int) -> None:
        self._experts = experts
        self._random = Random(seed)

    @override
    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
        everyone = range(self._experts)
        return torch.tensor([self._random.sample(everyone, depth) for _ in residual])
