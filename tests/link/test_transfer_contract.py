"""What every twin promises, tried on every twin that the machine has."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moepack_runtime.store import SegmentStore
from moepack_runtime.transfer import Priority, Ticket, Transfer

from moepack.errors import DamagedSegmentError, TransferError
from moepack.segments import SegmentId
from tests.link.support import (
    SIZE_BYTES,
    STORED_BYTES,
    FileStore,
    PatternStore,
    content,
    cuda,
    host,
    hostile,
    hostile_throttled,
    segment,
    throttled,
)

Make = Callable[[SegmentStore], Transfer]

HOST_TWINS = [host, throttled, hostile, hostile_throttled]
ALL_TWINS = [
    *HOST_TWINS,
    pytest.param(
        cuda,
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def holds(destination: torch.Tensor, number: int) -> bool:
    return np.array_equal(destination.cpu().numpy()[:STORED_BYTES], content(number))


@pytest.mark.parametrize("make", ALL_TWINS)
def test_a_thousand_segments_in_random_order_are_each_the_right_one(
    make: Make, tmp_path: Path
) -> None:
    chance = random.Random(1)
    numbers = chance.sample(range(1000), 1000)
    with make(FileStore(tmp_path / "segments", 1000)) as transfer:
        memory = list(transfer.allocate(32 * STORED_BYTES).chunk(32))
        in_flight: list[tuple[torch.Tensor, int, Ticket]] = []
        for number in numbers:
            if not memory:
                place, old, ticket = in_flight.pop(chance.randrange(len(in_flight)))
                transfer.wait(ticket)
                assert holds(place, old)
                memory.append(place)
            place = memory.pop(chance.randrange(len(memory)))
            priority = chance.choice(list(Priority))
            in_flight.append((place, number, transfer.start(segment(number), place, priority)))
        for place, number, ticket in in_flight:
            transfer.wait(ticket)
            assert holds(place, number)
        statistics = transfer.statistics
    assert statistics.reads == 1000
    assert statistics.bytes == 1000 * STORED_BYTES
    assert statistics.busy_s > 0


@pytest.mark.parametrize("make", ALL_TWINS)
def test_memory_starts_on_a_page_and_nothing_beyond_the_segment_is_written(make: Make) -> None:
    with make(PatternStore()) as transfer:
        memory = transfer.allocate(3 * STORED_BYTES)
        memory.fill_(77)
        transfer.wait(transfer.start(segment(3), memory[STORED_BYTES:]))
        assert memory.data_ptr() % (512 if memory.is_cuda else 4096) == 0
        assert holds(memory[STORED_BYTES:], 3)
        assert bool((memory[:STORED_BYTES] == 77).all())
        assert bool((memory[2 * STORED_BYTES :] == 77).all())


@pytest.mark.parametrize("make", ALL_TWINS)
def test_waiting_again_returns_and_changes_nothing(make: Make) -> None:
    with make(PatternStore()) as transfer:
        place = transfer.allocate(STORED_BYTES)
        ticket = transfer.start(segment(5), place)
        transfer.wait(ticket)
        assert place.is_cuda or transfer.is_ready(ticket)  # a GPU is waited for by its stream alone
        place.fill_(1)
        transfer.wait(ticket)
        assert bool((place == 1).all())


@pytest.mark.parametrize("make", HOST_TWINS)
@pytest.mark.parametrize("error", [TransferError, DamagedSegmentError, ZeroDivisionError])
def test_what_went_wrong_is_raised_where_it_is_waited_for_and_nowhere_else(
    make: Make, error: type[Exception]
) -> None:
    def fail(segment_id: SegmentId) -> None:
        if segment_id == segment(1):
            raise error(f"{segment_id}: broken")

    with make(PatternStore(fail)) as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(3)]
        tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
        transfer.wait(tickets[2])
        with pytest.raises(error, match=r"layer 0, expert 1, top \(base\): broken"):
            transfer.wait(tickets[1])
        transfer.wait(tickets[0])
        assert holds(places[0], 0)
        assert holds(places[2], 2)
        again = transfer.start(segment(4), places[1])
        transfer.wait(again)
        assert holds(places[1], 4)


@pytest.mark.parametrize("make", HOST_TWINS)
def test_after_close_nothing_hangs_and_nothing_starts(make: Make) -> None:
    store = PatternStore()
    transfer = make(store)
    places = [transfer.allocate(STORED_BYTES) for _ in range(20)]
    tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
    transfer.close()
    transfer.close()
    assert store.closed
    came = 0
    for number, (place, ticket) in enumerate(zip(places, tickets, strict=True)):
        try:
            transfer.wait(ticket)
        except TransferError as failure:
            assert str(segment(number)) in str(failure)  # noqa: PT017 either is right
        else:
            came += 1
            assert holds(place, number)
    assert came == len(store.read)
    with pytest.raises(TransferError, match="the transfer is closed"):
        transfer.start(segment(0), transfer.allocate(STORED_BYTES))


@pytest.mark.parametrize("make", ALL_TWINS)
def test_a_cancelled_segment_gives_its_destination_back(make: Make) -> None:
    with make(PatternStore()) as transfer:
        chance = random.Random(2)
        places = [transfer.allocate(STORED_BYTES) for _ in range(40)]
        for begin in range(0, 40, 8):
            batch = list(enumerate(places))[begin : begin + 8]
            tickets = [transfer.start(segment(n), p, Priority.PREFETCH) for n, p in batch]
            for (number, place), ticket in chance.sample(list(zip(batch, tickets, strict=True)), 8):
                if transfer.cancel(ticket):
                    place.fill_(9)
                    transfer.wait(transfer.start(segment(number + 100), place))
                    assert holds(place, number + 100)
                else:
                    transfer.wait(ticket)
                    assert holds(place, number)


def test_stored_bytes_are_those_of_the_shape() -> None:
    with host(PatternStore()) as transfer:
        ticket = transfer.start(segment(0), transfer.allocate(STORED_BYTES))
        assert ticket.segment == segment(0)
        assert ticket.stored_bytes == STORED_BYTES > SIZE_BYTES
        transfer.wait(ticket)
