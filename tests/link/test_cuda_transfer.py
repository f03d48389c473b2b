"""What can be tried of the CUDA twin without a GPU; the rest is in the contract, marked gpu."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, sleep
from typing import cast

import pytest
import torch
from moepack_runtime.store import SegmentStore
from moepack_runtime.transfer import CudaTransfer, HostTransfer, Priority, Ticket
from moepack_runtime.transfer.cuda import copy_to_device
from moepack_runtime.transfer.pinned import PinnedSegments

from moepack.errors import DeviceError, OutOfMemoryError, TransferError
from moepack.ram_tier import COPIES_AHEAD
from moepack.segments import SegmentId
from tests.link import test_transfer_contract as contract
from tests.link.fake_cuda import FakeDevice, FakeEvent, FakeStream
from tests.link.support import STORED_BYTES, PatternStore, content, segment

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def pin(store: SegmentStore, held: Iterable[int], *, bounces: int = 0) -> PinnedSegments:
    sizes = {segment(number): STORED_BYTES for number in held}
    return PinnedSegments(HostTransfer(store), sizes, bounces=bounces, bounce_bytes=STORED_BYTES)


def fail(segment_id: SegmentId) -> None:
    if segment_id == segment(1):
        raise TransferError(f"{segment_id}: broken")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_named_error_and_closes_what_was_handed_over() -> None:
    store = PatternStore()
    with pytest.raises(DeviceError, match="no CUDA device that torch can use"):
        pin(store, [0])
    assert store.closed


def test_pinned_segments_hold_their_bytes_until_they_are_closed(device: FakeDevice) -> None:
    store = PatternStore()
    pinned = pin(store, range(2), bounces=3)
    for number in range(2):
        assert (pinned.segments[segment(number)].numpy() == content(number)).all()
    assert list(device.runtime.pinned.values()) == [5 * STORED_BYTES]
    assert pinned.size_bytes == 5 * STORED_BYTES
    assert not store.closed
    pinned.close()
    pinned.close()
    assert not device.runtime.pinned
    assert store.closed


def test_memory_that_cannot_be_pinned_is_a_named_error(device: FakeDevice) -> None:
    device.runtime.result = 2
    with pytest.raises(OutOfMemoryError, match=r"CUDA refused to pin 16\.00 KiB"):
        pin(PatternStore(), range(2))


def test_a_segment_that_cannot_be_read_leaves_nothing_pinned(device: FakeDevice) -> None:
    with pytest.raises(TransferError, match="broken"):
        pin(PatternStore(fail), range(2))
    assert not device.runtime.pinned


class Link:
    """A transfer whose copies, and whose consumer, a test holds up."""

    def __init__(self, *, bounces: int = 0, held: int = 20, stall_s: float = 30.0) -> None:
        self.store = PatternStore()
        pinned = pin(self.store, range(held), bounces=bounces)
        self.transfer = CudaTransfer(pinned, CPU, stall_s=stall_s)
        self.places: dict[int, torch.Tensor] = {}

    def start(self, number: int, priority: Priority = Priority.DEMAND) -> Ticket:
        self.places[number] = self.transfer.allocate(STORED_BYTES).zero_()
        return self.transfer.start(segment(number), self.places[number], priority)

    def holds(self, number: int) -> bool:
        return bool((self.places[number].numpy() == content(number)).all())


def eventually(holds: Callable[[], bool]) -> bool:
    deadline_s = perf_counter() + 10.0
    while not holds() and perf_counter() < deadline_s:
        sleep(1e-3)
    return holds()


def test_a_copy_waits_until_the_consumer_has_read_what_was_there(device: FakeDevice) -> None:
    """The copy stream is told to wait for the consumer's before the copy is handed to it."""
    link = Link()
    told = []

    def look(event: FakeEvent) -> None:
        told.append((event.stream, bool(link.places[1].any())))

    with link.transfer:
        device.copies.on_wait = look
        device.consumer.passing.clear()
        ticket = link.start(1)
        assert told == [(device.consumer, False)]
        assert not link.transfer.is_ready(ticket)
        device.consumer.passing.set()
        link.transfer.wait(ticket)
        assert link.holds(1)


def test_a_copy_is_there_when_the_device_says_so_and_not_before(device: FakeDevice) -> None:
    link = Link()
    with link.transfer:
        device.copies.passing.clear()
        ticket = link.start(1)
        assert eventually(lambda: link.holds(1))
        assert not link.transfer.is_ready(ticket)
        device.copies.passing.set()
        link.transfer.wait(ticket)
        assert link.transfer.is_ready(ticket)
        assert 0.0 < ticket.begin_s <= ticket.end_s <= perf_counter()
        assert link.transfer.statistics[:2] == (STORED_BYTES, 1)


def test_prefetches_wait_behind_two_copies_and_demands_do_not(device: FakeDevice) -> None:
    link = Link()
    with link.transfer:
        device.copies.passing.clear()
        begun = [link.start(number, Priority.PREFETCH) for number in range(COPIES_AHEAD)]
        assert all(map(link.holds, range(COPIES_AHEAD)))
        early = [link.start(number, Priority.PREFETCH) for number in (10, 11, 12)]
        demand = link.start(13)
        assert link.holds(13)
        assert not any(link.places[number].any() for number in (10, 11, 12))
        assert not any(map(link.transfer.cancel, [*begun, demand]))
        assert link.transfer.cancel(early[1])
        device.copies.passing.set()
        for ticket in (*begun, early[0], early[2], demand):
            link.transfer.wait(ticket)
        assert demand.end_s <= early[0].begin_s <= early[2].begin_s
        assert not link.places[11].any()
        assert link.transfer.statistics[:2] == (5 * STORED_BYTES, 5)


def test_events_are_recorded_again_once_nobody_asks_them(device: FakeDevice) -> None:
    """One behind the other they take three; in flight each copy has one of its own."""
    link = Link()
    with link.transfer:
        for number in range(6):
            link.transfer.wait(link.start(number))
        assert len(FakeEvent.made) == 3
        device.copies.passing.clear()
        tickets = [link.start(number) for number in range(6)]
        recorded = [event for event in FakeEvent.made if event.stream is device.copies]
        assert len(recorded) == 7, "where the first begins, and where each ends"
        device.copies.passing.set()
        for ticket in tickets:
            link.transfer.wait(ticket)
        begun = [ticket.begin_s for ticket in tickets]
        assert begun == sorted(begun)
        assert len(FakeEvent.made) == 8


def test_a_prefetch_that_is_waited_for_becomes_a_demand(device: FakeDevice) -> None:
    link = Link(stall_s=0.1)
    with link.transfer:
        device.copies.passing.clear()
        tickets = [link.start(number, Priority.PREFETCH) for number in range(5)]
        with pytest.raises(TransferError, match="no copy has finished"):
            link.transfer.wait(tickets[4])
        assert [link.places[number].any().item() for number in range(5)] == [1, 1, 0, 0, 1]
        device.copies.passing.set()
        for ticket in tickets:
            link.transfer.wait(ticket)


def test_closing_ends_the_copiers_and_unpins(device: FakeDevice) -> None:
    link = Link()
    ticket = link.start(1)
    link.transfer.wait(ticket)
    link.transfer.close()
    assert not device.runtime.pinned
    assert link.store.closed
    assert not [thread for thread in threading.enumerate() if "moepack-" in thread.name]
    with pytest.raises(TransferError, match="the transfer is closed"):
        link.start(0)


def test_a_device_that_failed_is_named_and_leaves_nothing_pinned(device: FakeDevice) -> None:
    link = Link()
    device.copies.failure = "CUDA error: unspecified launch failure\nand more"
    ticket = link.start(1)
    with pytest.raises(TransferError, match=r"expert 1, top .* \(CUDA error: unspecified launch f"):
        link.transfer.wait(ticket)
    link.transfer.close()
    assert not device.runtime.pinned
    assert link.store.closed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_missing_driver_is_named() -> None:
    memory = torch.empty(8, dtype=torch.uint8)
    stream = cast(torch.cuda.Stream, FakeStream(CPU))
    with pytest.raises(DeviceError, match=r"libcuda\.so\.1 cannot be loaded"):
        copy_to_device(memory, memory, stream)


def test_a_device_that_hangs_is_named_and_its_memory_stays_pinned(device: FakeDevice) -> None:
    link = Link(stall_s=0.1)
    device.copies.passing.clear()
    ticket = link.start(1)
    with pytest.raises(TransferError, match=r"no copy has finished for 0\.1 s; check the device"):
        link.transfer.wait(ticket)
    link.transfer.close()
    assert device.runtime.pinned
    device.copies.passing.set()


def three_tiers(store: SegmentStore) -> CudaTransfer:
    """RAM holds the first 300 segments of a thousand."""
    return CudaTransfer(pin(store, range(300), bounces=3), CPU)


def everything(store: SegmentStore) -> CudaTransfer:
    return CudaTransfer(pin(store, range(1000)), CPU)


@pytest.mark.parametrize("make", [everything, three_tiers])
def test_the_contract_holds(device: FakeDevice, make: contract.Make, tmp_path: Path) -> None:
    contract.test_a_thousand_segments_in_random_order_are_each_the_right_one(make, tmp_path)
    contract.test_waiting_again_returns_and_changes_nothing(make)
    contract.test_a_cancelled_segment_gives_its_destination_back(make)


def test_what_ram_holds_is_read_once_and_the_rest_each_time(device: FakeDevice) -> None:
    link = Link(held=2, bounces=2)
    with link.transfer:
        assert sorted(link.store.read) == [0, 1]
        for _ in range(2):
            for ticket in [link.start(number) for number in range(4)]:
                link.transfer.wait(ticket)
            assert all(map(link.holds, range(4)))
        assert sorted(link.store.read) == [0, 1, 2, 2, 3, 3]


def test_what_ram_holds_is_not_held_up_by_the_disk(device: FakeDevice) -> None:
    opened = threading.Event()
    link = Link(held=1, bounces=2)
    link.store.before_read = lambda _: opened.wait(30.0)
    with link.transfer:
        early = [link.start(number, Priority.PREFETCH) for number in range(1, 6)]
        link.transfer.wait(link.start(0))
        assert not any(map(link.transfer.is_ready, early))
        assert link.transfer.cancel(early[4])
        opened.set()
        for ticket in early[:4]:
            link.transfer.wait(ticket)
        assert all(map(link.holds, range(5)))


def test_ram_may_hold_nothing(device: FakeDevice) -> None:
    link = Link(held=0, bounces=2)
    with link.transfer:
        link.transfer.wait(link.start(5))
        assert link.holds(5)
        assert set(device.of_thread.values()) == {device.copies}


def test_a_read_that_fails_on_the_way_is_raised_where_it_is_waited_for(device: FakeDevice) -> None:
    link = Link(held=1, bounces=2)
    link.store.before_read = fail
    with link.transfer:
        tickets = [link.start(number) for number in range(3)]
        with pytest.raises(TransferError, match="broken"):
            link.transfer.wait(tickets[1])
        link.transfer.wait(tickets[2])
        link.transfer.wait(link.start(3))
        assert link.holds(2)
        assert link.holds(3)
