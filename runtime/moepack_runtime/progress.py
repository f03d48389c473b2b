"""Progress of loading and of long prompts, as a seam that the command line fills.

The same as the tool's own, which this runtime does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

Unit = Literal["bytes", "items"]


class Progress(Protocol):
    """Told about one piece of work at a time, from one thread."""

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        """A piece of work begins.

        Parameters
        ----------
        what
            For people, a verb and its object.
        total
            How many units it takes; None where that is not known.
        unit
            What is counted.
        """

    def advance(self, amount: int) -> None:
        """``amount`` more units have been done."""

    def done(self) -> None:
        """The piece of work has ended, well or badly."""


class _NoProgress:
    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def done(self) -> None:
        pass


#: Tells nobody.
NO_PROGRESS: Progress = _NoProgress()


@contextmanager
def working(
    progress: Progress, what: str, total: int | None, unit: Unit = "bytes"
) -> Iterator[Progress]:
    """One piece of work, which ends with the block."""
    progress.start(what, total, unit)
    try:
        yield progress
    finally:
        progress.done()
