"""The twin that engines are tested against has to be hostile itself."""

from __future__ import annotations

from time import sleep

import numpy as np
import pytest
import torch
from moepack_runtime.transfer import HostileTransfer, HostTransfer

from tests.link.support import STORED_BYTES, PatternStore, content, segment


def make(seed: int = 0, *, max_delay_s: float = 1e-3) -> HostileTransfer:
    return HostileTransfer(HostTransfer(PatternStore()), seed, max_delay_s=max_delay_s)


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
        with make(seed, max_delay_s=0.02) as transfer:
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
