"""What transfers have in common whose segments wait in a queue for one of a few threads."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from time import perf_counter

import torch
from typing_extensions import override

from moepack.errors import TransferError
from moepack.segments import SegmentId
from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer

#: A link that finishes nothing for so long is taken for dead.
STALL_S = 60.0

# In which that is waited for: a step in which the process was stopped (Ctrl-Z) counts as one.
_STEPS = 8


class Lane:
    """A queue with carriers of its own."""

    __slots__ = ("demands", "last_end_s", "prefetches", "tokens")

    def __init__(self) -> None:
        self.demands: deque[QueuedTicket] = deque()
        self.prefetches: deque[QueuedTicket] = deque()
        self.tokens: SimpleQueue[None] = SimpleQueue()
        self.last_end_s = perf_counter()

    def push(self, ticket: QueuedTicket) -> None:
        """Queue a ticket, and wake a carrier."""
        if ticket.priority is Priority.DEMAND:
            self.demands.append(ticket)
        else:
            self.prefetches.append(ticket)
        self.tokens.put(None)

    def remove(self, ticket: QueuedTicket) -> bool:
        """Take a ticket out of the queue; False where a carrier has it."""
        queue = self.demands if ticket.priority is Priority.DEMAND else self.prefetches
        try:
            queue.remove(ticket)
        except ValueError:
            return False
        return True


class QueuedTicket(Ticket):
    """A segment in the queue, in a carrier's hands, or there.

    Attributes
    ----------
    destination : torch.Tensor or None
        Held until the segment has been carried: memory that may still be written into is never
        freed.
    unwanted : bool
        A carrier that can break off does.
    """

    __slots__ = (
        "arrived",
        "cancelled",
        "destination",
        "done",
        "error",
        "lane",
        "priority",
        "unwanted",
    )

    def __init__(
        self,
        lane: Lane,
        segment: SegmentId,
        stored_bytes: int,
        destination: torch.Tensor,
        priority: Priority,
    ) -> None:
        super().__init__(segment, stored_bytes)
        self.lane = lane
        self.destination: torch.Tensor | None = destination
        self.priority = priority
        self.cancelled = False
        self.done = False
        self.unwanted = False
        self.error: BaseException | None = None
        self.arrived = threading.Lock()  # held until it is done
        self.arrived.acquire()


#: Brings one segment to its destination, in a carrier's thread; what it raises, ``wait`` raises.
Carry = Callable[[QueuedTicket], None]


class QueuedTransfer(Transfer):
    """Segments in a queue, and threads (*carriers*) that each take the most urgent one.

    What a transfer costs the computing thread is mostly the interpreter's lock and the waking of
    threads, so there is as little Python as possible between the two sides, and no lock around it:
    each step is one call into C, which no other thread sees half done.

    - The queue is two deques, and being in one *is* being queued: whoever removes a ticket
      (a carrier, cancelling, closing, promotion) is the only one to have it.
    - A ticket goes into its deque before a token goes into ``tokens``, on which idle carriers
      sleep. So there are never fewer tokens than tickets; a token whose ticket was cancelled
      sends its carrier back to sleep.
    - A ticket's own lock is held until it is done: the consumer sleeps on that.
    - Carriers write down what they have finished; the consumer adds it up when it starts more or
      asks for statistics.

    Where segments come by ways that do not hold each other up, each way is a *lane*: a queue and
    carriers of its own.

    ``wait`` may be called from any thread, everything else from one thread alone. A carrier that
    is stuck (in a read from a dead network mount) cannot be interrupted. When a lane has finished
    nothing for ``stall_s`` seconds ``wait`` raises; the memory under that ticket is kept, and
    ``close`` waits for the carriers as long again before it gives them up: their threads are
    daemons and do not keep the process alive.

    Parameters
    ----------
    carriers
        Of each lane: how many of its segments are in flight at once.
    name
        Of the threads.
    stall_s
        Seconds without a finished segment after which a wait gives up.
    """

    #: What carriers do, and what is to blame when they do not: for the message.
    _task = "read"
    _suspect = "the disk (or the network) that holds the model"

    def __init__(self, carriers: Sequence[int], name: str, stall_s: float) -> None:
        self._stall_s = stall_s
        self._lanes = [Lane() for _ in carriers]
        self._finished: deque[QueuedTicket] = deque()
        self._closed = False
        # The consumer's books: what it has not yet found finished, and since when it was so.
        self._outstanding = 0
        self._busy_since_s = 0.0
        self._busy_until_s = 0.0
        self._bytes = 0
        self._count = 0
        self._busy_s = 0.0
        self._carriers = [
            threading.Thread(
                target=self._serve,
                args=(lane, number),
                name=f"moepack-{name}-{lane}-{number}",
                daemon=True,
            )
            for lane, count in enumerate(carriers)
            for number in range(count)
        ]
        for carrier in self._carriers:
            carrier.start()

    @abstractmethod
    def _carrier(self, lane: int, number: int) -> Carry:
        """What carrier ``number`` of a lane does with a ticket. Called once, in its thread."""

    @abstractmethod
    def _release(self) -> None:
        """Close what the transfer was made from; the carriers have ended, or were given up."""

    def _enqueue(self, ticket: QueuedTicket) -> None:
        """Hand a new ticket to the carriers."""
        self._enter(ticket)
        ticket.lane.push(ticket)

    def _enter(self, ticket: QueuedTicket) -> None:
        """One segment more is outstanding."""
        if self._closed:
            raise TransferError(f"{ticket.segment}: the transfer is closed; open the engine again")
        self._settle()
        if self._outstanding == 0:
            self._busy_since_s = perf_counter()
        self._outstanding += 1

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, QueuedTicket)
        if not ticket.done:
            self._sleep_on(ticket)
        if ticket.error is not None:
            raise ticket.error

    def _sleep_on(self, ticket: QueuedTicket) -> None:
        assert not ticket.cancelled, f"{ticket.segment}: waiting for a cancelled one"
        if ticket.priority is not Priority.DEMAND and ticket.lane.remove(ticket):
            ticket.priority = Priority.DEMAND
            ticket.lane.push(ticket)
            if self._closed and ticket.lane.remove(ticket):  # closed meanwhile, in another thread
                self._drop(ticket)
        # Something else may have arrived meanwhile: this times the link, not this segment.
        silent, last_end_s = 0, ticket.lane.last_end_s
        while not ticket.arrived.acquire(timeout=self._stall_s / _STEPS):
            silent = silent + 1 if ticket.lane.last_end_s == last_end_s else 0
            last_end_s = ticket.lane.last_end_s
            if silent == _STEPS:
                raise self._stalled(ticket)
        ticket.arrived.release()  # for whoever else waits

    def _stalled(self, ticket: QueuedTicket) -> TransferError:
        return TransferError(
            f"{ticket.segment}: no {self._task} has finished for {self._stall_s:g} s; check "
            f"{self._suspect}"
        )

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, QueuedTicket)
        return ticket.done

    @override
    def cancel(self, ticket: Ticket) -> bool:
        assert isinstance(ticket, QueuedTicket)
        if ticket.done or not ticket.lane.remove(ticket):
            return ticket.cancelled
        ticket.cancelled = True
        ticket.destination = None
        self._settle()
        self._leave(perf_counter())
        return True

    @override
    def break_off(self, ticket: Ticket) -> None:
        assert isinstance(ticket, QueuedTicket)
        ticket.unwanted = True

    def _settle(self) -> None:
        """Add up what has finished."""
        finished = self._finished
        while finished:
            ticket = finished.popleft()
            if ticket.error is None:
                self._bytes += ticket.crossed_bytes
                self._count += 1
            self._leave(ticket.end_s)

    def _leave(self, now_s: float) -> None:
        """One segment fewer is outstanding."""
        self._busy_until_s = max(self._busy_until_s, now_s)
        self._outstanding -= 1
        if self._outstanding == 0:
            self._busy_s += self._busy_until_s - self._busy_since_s

    @property
    @override
    def statistics(self) -> LinkStatistics:
        self._settle()
        since_s = perf_counter() - self._busy_since_s if self._outstanding else 0.0
        return LinkStatistics(self._bytes, self._count, self._busy_s + since_s)

    def _serve(self, lane_number: int, number: int) -> None:
        """A carrier: takes the most urgent ticket of its lane until the transfer is closed."""
        carry = self._carrier(lane_number, number)
        lane = self._lanes[lane_number]
        next_token, demands, prefetches = lane.tokens.get, lane.demands, lane.prefetches
        while True:
            next_token()
            try:
                ticket = demands.popleft()
            except IndexError:
                try:
                    ticket = prefetches.popleft()
                except IndexError:
                    if self._closed:
                        return
                    continue
            ticket.begin_s = perf_counter()
            try:
                carry(ticket)
            except BaseException as failure:  # noqa: BLE001 raised where it is waited for
                ticket.error = failure
            ticket.end_s = lane.last_end_s = perf_counter()
            ticket.destination = None
            self._finished.append(ticket)
            ticket.done = True
            ticket.arrived.release()
            del ticket

    @override
    def close(self) -> None:
        self._closed = True
        for lane in self._lanes:
            for queue in (lane.demands, lane.prefetches):
                while queue:
                    try:
                        self._drop(queue.popleft())
                    except IndexError:  # a carrier was faster
                        break
            for _ in self._carriers:
                lane.tokens.put(None)
        silent = 0
        for carrier in self._carriers:
            while carrier.is_alive() and silent < _STEPS:
                carrier.join(self._stall_s / _STEPS)
                silent += carrier.is_alive()
        self._release()

    def _drop(self, ticket: QueuedTicket) -> None:
        ticket.error = TransferError(f"{ticket.segment}: the transfer was closed")
        ticket.destination = None
        ticket.end_s = perf_counter()
        self._finished.append(ticket)
        ticket.done = True
        ticket.arrived.release()
