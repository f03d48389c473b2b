"""Queues, priorities and failures of the readers, with reads held up at a gate."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
from moepack_runtime.transfer import HostTransfer, Priority, Ticket

from moepack.errors import TransferError
from tests.link.support import STORED_BYTES, FileStore, PatternStore, content, segment


class Gate:
    """A transfer with one reader that reads nothing until the gate is opened."""

    def __init__(self, *, stall_s: float = 30.0) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        self.store = PatternStore(self._pass)
        self.transfer = HostTransfer(self.store, readers=1, stall_s=stall_s)
        self.places: dict[int, torch.Tensor] = {}

    def _pass(self, _: object) -> None:
        self.entered.set()
        self.opened.wait(30.0)

    def start(self, number: int, priority: Priority = Priority.DEMAND) -> Ticket:
        self.places[number] = self.transfer.allocate(STORED_BYTES)
        return self.transfer.start(segment(number), self.places[number], priority)

    def start_and_enter(self, number: int) -> Ticket:
        """Start one, and see the reader take it up."""
        ticket = self.start(number)
        assert self.entered.wait(30.0)
        return ticket


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()
    gate.transfer.close()


def test_demands_go_before_prefetches_and_equals_in_their_order(gate: Gate) -> None:
    tickets = [gate.start_and_enter(0)]
    tickets += [gate.start(n, Priority.PREFETCH) for n in (1, 2)]
    tickets += [gate.start(n) for n in (3, 4)]
    gate.opened.set()
    for ticket in tickets:
        gate.transfer.wait(ticket)
    assert gate.store.read == [0, 3, 4, 1, 2]


def test_a_prefetch_that_is_waited_for_is_a_demand(gate: Gate) -> None:
    gate.start_and_enter(0)
    tickets = [gate.start(n, Priority.PREFETCH) for n in (1, 2, 3)]
    threading.Timer(0.05, gate.opened.set).start()
    gate.transfer.wait(tickets[2])
    for ticket in tickets:
        gate.transfer.wait(ticket)
    assert gate.store.read == [0, 3, 1, 2]
    assert gate.transfer.statistics.reads == 4


def test_what_is_queued_can_be_cancelled_and_what_is_being_read_cannot(gate: Gate) -> None:
    reading = gate.start_and_enter(0)
    queued = gate.start(1, Priority.PREFETCH)
    last = gate.start(2)
    assert not gate.transfer.cancel(reading)
    assert gate.transfer.cancel(queued)
    assert gate.transfer.cancel(queued)
    gate.opened.set()
    gate.transfer.wait(reading)
    gate.transfer.wait(last)
    assert not gate.transfer.cancel(last)
    assert gate.store.read == [0, 2]
    assert not gate.places[1].any()
    assert gate.transfer.statistics.bytes == 2 * STORED_BYTES
    with pytest.raises(AssertionError, match="waiting for a cancelled one"):
        gate.transfer.wait(queued)


def test_starting_does_not_wait_for_the_disk(gate: Gate) -> None:
    gate.start_and_enter(0)
    for number in range(1, 200):
        gate.start(number)
    assert not gate.opened.is_set()
    assert gate.store.read == [0]


def test_ready_means_that_waiting_would_not_wait(gate: Gate) -> None:
    ticket = gate.start_and_enter(0)
    assert not gate.transfer.is_ready(ticket)
    gate.opened.set()
    gate.transfer.wait(ticket)
    assert gate.transfer.is_ready(ticket)


def test_closing_sees_the_read_in_flight_through_and_drops_the_rest(gate: Gate) -> None:
    reading = gate.start_and_enter(0)
    queued = [gate.start(n) for n in (1, 2, 3)]
    threading.Timer(0.05, gate.opened.set).start()
    gate.transfer.close()
    gate.transfer.wait(reading)
    assert (gate.places[0].numpy() == content(0)).all()
    for ticket in queued:
        with pytest.raises(TransferError, match="the transfer was closed"):
            gate.transfer.wait(ticket)
    assert gate.store.read == [0]
    assert gate.store.closed
    assert not any(reader.is_alive() for reader in gate.transfer._carriers)


def test_closing_wakes_whoever_waits_elsewhere(gate: Gate) -> None:
    gate.start_and_enter(0)
    queued = gate.start(1)
    raised: list[Exception] = []

    def consume() -> None:
        try:
            gate.transfer.wait(queued)
        except TransferError as failure:
            raised.append(failure)

    consumer = threading.Thread(target=consume)
    consumer.start()
    sleep(0.02)
    threading.Timer(0.05, gate.opened.set).start()
    gate.transfer.close()
    consumer.join(10.0)
    assert not consumer.is_alive()
    assert len(raised) == 1


def test_a_dead_disk_is_named_and_does_not_hold_up_the_end() -> None:
    gate = Gate(stall_s=0.1)
    try:
        ticket = gate.start_and_enter(0)
        with pytest.raises(TransferError, match=r"expert 0, top .* no read has finished for 0.1 s"):
            gate.transfer.wait(ticket)
        begin_s = perf_counter()
        gate.transfer.close()
        assert perf_counter() - begin_s < 5.0
        # The memory under the read is still held: the kernel may write there.
        assert ticket.destination.data_ptr() == gate.places[0].data_ptr()  # type: ignore[attr-defined]
    finally:
        gate.opened.set()


def test_a_long_queue_on_a_slow_disk_is_not_a_dead_disk() -> None:
    store = PatternStore(lambda _: sleep(0.05))
    with HostTransfer(store, readers=1, stall_s=0.4) as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(12)]
        tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
        transfer.wait(tickets[-1])


#: Reads for a quarter of a second, in which it may be stopped for longer than a dead disk takes.
STOPPED = """
from time import sleep
from moepack_runtime.transfer import HostTransfer
from tests.link.support import STORED_BYTES, PatternStore, segment

def read(_):
    print("reading", flush=True)
    for _ in range(25):
        sleep(0.01)

transfer = HostTransfer(PatternStore(read), readers=1, stall_s=0.8)
transfer.wait(transfer.start(segment(0), transfer.allocate(STORED_BYTES)))
transfer.close()
"""


def test_a_process_that_was_stopped_does_not_take_its_disk_for_dead() -> None:
    """As by Ctrl-Z."""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, env=paths)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        sleep(1.2)
        child.send_signal(signal.SIGCONT)
        assert child.wait() == 0


def test_ctrl_c_while_waiting_leaves_a_transfer_that_closes(
    gate: Gate, interruptible: None
) -> None:
    ticket = gate.start_and_enter(0)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        gate.transfer.wait(ticket)
    gate.opened.set()
    gate.transfer.close()
    assert not any(reader.is_alive() for reader in gate.transfer._carriers)


def test_busy_time_is_the_time_with_something_outstanding(gate: Gate) -> None:
    begin_s = perf_counter()
    tickets = [gate.start_and_enter(0), gate.start(1)]
    sleep(0.05)
    half_way_s = gate.transfer.statistics.busy_s
    assert 0.05 <= half_way_s <= perf_counter() - begin_s
    gate.opened.set()
    for ticket in tickets:
        gate.transfer.wait(ticket)
    end_s = perf_counter() - begin_s
    busy_s = gate.transfer.statistics.busy_s
    assert half_way_s <= busy_s <= end_s
    sleep(0.05)
    assert gate.transfer.statistics.busy_s == busy_s
    gate.transfer.wait(gate.start(2))
    assert busy_s < gate.transfer.statistics.busy_s < busy_s + 0.05


def test_readers_read_at_once() -> None:
    together = threading.Barrier(3, timeout=10.0)
    with HostTransfer(PatternStore(lambda _: together.wait()), readers=3) as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(3)]
        for ticket in [transfer.start(segment(n), place) for n, place in enumerate(places)]:
            transfer.wait(ticket)


def test_a_ticket_tells_when_a_reader_had_it(gate: Gate) -> None:
    asked_s = perf_counter()
    tickets = [gate.start_and_enter(0), gate.start(1)]
    sleep(0.02)
    gate.opened.set()
    for ticket in tickets:
        gate.transfer.wait(ticket)
    first, second = tickets
    assert asked_s < first.begin_s < first.end_s <= second.begin_s < second.end_s < perf_counter()
    assert first.end_s - first.begin_s >= 0.02


def test_cancelled_segments_are_not_outstanding(gate: Gate) -> None:
    reading = gate.start_and_enter(0)
    queued = [gate.start(n, Priority.PREFETCH) for n in (1, 2)]
    gate.opened.set()
    gate.transfer.wait(reading)
    for ticket in queued:
        if not gate.transfer.cancel(ticket):
            gate.transfer.wait(ticket)
    busy_s = gate.transfer.statistics.busy_s
    sleep(0.02)
    assert gate.transfer.statistics.busy_s == busy_s


def test_no_ticket_is_lost_among_starting_cancelling_and_waiting() -> None:
    """An idle reader that misses a ticket would make a wait end in a stall."""
    chance = random.Random(3)
    with HostTransfer(PatternStore(), readers=3, stall_s=20.0) as transfer:
        places = list(transfer.allocate(8 * STORED_BYTES).chunk(8))
        for _ in range(1500):
            numbers = chance.sample(range(1000), chance.randint(1, 8))
            tickets = [
                (n, place, transfer.start(segment(n), place, chance.choice(list(Priority))))
                for n, place in zip(numbers, places, strict=False)
            ]
            chance.shuffle(tickets)
            for number, place, ticket in tickets:
                if chance.random() < 0.5 and transfer.cancel(ticket):
                    continue
                transfer.wait(ticket)
                assert (place.numpy() == content(number)).all()
        reads = transfer.statistics.reads
        transfer.wait(transfer.start(segment(0), places[0]))
        assert transfer.statistics.reads == reads + 1


def test_every_reader_sleeps_again_after_cancelled_tickets() -> None:
    with HostTransfer(PatternStore(), readers=4) as transfer:
        place = transfer.allocate(STORED_BYTES)
        for _ in range(200):
            ticket = transfer.start(segment(1), place, Priority.PREFETCH)
            if not transfer.cancel(ticket):
                transfer.wait(ticket)
        before_s = time_of_threads()
        sleep(0.1)
        assert time_of_threads() - before_s < 0.05


def time_of_threads() -> float:
    times = os.times()
    return times.user + times.system


def test_a_file_that_shrinks_or_vanishes_while_open(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "segments", 8)
    with HostTransfer(store) as transfer:
        places = list(transfer.allocate(2 * STORED_BYTES).chunk(2))
        os.truncate(tmp_path / "segments", 4 * STORED_BYTES + 4096)
        short = transfer.start(segment(4), places[0])
        whole = transfer.start(segment(3), places[1])
        with pytest.raises(TransferError, match=r"the file ends early: .* got 4096; check it"):
            transfer.wait(short)
        transfer.wait(whole)
        assert (places[1].numpy() == content(3)).all()
        (tmp_path / "segments").unlink()
        transfer.wait(transfer.start(segment(2), places[1]))
        assert (places[1].numpy() == content(2)).all()


def test_a_disk_that_was_taken_away_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_descriptor: int, _buffers: object, _offset: int) -> int:
        raise OSError(19, os.strerror(19))

    store = FileStore(tmp_path / "segments", 8)
    with HostTransfer(store) as transfer:
        place = transfer.allocate(STORED_BYTES)
        monkeypatch.setattr(os, "preadv", gone)
        ticket = transfer.start(segment(1), place)
        with pytest.raises(TransferError, match="No such device while reading 8192 bytes"):
            transfer.wait(ticket)
        monkeypatch.undo()
        transfer.wait(transfer.start(segment(1), place))
        assert (place.numpy() == content(1)).all()
