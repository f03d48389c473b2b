"""What the routers of a running engine decided lately, and when to plan again from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement

#: Tokens that are remembered at most: 3.1 MB for 48 layers that each choose 8 experts.
WINDOW_TOKENS = 4096


class LiveRouting(NamedTuple):
    """The routing of the last tokens.

    Attributes
    ----------
    tokens : int
        That went through the engine since it began to remember.
    ids : uint16 [T, L, K]
        Experts of the last of them, oldest first, in the layers that have experts; a layer that
        uses fewer than K has 0 in the other places.
    """

    tokens: int
    ids: npt.NDArray[np.uint16]


#: From the live routing the layers of a better placement; None where there is none.
Replan = Callable[[LiveRouting], Sequence[LayerPlacement] | None]


class RoutingWindow:
    """Remembers the experts of the last tokens, in memory that is allocated once."""

    def __init__(self, spec: ModelSpec, tokens: int = WINDOW_TOKENS) -> None:
        self._rows = {layer: row for row, layer in enumerate(spec.moe_layers)}
        widest = max(spec.moe(layer).top_k for layer in self._rows)
        self._ids = np.zeros((tokens, len(self._rows), widest), dtype=np.uint16)
        self._begun = 0

    def record(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """Note one pass over a layer: of every token the ids of its experts."""
        room, row = len(self._ids), self._rows[layer]
        last = tokens[-room:]
        place = (self._begun + len(tokens) - len(last)) % room
        behind = min(len(last), room - place)
        width = len(last[0])
        self._ids[place : place + behind, row, :width] = last[:behind]
        if behind < len(last):
            self._ids[: len(last) - behind, row, :width] = last[behind:]

    def advance(self, tokens: int) -> None:
        """So many tokens have passed all layers."""
        self._begun += tokens

    @property
    def tokens(self) -> int:
        """How many have passed."""
        return self._begun

    def routing(self) -> LiveRouting:
        """What is remembered (a copy)."""
        room = len(self._ids)
        if self._begun <= room:
            return LiveRouting(self._begun, self._ids[: self._begun].copy())
        return LiveRouting(self._begun, np.roll(self._ids, -(self._begun % room), axis=0))


class Replanning:
    """Asks for a better placement every so many tokens.

    Parameters
    ----------
    every_tokens : int
        At least one; prompts count as well.
    """

    def __init__(self, spec: ModelSpec, replan: Replan, every_tokens: int) -> None:
        if every_tokens < 1:
            raise ValueError(f"to plan again every {every_tokens} tokens; expected at least one")
        self.window = RoutingWindow(spec)
        self._replan = replan
        self._every_tokens = every_tokens
        self._due = every_tokens

    def ask(self) -> Sequence[LayerPlacement] | None:
        """The layers of a better placement, if it is time and there is one."""
        if self.window.tokens < self._due:
            return None
        self._due = self.window.tokens + self._every_tokens
        return self._replan(self.window.routing())
