"""Which experts come next: guesses that decide what is fetched ahead, never what is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from typing_extensions import override

from moepack_runtime.model import DecoderLayer


class Predictor(Protocol):
    """Ranks the experts of a layer before its router does."""

    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
        """Guess while the layer with experts before ``target`` runs.

        Parameters
        ----------
        target : int
            The decoder's number of the layer. The first layer with experts is guessed from the
            last one, for the next token.
        residual : Tensor
            [tokens, hidden]: the residual stream after the attention of the layer that runs.
        depth : int
            How many experts are wanted, at most those of the layer.

        Returns
        -------
        Tensor
            int64 [tokens, at most depth]: the likeliest first, none twice.
        """


class RecordablePredictor(Predictor):
    """A predictor whose guess from one token a device may record once and replay.

    For each target and depth its ``rank`` of one token launches the same every time, waits for
    nothing, remembers nothing, and names just so many experts. What it is given lies where it lay
    when it was recorded. Others are asked anew for every token, as any predictor is for a prompt.
    """

    @override
    @abstractmethod
    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor: ...


class NextRouter(RecordablePredictor):
    """Asks the next layer's router now, through its norm (arXiv 2509.08342, section 3)."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = layers

    @override
    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
        layer = self._layers[target]
        return layer.rank(layer.mlp_norm(residual), depth)
