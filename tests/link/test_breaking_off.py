"""What is on its way for nobody ends with the piece that is under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from moepack_runtime import direct_io
from moepack_runtime.direct_io import Buffer, DirectFile, Wanted, allocate
from moepack_runtime.store import CheckMode
from moepack_runtime.transfer import HostTransfer, Priority, ThrottledTransfer, throttled

from moepack.errors import TransferError
from moepack.segments import SegmentId
from tests.link.support import STORED_BYTES, PatternStore, content, number_of, segment

PIECE_BYTES = 4096
assert STORED_BYTES == 2 * PIECE_BYTES


class PieceStore(PatternStore):
    """Hands out segments a page at a time; every page of the first one waits at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.opened = threading.Event(), threading.Event()

    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        if wanted is None:
            return super().read_into(segment, destination, check)
        self.read.append(number_of(segment))
        for done in range(0, STORED_BYTES, PIECE_BYTES):
            if not wanted():
                return done
            self.entered.set()
            assert self.opened.wait(30.0)
            destination[done : done + PIECE_BYTES] = content(number_of(segment))[
                done : done + PIECE_BYTES
            ]
        return STORED_BYTES


@pytest.fixture
def store() -> Iterator[PieceStore]:
    made = PieceStore()
    yield made
    made.opened.set()


def test_a_file_is_read_in_pieces_as_long_as_they_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "PIECE_BYTES", PIECE_BYTES)
    written = np.random.default_rng(0).integers(0, 255, 5 * PIECE_BYTES, dtype=np.uint8)
    (tmp_path / "file").write_bytes(written.tobytes())
    file = DirectFile(tmp_path / "file")
    room = allocate(3 * PIECE_BYTES).numpy()
    assert file.read_while(lambda: True, room, PIECE_BYTES) == 3 * PIECE_BYTES
    assert np.array_equal(room, written[PIECE_BYTES : 4 * PIECE_BYTES])
    room[:] = 0
    answers = iter([True, True, False])
    assert file.read_while(lambda: next(answers), room, 0) == 2 * PIECE_BYTES
    assert np.array_equal(room[: 2 * PIECE_BYTES], written[: 2 * PIECE_BYTES])
    assert not room[2 * PIECE_BYTES :].any()
    file.close()


def test_a_prefetch_under_way_ends_with_its_piece_and_the_demand_follows(store: PieceStore) -> None:
    with HostTransfer(store, readers=1) as transfer:
        wrong_place, place = (transfer.allocate(STORED_BYTES) for _ in range(2))
        wrong = transfer.start(segment(0), wrong_place, Priority.PREFETCH)
        assert store.entered.wait(30.0)
        assert not transfer.cancel(wrong)
        transfer.break_off(wrong)
        demand = transfer.start(segment(1), place)
        store.opened.set()
        transfer.wait(demand)
        transfer.wait(wrong)
        assert np.array_equal(place.numpy()[:STORED_BYTES], content(1))
        assert wrong.crossed_bytes == PIECE_BYTES
        assert demand.crossed_bytes == STORED_BYTES
        assert transfer.statistics.bytes == PIECE_BYTES + STORED_BYTES


def test_a_prefetch_that_is_wanted_comes_whole(store: PieceStore) -> None:
    store.opened.set()
    with HostTransfer(store, readers=1) as transfer:
        place = transfer.allocate(STORED_BYTES)
        ticket = transfer.start(segment(3), place, Priority.PREFETCH)
        transfer.wait(ticket)
        transfer.break_off(ticket)  # too late
        assert np.array_equal(place.numpy()[:STORED_BYTES], content(3))
        assert ticket.crossed_bytes == STORED_BYTES


@pytest.mark.parametrize(("pieces", "at_s"), [(1, 0.005), (1, 0.09), (2, 0.12), (2, 0.9)])
def test_a_calculated_link_breaks_off_as_well(
    monkeypatch: pytest.MonkeyPatch, pieces: int, at_s: float
) -> None:
    """A tenth of a second a piece; what is demanded begins when the piece ends."""
    monkeypatch.setattr(throttled, "PIECE_BYTES", PIECE_BYTES)
    now_s = 100.0
    monkeypatch.setattr(throttled, "perf_counter", lambda: now_s)
    monkeypatch.setattr(throttled, "_sleep_until", lambda _: None)
    inner = HostTransfer(PatternStore(), readers=1)
    with ThrottledTransfer(inner, PIECE_BYTES * 10.0) as link:
        wrong_place, place = (link.allocate(STORED_BYTES) for _ in range(2))
        wrong = link.start(segment(0), wrong_place, Priority.PREFETCH)
        link.is_ready(wrong)  # its turn comes
        begun_s = now_s
        now_s += at_s
        link.break_off(wrong)
        demand = link.start(segment(1), place)
        link.wait(demand)
        assert wrong.crossed_bytes == pieces * PIECE_BYTES
        assert wrong.end_s == pytest.approx(begun_s + pieces * 0.1)
        assert demand.begin_s == pytest.approx(max(wrong.end_s, now_s))
        now_s += 10.0
        assert link.statistics.bytes == pieces * PIECE_BYTES + STORED_BYTES


def test_breaking_off_what_has_not_begun_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a wait has settled who comes next, and failed before they did."""
    monkeypatch.setattr(throttled, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(throttled, "perf_counter", lambda: 100.0)

    def fail(_: SegmentId) -> None:
        raise TransferError("broken")

    with ThrottledTransfer(HostTransfer(PatternStore(fail)), PIECE_BYTES * 10.0) as link:
        tickets = [link.start(segment(n), link.allocate(STORED_BYTES)) for n in range(3)]
        with pytest.raises(TransferError, match="broken"):
            link.wait(tickets[2])
        link.break_off(tickets[2])
        assert tickets[2].crossed_bytes == 0
        assert tickets[2].end_s == tickets[2].begin_s
