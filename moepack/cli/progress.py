"""Progress of long work on standard error.

Nothing is drawn before a piece of work has lasted two seconds, nor when it is about to end. A
terminal gets a bar with an estimate; anything else gets a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from moepack.progress import Unit
from moepack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

#: Work that is shorter than this is not worth a bar.
QUIET_S = 2.0

#: Time between two lines where there is no terminal.
LINE_EVERY_S = 10.0


class Work:
    """One piece of work and how far it is."""

    def __init__(self, what: str, total: int | None, unit: Unit, began_s: float) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.began_s = began_s
        self.amount = 0

    def done(self) -> str:
        """``1.20 GiB of 3.40 GiB (35%)``."""
        text = self._count(self.amount)
        if self.total:
            text += f" of {self._count(self.total)} ({self.amount / self.total:.0%})"
        return text

    def describe(self, now_s: float) -> str:
        """The same, and ``, 1.00 MiB/s, 12 s left`` as far as that can be told."""
        text = self.done() + self.rate(now_s)
        left_s = self.left_s(now_s)
        return text if left_s is None else f"{text}, {format_duration(left_s)} left"

    def rate(self, now_s: float) -> str:
        """``, 1.00 MiB/s`` of bytes."""
        elapsed_s = now_s - self.began_s
        if self.unit != "bytes" or elapsed_s <= 0:
            return ""
        return f", {format_rate(self.amount / elapsed_s)}"

    def left_s(self, now_s: float) -> float | None:
        """Seconds to the end at the present pace; None where that cannot be told."""
        if not self.total or not 0 < self.amount < self.total:
            return None
        return (now_s - self.began_s) * (self.total - self.amount) / self.amount

    def _count(self, amount: int) -> str:
        return format_size(amount) if self.unit == "bytes" else str(amount)


class _Drawer(Protocol):
    def draw(self, work: Work, now_s: float) -> None: ...

    def finish(self, work: Work, now_s: float) -> None: ...


class _Bar:
    """A bar on a terminal, which vanishes with the work."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(file=stream),
            transient=True,
        )
        self._task: TaskID | None = None

    def draw(self, work: Work, now_s: float) -> None:
        if self._task is None:
            self._task = self._progress.add_task(work.what, total=work.total, status="")
            self._progress.start()
        self._progress.update(self._task, completed=work.amount, status=work.describe(now_s))

    def finish(self, work: Work, now_s: float) -> None:
        self.draw(work, now_s)
        self._progress.stop()


class _Lines:
    """A line every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next_s = 0.0

    def draw(self, work: Work, now_s: float) -> None:
        if now_s >= self._next_s and work.amount != work.total:
            self._next_s = now_s + LINE_EVERY_S
            self._write(f"{work.what}: {work.describe(now_s)}")

    def finish(self, work: Work, now_s: float) -> None:
        seconds = format_duration(now_s - work.began_s)
        self._write(f"{work.what}: {work.done()} in {seconds}{work.rate(now_s)}")

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()


class TerminalProgress:
    """A :class:`moepack.progress.Progress` for people."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._work: Work | None = None
        self._drawer: _Drawer | None = None

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        """A piece of work begins."""
        self._work = Work(what, total, unit, self._clock())

    def advance(self, amount: int) -> None:
        """``amount`` more units have been done."""
        work = self._work
        assert work is not None, "advance before start"
        work.amount += amount
        now_s = self._clock()
        if self._drawer is None and self._is_long(work, now_s):
            self._drawer = (_Bar if self._stream.isatty() else _Lines)(self._stream)
        if self._drawer is not None:
            self._drawer.draw(work, now_s)

    @staticmethod
    def _is_long(work: Work, now_s: float) -> bool:
        if now_s - work.began_s < QUIET_S or work.amount == work.total:
            return False
        left_s = work.left_s(now_s)
        return left_s is None or left_s >= QUIET_S

    def done(self) -> None:
        """The piece of work has ended, well or badly."""
        work, drawer = self._work, self._drawer
        self._work = self._drawer = None
        if work is not None and drawer is not None:
            drawer.finish(work, self._clock())
