"""The contract of every transfer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import NamedTuple, Self

import torch

from moepack.segments import SegmentId


class Priority(IntEnum):
    """Who goes first where several segments are queued; equals go in the order of their start."""

    DEMAND = 0  # the layer in execution needs it
    PREFETCH = 1  # a later layer may need it


class LinkStatistics(NamedTuple):
    """What went over the link since it was opened.

    Attributes
    ----------
    bytes : int
        Of the segments that arrived, padding included, and of what was broken off.
    reads : int
        How many arrived.
    busy_s : float
        Time during which at least one segment was outstanding.
    """

    bytes: int
    reads: int
    busy_s: float


class Ticket:
    """A segment on its way. Each twin hands out its own kind and accepts no other.

    Attributes
    ----------
    segment : SegmentId
    stored_bytes : int
        What it takes on the link.
    crossed_bytes : int
        The same, or less where it was broken off: known once it has been waited for.
    begin_s, end_s : float
        When the link began and ended with it, on the clock of ``time.perf_counter``. Set once it
        has been waited for.
    """

    __slots__ = ("begin_s", "crossed_bytes", "end_s", "segment", "stored_bytes")

    def __init__(self, segment: SegmentId, stored_bytes: int) -> None:
        self.segment = segment
        self.stored_bytes = stored_bytes
        self.crossed_bytes = stored_bytes
        self.begin_s = 0.0
        self.end_s = 0.0


class Transfer(ABC):
    """Fills memory of the fast tier with segments, while the caller computes.

    One thread, the consumer, calls everything. The contract:

    - :meth:`start` never waits for the link. From then until :meth:`wait` returns (or
      :meth:`cancel` returns True) the destination belongs to the transfer: nobody else reads or
      writes it, and no second segment is started into it.
    - Segments complete in any order, whatever their priority.
    - :meth:`wait` raises what went wrong on the way. The bytes in the destination are then
      unknown; the transfer stays usable.
    - Ctrl-C during :meth:`wait` leaves a transfer that can be closed.
    - After :meth:`close` nothing hangs: every later start or wait raises, and no thread writes
      into a destination any more, except where a read was stuck in the kernel and close gave up
      on it (see :class:`~moepack_runtime.transfer.queued.QueuedTransfer`).
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Memory of the fast tier that this transfer fills fastest.

        Returns
        -------
        torch.Tensor
            uint8 [size_bytes], aligned to 4 KiB or better (in VRAM: 512 bytes), contents
            unspecified.

        Raises
        ------
        OutOfMemoryError
            When there is no more.
        """

    @abstractmethod
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        """Ask for a segment and return at once.

        Parameters
        ----------
        destination
            uint8, from :meth:`allocate`, at a multiple of 4 KiB inside it, of at least the stored
            bytes of the segment, which are what is written; the rest stays as it is.

        Raises
        ------
        TransferError
            After :meth:`close`.
        """

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """Return when the segment can be read. Waiting again for what has arrived returns at once.

        A queued prefetch that is waited for is a demand from then on. A cancelled ticket must not
        be waited for.

        Raises
        ------
        TransferError
            When the segment did not arrive.
        DamagedSegmentError
            When it arrived damaged.
        """

    @abstractmethod
    def is_ready(self, ticket: Ticket) -> bool:
        """Whether :meth:`wait` would return, or raise, without waiting.

        False may also mean that it is not known: only waiting brings a segment for certain.
        """

    @abstractmethod
    def cancel(self, ticket: Ticket) -> bool:
        """Take a segment back that is still queued.

        Returns
        -------
        bool
            True: it will not come, and the destination is the caller's again. False: it is on its
            way (or there), and has to be waited for before the destination is used again.
        """

    def break_off(self, ticket: Ticket) -> None:  # noqa: B027 not every link can
        """Say that nobody needs a segment that could not be cancelled.

        What of it has not crossed the link may stay behind. It is waited for all the same before
        the destination is used again, and then contains anything.
        """

    @property
    @abstractmethod
    def statistics(self) -> LinkStatistics:
        """What went over the link so far."""

    @abstractmethod
    def close(self) -> None:
        """Drop what is queued, see what is in flight through, free the link.

        Closes what the transfer was made from: its inner transfer, its store. Closing twice does
        nothing.
        """
