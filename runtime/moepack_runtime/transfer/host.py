"""Disk to RAM, by reader threads."""

from __future__ import annotations

import heapq
import threading
from enum import Enum, auto
from time import perf_counter

import torch
from typing_extensions import override

from moepack.errors import TransferError
from moepack.segments import SegmentId
from moepack_runtime.direct_io import allocate
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer

#: Reads in flight. At 1.5 MiB a read four are faster than two (1.7 against 1.3 GB/s on the disk of
#: direct_io.py); from 4 MiB on it makes next to no difference, but while one checks what it has
#: read the others keep the disk busy.
DEFAULT_READERS = 4

#: A disk that finishes nothing for so long is taken for dead.
STALL_S = 60.0


class _State(Enum):
    QUEUED = auto()
    READING = auto()
    DONE = auto()
    CANCELLED = auto()


class _HostTicket(Ticket):
    __slots__ = ("destination", "error", "priority", "state")

    def __init__(
        self, segment: SegmentId, destination: torch.Tensor, priority: Priority, stored_bytes: int
    ) -> None:
        super().__init__(segment, stored_bytes)
        # Held until the read is over: memory that a read may still write into is never freed.
        self.destination: torch.Tensor | None = destination
        self.priority = priority
        self.state = _State.QUEUED
        self.error: BaseException | None = None


class HostTransfer(Transfer):
    """Reads segments from a store into RAM.

    ``start``, ``wait``, ``is_ready`` and ``cancel`` may be called from several threads.

    A read that is stuck in the kernel (a dead network mount) cannot be interrupted. When no read
    has finished for ``stall_s`` seconds ``wait`` raises; the memory under that read is kept, and
    ``close`` waits for the reader as long again before it gives it up: its thread is a daemon
    and does not keep the process alive.

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
        self._stall_s = stall_s
        lock = threading.Lock()
        self._queued = threading.Condition(lock)  # the readers sleep here
        self._finished = threading.Condition(lock)  # the consumer sleeps here
        self._queue: list[tuple[Priority, int, _HostTicket]] = []  # a heap, with stale entries
        self._sequence = 0
        self._closed = False
        self._outstanding = 0
        self._busy_since = 0.0
        self._statistics = LinkStatistics(0, 0, 0.0)
        self._readers = [
            threading.Thread(target=self._read, name=f"moepack-reader-{number}", daemon=True)
            for number in range(readers)
        ]
        for reader in self._readers:
            reader.start()

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
        stored_bytes = self._store.shape(segment).stored_bytes
        assert destination.nbytes >= stored_bytes, (segment, destination.nbytes, stored_bytes)
        ticket = _HostTicket(segment, destination[:stored_bytes], priority, stored_bytes)
        with self._queued:
            if self._closed:
                raise TransferError(f"{segment}: the transfer is closed; open the engine again")
            if self._outstanding == 0:
                self._busy_since = perf_counter()
            self._outstanding += 1
            self._push(ticket)
        return ticket

    def _push(self, ticket: _HostTicket) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (ticket.priority, self._sequence, ticket))
        self._queued.notify()

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _HostTicket)
        assert ticket.state is not _State.CANCELLED, (
            f"{ticket.segment}: waiting for a cancelled one"
        )
        with self._finished:
            if ticket.state is _State.QUEUED and ticket.priority is not Priority.DEMAND:
                ticket.priority = Priority.DEMAND
                self._push(ticket)  # the entry further back finds it taken
            while ticket.state is not _State.DONE:
                # Woken by every read that finishes, so this times the disk, not this segment.
                if not self._finished.wait(self._stall_s):
                    raise TransferError(
                        f"{ticket.segment}: no read has finished for {self._stall_s:g} s; "
                        "check the disk (or the network) that holds the model"
                    )
        if ticket.error is not None:
            raise ticket.error

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostTicket)
        return ticket.state is _State.DONE

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, _HostTicket)
        with self._queued:
            if ticket.state is not _State.QUEUED:
                return ticket.state is _State.CANCELLED
            ticket.state = _State.CANCELLED
            ticket.destination = None
            self._leave()
            return True

    def _leave(self) -> None:
        """One segment fewer is outstanding."""
        self._outstanding -= 1
        if self._outstanding == 0:
            busy_s = self._statistics.busy_s + perf_counter() - self._busy_since
            self._statistics = self._statistics._replace(busy_s=busy_s)

    def _read(self) -> None:
        """One reader: takes the most urgent segment until the transfer is closed."""
        while (ticket := self._take()) is not None:
            assert ticket.destination is not None
            error: BaseException | None = None
            try:
                self._store.read_into(ticket.segment, ticket.destination.numpy(), self._check)
            except BaseException as failure:  # noqa: BLE001 raised where it is waited for
                error = failure
            self._finish(ticket, error)

    def _take(self) -> _HostTicket | None:
        with self._queued:
            while True:
                while self._queue:
                    ticket = heapq.heappop(self._queue)[2]
                    if ticket.state is _State.QUEUED:
                        ticket.state = _State.READING
                        return ticket
                if self._closed:
                    return None
                self._queued.wait()

    def _finish(self, ticket: _HostTicket, error: BaseException | None) -> None:
        with self._finished:
            ticket.state = _State.DONE
            ticket.error = error
            ticket.destination = None
            if error is None:
                self._statistics = self._statistics._replace(
                    bytes=self._statistics.bytes + ticket.stored_bytes,
                    reads=self._statistics.reads + 1,
                )
            self._leave()
            self._finished.notify_all()

    @property
    @override
    def statistics(self) -> LinkStatistics:
        with self._finished:
            since_s = perf_counter() - self._busy_since if self._outstanding else 0.0
            return self._statistics._replace(busy_s=self._statistics.busy_s + since_s)

    @override
    def close(self) -> None:
        with self._queued:
            self._closed = True
            for _, _, ticket in self._queue:
                if ticket.state is _State.QUEUED:
                    ticket.state = _State.DONE
                    ticket.error = TransferError(f"{ticket.segment}: the transfer was closed")
                    ticket.destination = None
                    self._leave()
            self._queue.clear()
            self._queued.notify_all()
            self._finished.notify_all()
        deadline_s = perf_counter() + self._stall_s
        for reader in self._readers:
            reader.join(max(0.0, deadline_s - perf_counter()))
        self._store.close()
