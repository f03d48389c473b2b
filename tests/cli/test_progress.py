"""Progress: silent about short work, a line now and then in a file, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from moepack.cli.progress import TerminalProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(stream: io.StringIO, *, seconds: int, total: int | None = None) -> str:
    """A piece of work that does one MiB a second."""
    clock = Clock()
    progress = TerminalProgress(stream, clock)
    progress.start("copy weights", total)
    for _ in range(seconds):
        clock.now_s += 1.0
        progress.advance(1 << 20)
    progress.done()
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_short_work_says_nothing(stream: io.StringIO) -> None:
    assert work(stream, seconds=1, total=1 << 20) == ""


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    lines = work(io.StringIO(), seconds=24, total=24 << 20).splitlines()
    assert lines == [
        "copy weights: 2.00 MiB of 24.00 MiB (8%), 1.00 MiB/s, 22 s left",
        "copy weights: 12.00 MiB of 24.00 MiB (50%), 1.00 MiB/s, 12 s left",
        "copy weights: 22.00 MiB of 24.00 MiB (92%), 1.00 MiB/s, 2 s left",
        "copy weights: 24.00 MiB of 24.00 MiB (100%) in 24 s, 1.00 MiB/s",
    ]


def test_work_of_unknown_size_counts_without_an_estimate() -> None:
    lines = work(io.StringIO(), seconds=3).splitlines()
    assert lines == [
        "copy weights: 2.00 MiB, 1.00 MiB/s",
        "copy weights: 3.00 MiB in 3 s, 1.00 MiB/s",
    ]


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    shown = work(Terminal(), seconds=5, total=10 << 20)
    assert "copy weights" in shown
    assert "MiB" in shown
    assert "\n" not in shown.rstrip("\n").splitlines()[-1]


def test_one_piece_of_work_follows_another() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = TerminalProgress(stream, clock)
    for what in ("one", "two"):
        progress.start(what, 4, "items")
        clock.now_s += 3.0
        progress.advance(1)
        progress.done()
    assert stream.getvalue().splitlines() == [
        "one: 1 of 4 (25%), 9 s left",
        "one: 1 of 4 (25%) in 3 s",
        "two: 1 of 4 (25%), 9 s left",
        "two: 1 of 4 (25%) in 3 s",
    ]
