"""What an engine shows of its work to whoever asks: profiling, live statistics, tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from moepack_runtime.router import Routing


class Observer(Protocol):
    """Sees what the router of each layer decides."""

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        """One block of one layer: the residual after attention [tokens, hidden], and the choice.

        The residual is overwritten afterwards; whoever keeps it copies it.
        """


class PassObserver(Protocol):
    """Sees what each pass over a layer finds in the fast tier."""

    def passed(self, layer: int, tokens: Sequence[Sequence[int]], hits: Collection[int]) -> None:
        """One pass over one layer.

        Parameters
        ----------
        tokens
            Of every token of the pass, in order, the ids of its experts.
        hits
            Those of them whose cached part (the top, or the whole expert) was resident.
        """
