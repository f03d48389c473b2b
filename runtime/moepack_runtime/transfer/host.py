"""Disk to RAM, by reader threads."""

from __future__ import annotations

import torch
from typing_extensions import override

from moepack.segments import SegmentId
from moepack_runtime.direct_io import allocate
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.transfer.base import Priority, Ticket
from moepack_runtime.transfer.queued import STALL_S, Carry, QueuedTicket, QueuedTransfer

#: Reads in flight. At 1.5 MiB a read four are faster than two (1.7 against 1.3 GB/s on the disk of
#: direct_io.py); from 4 MiB on it makes next to no difference, but while one checks what it has
#: read the others keep the disk busy.
DEFAULT_READERS = 4


class HostTransfer(QueuedTransfer):
    """Reads segments from a store into RAM.

    Parameters
    ----------
    store
        Where segments come from. Closed with the transfer.
    readers
        How many reads are in flight at once.
    check
        Which segments are compared with their digests.
    stall_s
        Seconds without a finished read after which a wait gives up.
    """

    def __init__(
        self,
        store: SegmentStore,
        *,
        readers: int = DEFAULT_READERS,
        check: CheckMode = CheckMode.FIRST,
        stall_s: float = STALL_S,
    ) -> None:
        self._store = store
        self._check = check
        super().__init__([readers], "reader", stall_s)

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        return allocate(size_bytes)

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        stored_bytes = self.stored_bytes(segment)
        assert destination.nbytes >= stored_bytes, (segment, destination.nbytes, stored_bytes)
        ticket = QueuedTicket(self._lanes[0], segment, stored_bytes, destination, priority)
        self._enqueue(ticket)
        return ticket

    def stored_bytes(self, segment: SegmentId) -> int:
        """What a segment takes."""
        return self._store.shape(segment).stored_bytes

    def read(self, segment: SegmentId, destination: torch.Tensor) -> torch.Tensor:
        """Read a segment past the queue, in the calling thread: for threads of other transfers.

        Returns
        -------
        torch.Tensor
            As much of the destination as it takes.

        Raises
        ------
        TransferError, DamagedSegmentError
            When it does not arrive.
        """
        view = destination[: self.stored_bytes(segment)]
        self._store.read_into(segment, view.numpy(), self._check)
        return view

    @override
    def _carrier(self, lane: int, number: int) -> Carry:
        store, check = self._store, self._check

        def read(ticket: QueuedTicket) -> None:
            assert ticket.destination is not None
            view = ticket.destination.numpy()
            if view.nbytes > ticket.stored_bytes:
                view = view[: ticket.stored_bytes]
            ahead = ticket.priority is Priority.PREFETCH
            wanted = (lambda: not ticket.unwanted) if ahead else None
            ticket.crossed_bytes = store.read_into(ticket.segment, view, check, wanted)

        return read

    @override
    def _release(self) -> None:
        self._store.close()
