"""Progress of long work, as a seam: those who work report, the command line draws.

Nothing here prints. :data:`NO_PROGRESS` is what library functions use by default.
"""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["bytes", "items"]


class Progress(Protocol):
    """Told about one piece of work at a time, from one thread at a time.

    ``start`` may be called again once ``done`` was; ``done`` is called whether the work succeeded
    or failed.
    """

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        """A piece of work begins.

        Parameters
        ----------
        what
            For people, a verb and its object: ``download Qwen/Qwen3-30B-A3B``.
        total
            How many units it takes; None where that is not known.
        unit
            What is counted.
        """

    def advance(self, amount: int) -> None:
        """``amount`` more units have been done (never negative)."""

    def done(self) -> None:
        """The piece of work has ended."""


class _NoProgress:
    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def done(self) -> None:
        pass


#: Tells nobody.
NO_PROGRESS: Progress = _NoProgress()
