"""What an engine shows of its work to whoever asks: profiling, live statistics, tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, Protocol

import torch

from moepack.segments import SegmentId
from moepack_runtime.router import Routing
from moepack_runtime.transfer import Ticket

#: Why a segment crossed the link: its layer asked for it once the routing was known, or it was
#: fetched ahead and then used, or not.
Purpose = Literal["demand", "ahead_used", "ahead_wasted"]


class Observer(Protocol):
    """Sees what the router of each layer decides."""

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        """One block of one layer: the residual after attention [tokens, hidden], and the choice.

        All of it is overwritten afterwards; whoever keeps something copies it.
        """


class PassFound(NamedTuple):
    """What one pass over a layer found in the fast tier, and what crossed the link for it.

    Attributes
    ----------
    hits : collection of int
        Its experts whose cached part (the top, or the whole expert) was resident.
    ready : collection of int
        Those that were whole in the fast tier when the routing was known, fetched ahead or not.
    demanded : sequence of SegmentId
        Asked for once the routing was known.
    ahead : sequence of SegmentId
        Begun before that, needed or not.
    """

    hits: Collection[int]
    ready: Collection[int]
    demanded: Sequence[SegmentId]
    ahead: Sequence[SegmentId]


class PassObserver(Protocol):
    """Sees what each pass over a layer finds in the fast tier."""

    def passed(self, layer: int, tokens: Sequence[Sequence[int]], found: PassFound) -> None:
        """One pass over one layer; ``tokens``: of every token, in order, the ids of its experts."""


class Timeline(Protocol):
    """Sees when things happen, in seconds on the clock of ``time.perf_counter``.

    Slices of computing come in order and either nest or lie apart. On a device that works by
    itself they are the times at which the processor handed the work over.
    """

    def fetched(self, ticket: Ticket, purpose: Purpose) -> None:
        """A segment has arrived, between its ticket's ``begin_s`` and ``end_s``."""

    def computed(self, what: str, layer: int, begin_s: float, end_s: float) -> None:
        """A piece of work of a layer.

        Parameters
        ----------
        what
            ``layer`` (all of it), ``attention``, ``route``, ``predict``, ``shared``, ``dense``; or
            ``head`` behind the last layer.
        """

    def segment(self, segment: SegmentId, begin_s: float, end_s: float) -> None:
        """One segment of one expert was computed with, for all tokens of the pass."""

    def waited(self, segment: SegmentId, begin_s: float, end_s: float) -> None:
        """The computing thread waited for a segment."""
