"""The twin that engines are tested against has to be hostile itself."""

from __future__ import annotations

from time import sleep

import numpy as np
import pytest
import torch
from moepack_runtime.transfer import HostileTransfer, HostTransfer

from tests.link.support import STORED_BYTES, PatternStore, content, segment


def make(seed: int = 0, *, max_delay_s: float = 1e-3, shy: float = 0.25) -> HostileTransfer:
    return HostileTransfer(HostTransfer(PatternStore()), seed, max_delay_s=max_delay_s, shy=shy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_segment_is_nan_in_every_dtype_until_it_is_waited_for(dtype: torch.dtype) -> None:
    with make() as transfer:
        place = transfer.allocate(STORED_BYTES)
        assert bool(place.view(dtype).isnan().all())
        place.zero_()
        ticket = transfer.start(segment(1), place)
        sleep(0.02)  # long after the bytes are really there
        assert bool(place.view(dtype).isnan().all())
        transfer.wait(ticket)
        assert np.array_equal(place.numpy(), content(1))


def test_a_new_segment_takes_away_the_old_one() -> None:
    with make() as transfer:
        place = transfer.allocate(STORED_BYTES)
        transfer.wait(transfer.start(segment(1), place))
        ticket = transfer.start(segment(2), place)
        assert bool(place.view(torch.bfloat16).isnan().all())
        transfer.wait(ticket)
        assert np.array_equal(place.numpy(), content(2))


def test_waiting_for_one_brings_no_other() -> None:
    with make() as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(6)]
        tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
        transfer.wait(tickets[5])
        for place in places[:5]:
            assert bool(place.view(torch.float16).isnan().all())
        for ticket in tickets:
            transfer.wait(ticket)


def test_writing_to_a_destination_on_its_way_is_caught() -> None:
    with make() as transfer:
        place = transfer.allocate(STORED_BYTES)
        ticket = transfer.start(segment(1), place)
        place[100] = 0
        with pytest.raises(AssertionError, match="was written to while it was on its way"):
            transfer.wait(ticket)


def test_two_segments_into_one_destination_are_caught() -> None:
    with make() as transfer:
        place = transfer.allocate(STORED_BYTES)
        tickets = [transfer.start(segment(n), place) for n in (1, 2)]
        transfer.wait(tickets[0])
        with pytest.raises(AssertionError, match="was written to while it was on its way"):
            transfer.wait(tickets[1])


def test_segments_become_ready_in_another_order_than_they_were_started() -> None:
    orders = set()
    for seed in range(8):
        with make(seed, max_delay_s=0.02, shy=0.0) as transfer:
            places = [transfer.allocate(STORED_BYTES) for _ in range(4)]
            tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
            order: list[int] = []
            while len(order) < 4:
                order += [n for n in range(4) if n not in order and transfer.is_ready(tickets[n])]
            orders.add(tuple(order))
    assert len(orders) > 2


def test_cancelling_fails_at_times_even_for_what_is_queued() -> None:
    results = set()
    for seed in range(20):
        store = PatternStore(lambda _: sleep(0.002))
        with HostileTransfer(HostTransfer(store, readers=1), seed) as transfer:
            places = [transfer.allocate(STORED_BYTES) for _ in range(6)]
            tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
            results.add(transfer.cancel(tickets[5]))
    assert results == {True, False}


def test_some_segments_never_become_ready_unless_they_are_waited_for() -> None:
    with make(max_delay_s=0.0) as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(40)]
        tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
        sleep(0.3)  # long after all are there
        ready = [transfer.is_ready(ticket) for ticket in tickets]
        assert 0 < sum(ready) < 40
        for ticket in tickets:
            transfer.wait(ticket)
            assert transfer.is_ready(ticket)


def test_what_was_cancelled_stays_so_and_waiting_for_it_is_caught() -> None:
    store = PatternStore(lambda _: sleep(0.01))
    with HostileTransfer(HostTransfer(store, readers=1), 0) as transfer:
        places = [transfer.allocate(STORED_BYTES) for _ in range(20)]
        tickets = [transfer.start(segment(n), place) for n, place in enumerate(places)]
        cancelled = [ticket for ticket in reversed(tickets) if transfer.cancel(ticket)]
        assert 0 < len(cancelled) < 20
        assert all(map(transfer.cancel, cancelled))
        with pytest.raises(AssertionError, match="waiting for a cancelled one"):
            transfer.wait(cancelled[0])


def test_its_times_are_those_of_the_inner_transfer() -> None:
    with make(max_delay_s=0.05) as transfer:
        ticket = transfer.start(segment(1), transfer.allocate(STORED_BYTES))
        transfer.wait(ticket)
        inner = ticket.inner  # type: ignore[attr-defined]
        assert (ticket.begin_s, ticket.end_s) == (inner.begin_s, inner.end_s)
        assert 0.0 < ticket.begin_s < ticket.end_s
