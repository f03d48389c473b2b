"""The calculated link: against arithmetic on a clock of its own, and against the real one."""

from __future__ import annotations

import math
import random
from time import perf_counter, sleep
from typing import NamedTuple

import pytest
import torch
from moepack_runtime.transfer import HostTransfer, Priority, ThrottledTransfer, Ticket

from moepack.errors import TransferError
from moepack.segments import SegmentId
from tests.link.support import STORED_BYTES, PatternStore, segment
from tests.support.simulated_time import Clock, simulated_clock

RATE_BYTES_PER_S = STORED_BYTES / 0.008
LATENCY_S = 0.002
SERVICE_S = 0.010


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return simulated_clock(monkeypatch)


@pytest.fixture
def link() -> ThrottledTransfer:
    return make(PatternStore())


def make(store: PatternStore) -> ThrottledTransfer:
    return ThrottledTransfer(HostTransfer(store), RATE_BYTES_PER_S, LATENCY_S)


def start(
    link: ThrottledTransfer, number: int, priority: Priority = Priority.DEMAND
) -> tuple[Ticket, torch.Tensor]:
    place = link.allocate(STORED_BYTES)
    return link.start(segment(number), place, priority), place


def arrival_s(link: ThrottledTransfer, ticket: Ticket, clock: Clock) -> float:
    """Wait for a segment; seconds since the clock was made, without the noise of its sums."""
    link.wait(ticket)
    return round(clock.now_s - 100.0, 9)


def becomes_ready(link: ThrottledTransfer, ticket: Ticket) -> bool:
    """Ready by the clock, once the reader of the inner transfer is too."""
    deadline_s = perf_counter() + 10.0
    while perf_counter() < deadline_s:
        if link.is_ready(ticket):
            return True
    return False


def test_segments_cross_one_after_the_other(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        tickets = [start(link, n)[0] for n in range(3)]
        assert arrival_s(link, tickets[0], clock) == SERVICE_S
        assert arrival_s(link, tickets[1], clock) == 2 * SERVICE_S
        assert arrival_s(link, tickets[2], clock) == 3 * SERVICE_S


def test_an_idle_link_starts_anew(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        assert arrival_s(link, start(link, 0)[0], clock) == SERVICE_S
        clock.now_s += 1.0
        assert arrival_s(link, start(link, 1)[0], clock) == round(1.0 + 2 * SERVICE_S, 9)


def test_computing_meanwhile_hides_the_link(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        tickets = [start(link, n)[0] for n in range(2)]
        clock.now_s += 1.5 * SERVICE_S
        assert becomes_ready(link, tickets[0])
        assert not link.is_ready(tickets[1])
        assert arrival_s(link, tickets[0], clock) == 1.5 * SERVICE_S
        assert arrival_s(link, tickets[1], clock) == 2 * SERVICE_S


def test_demands_overtake_queued_prefetches_and_not_the_one_on_the_link(
    link: ThrottledTransfer, clock: Clock
) -> None:
    with link:
        early = [start(link, n, Priority.PREFETCH)[0] for n in range(3)]
        clock.now_s += 0.5 * SERVICE_S
        demand, _ = start(link, 3)
        assert arrival_s(link, demand, clock) == 2 * SERVICE_S
        assert becomes_ready(link, early[0])
        assert not link.is_ready(early[1])
        assert arrival_s(link, early[1], clock) == 3 * SERVICE_S
        assert arrival_s(link, early[2], clock) == 4 * SERVICE_S


def test_a_prefetch_that_is_waited_for_is_a_demand(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        early = [start(link, n, Priority.PREFETCH)[0] for n in range(3)]
        clock.now_s += 0.5 * SERVICE_S
        assert arrival_s(link, early[2], clock) == 2 * SERVICE_S
        assert arrival_s(link, early[1], clock) == 3 * SERVICE_S


def test_a_prefetch_whose_turn_came_before_the_demand_goes_first(
    link: ThrottledTransfer, clock: Clock
) -> None:
    with link:
        early = [start(link, n, Priority.PREFETCH)[0] for n in range(2)]
        clock.now_s += 1.5 * SERVICE_S
        demand, _ = start(link, 3)
        assert arrival_s(link, demand, clock) == 3 * SERVICE_S
        assert becomes_ready(link, early[1])


def test_cancelling_frees_the_link(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        first, _ = start(link, 0)
        dropped, place = start(link, 1, Priority.PREFETCH)
        last, _ = start(link, 2, Priority.PREFETCH)
        clock.now_s += 0.5 * SERVICE_S
        assert not link.cancel(first)
        assert link.cancel(dropped)
        assert link.cancel(dropped)
        place.fill_(3)
        assert arrival_s(link, last, clock) == 2 * SERVICE_S
        assert bool((place == 3).all())
        assert link.statistics.reads == 2


def test_a_ticket_tells_when_the_link_had_it(link: ThrottledTransfer, clock: Clock) -> None:
    with link:
        tickets = [start(link, n)[0] for n in range(2)]
        for ticket in tickets:
            link.wait(ticket)
        times = [(round(t.begin_s - 100.0, 9), round(t.end_s - 100.0, 9)) for t in tickets]
        assert times == [(0.0, SERVICE_S), (SERVICE_S, 2 * SERVICE_S)]


class Asked(NamedTuple):
    """One segment of the simulation below: when it was asked for, and when nobody wanted it."""

    at_s: float
    priority: Priority
    unwanted_s: float = math.inf


def simulate(asked: list[Asked]) -> dict[int, float]:
    """When each segment gets the link, of those that do before nobody wants them."""
    begins: dict[int, float] = {}
    free_s = 0.0
    while True:
        left = [number for number in range(len(asked)) if number not in begins]
        turns = {number: max(free_s, asked[number].at_s) for number in left}
        left = [number for number in left if asked[number].unwanted_s > turns[number]]
        if not left:
            return begins
        turn_s = min(turns[number] for number in left)
        there = [number for number in left if turns[number] == turn_s]
        first = min(there, key=lambda number: (asked[number].priority, number))
        begins[first] = turn_s
        free_s = turn_s + SERVICE_S


@pytest.mark.parametrize("seed", range(8))
def test_the_link_goes_as_a_simulation_of_it(clock: Clock, seed: int) -> None:
    """The rules of the replay: demands first, a queued prefetch may be dropped, others finish."""
    chance = random.Random(seed)
    asked: list[Asked] = []
    tickets: list[Ticket] = []
    dropped = set()
    with make(PatternStore()) as link:
        for _ in range(150):
            clock.now_s += chance.expovariate(1.5 / SERVICE_S)
            if chance.random() < 0.6:
                priority = chance.choice(list(Priority))
                tickets.append(start(link, len(asked), priority)[0])
                asked.append(Asked(clock.now_s, priority))
            else:
                number = chance.randrange(max(0, len(asked) - 6), len(asked)) if asked else 0
                if asked and asked[number].unwanted_s == math.inf:
                    asked[number] = asked[number]._replace(unwanted_s=clock.now_s)
                    if link.cancel(tickets[number]):
                        dropped.add(number)
        expected = simulate(asked)
        assert dropped
        assert set(range(len(asked))) - dropped == expected.keys()
        for number in sorted(expected, key=lambda number: (asked[number].priority, number)):
            link.wait(tickets[number])
            assert tickets[number].begin_s == pytest.approx(expected[number], abs=1e-9)
            assert tickets[number].end_s == pytest.approx(expected[number] + SERVICE_S, abs=1e-9)


def test_statistics_are_those_of_the_calculated_link(clock: Clock) -> None:
    with make(PatternStore()) as link:
        for number in range(3):
            start(link, number)
        clock.now_s += 1.5 * SERVICE_S
        assert link.statistics.reads == 1
        assert link.statistics.bytes == STORED_BYTES
        assert link.statistics.busy_s == pytest.approx(1.5 * SERVICE_S, rel=0.2)
        clock.now_s += 8.5 * SERVICE_S
        assert link.statistics.reads == 3
        assert link.statistics.busy_s == pytest.approx(3 * SERVICE_S, rel=0.2)


def test_an_error_comes_through(link: ThrottledTransfer, clock: Clock) -> None:
    def fail(segment_id: SegmentId) -> None:
        raise TransferError(f"{segment_id}: broken")

    with make(PatternStore(fail)) as failing:
        ticket, _ = start(failing, 0)
        with pytest.raises(TransferError, match="broken"):
            failing.wait(ticket)
    link.close()
    assert clock.now_s == 100.0


def seconds_for(count: int, rate_bytes_per_s: float, latency_s: float) -> float:
    """On the real clock, the best of a few: other work can only make it slower."""
    times = []
    for _ in range(4):
        with ThrottledTransfer(HostTransfer(PatternStore()), rate_bytes_per_s, latency_s) as link:
            places = [link.allocate(STORED_BYTES) for _ in range(count)]
            begin_s = perf_counter()
            tickets = [link.start(segment(n), place) for n, place in enumerate(places)]
            for ticket in tickets:
                link.wait(ticket)
            times.append(perf_counter() - begin_s)
    return min(times)


def test_the_real_clock_agrees_within_a_fifth() -> None:
    count = 20
    for rate, latency_s in ((8e6, 0.0), (4e6, 0.0), (8e6, 1e-3)):
        expected_s = count * (latency_s + STORED_BYTES / rate)
        measured_s = seconds_for(count, rate, latency_s)
        assert expected_s <= measured_s < 1.2 * expected_s


def test_it_is_never_faster_than_what_it_throttles() -> None:
    store = PatternStore(lambda _: sleep(0.03))
    with ThrottledTransfer(HostTransfer(store), 1e12) as link:
        ticket, _ = start(link, 0)
        begin_s = perf_counter()
        link.wait(ticket)
        assert perf_counter() - begin_s > 0.02
        assert link.statistics.busy_s > 0.02


@pytest.mark.parametrize(("rate", "latency_s"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -1.0)])
def test_impossible_links_are_refused(rate: float, latency_s: float) -> None:
    with HostTransfer(PatternStore()) as inner, pytest.raises(ValueError, match="no link has"):
        ThrottledTransfer(inner, rate, latency_s)
