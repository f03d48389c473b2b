"""Asking for the next layer's experts while this one runs, as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from moepack.model_spec import ModelSpec
from moepack.plan import Placement
from moepack_runtime.ahead import Guess
from moepack_runtime.experts import ExpertMemory
from moepack_runtime.predict import Predictor, RecordablePredictor

#: From the residual stream [1, hidden] after a layer's attention to the ids of the experts that the
#: next one will probably need, int64 [1, experts].
Ranking = Callable[[torch.Tensor], torch.Tensor]


class LookAhead:
    """Has the experts of every layer guessed while the one before it runs, and fetched.

    For one token the plan's depth is looked at. For a prompt it is what all of its tokens guess, to
    the number of experts that each uses, in the order in which they will be computed.
    """

    def __init__(
        self, spec: ModelSpec, placement: Placement, memory: ExpertMemory, predictor: Predictor
    ) -> None:
        self._spec = spec
        self._memory = memory
        self._predictor = predictor
        self._staging = placement.staging_experts
        numbers = spec.moe_layers
        self._following = dict(zip(numbers, (*numbers[1:], numbers[0]), strict=True))
        self._places = {
            place.layer: place
            for place in placement.layers
            if place.prefetch != "off" and not memory.is_resident(place.layer)
        }

    def looks_from(self, number: int) -> bool:
        """Whether anything is to be guessed while a layer runs."""
        return self._following[number] in self._places

    def recordable(self) -> Mapping[int, Ranking]:
        """What may be recorded for one token: by the number of the layer that runs meanwhile."""
        predictor = self._predictor
        if not isinstance(predictor, RecordablePredictor):
            return {}
        return {
            number: partial(predictor.rank, target, depth=self._places[target].prefetch_depth)
            for number, target in self._following.items()
            if target in self._places
        }

    def look(
        self,
        number: int,
        residuals: Sequence[torch.Tensor],
        ranking: Sequence[int] | None = None,
    ) -> None:
        """Guess and ask while the layer ``number`` runs.

        Parameters
        ----------
        residuals
            The residual stream after this layer's attention, [tokens, hidden] of every block.
        ranking
            Of one token, where it has been guessed already.
        """
        target = self._following[number]
        place = self._places[target]
        if target <= number:
            residuals = [residuals[-1][-1:]]  # a new token is guessed from the one before it
        if len(residuals) == 1 and len(residuals[0]) == 1:
            if ranking is None:
                ranked = self._predictor.rank(target, residuals[0], place.prefetch_depth)
                ranking = ranked[0].tolist()
            guess = Guess(ranking, place.prefetch, self._staging, frozenset(ranking))
        else:
            # One frame stays for what nobody has guessed: experts are computed in their order.
            guess = Guess(self._union(target, residuals), place.prefetch, self._staging - 1, None)
        self._memory.guess(target, guess)

    def _union(self, target: int, residuals: Sequence[torch.Tensor]) -> list[int]:
        moe = self._spec.moe(target)
        named = torch.zeros(moe.num_experts, dtype=torch.bool, device=residuals[0].device)
        for residual in residuals:
            named[self._predictor.rank(target, residual, moe.top_k).flatten()] = True
        found: list[int] = named.nonzero().flatten().tolist()
        return found
