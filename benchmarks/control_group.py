"""A memory control group around one child process: version 1 of the interface, or version 2.

Everything that the child takes counts, the page cache included: what it reads through the cache
is charged to it and evicted at its limit. Needs the right to make groups: root, or a delegated
subtree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from moepack.errors import MoepackError

_ROOT = Path("/sys/fs/cgroup")
_EMPTYING_S = 10.0


class NoControlGroupError(MoepackError):
    """No memory control group can be made here."""


class Interface(NamedTuple):
    """Where groups are made, and what the files of one are called."""

    root: Path
    limit: str
    swap_limit: str
    peak: str
    events: str
    killed: str

    @classmethod
    def find(cls, root: Path = _ROOT) -> Interface:
        """The one that this machine has.

        Raises
        ------
        NoControlGroupError
            When there is none.
        """
        if (root / "memory" / "memory.limit_in_bytes").exists():
            return cls(
                root / "memory",
                "memory.limit_in_bytes",
                "memory.memsw.limit_in_bytes",
                "memory.max_usage_in_bytes",
                "memory.oom_control",
                "oom_kill",
            )
        controllers = root / "cgroup.subtree_control"
        if controllers.exists():
            if "memory" not in controllers.read_text().split():
                _write(controllers, "+memory")
            return cls(
                root, "memory.max", "memory.swap.max", "memory.peak", "memory.events", "oom_kill"
            )
        raise NoControlGroupError(
            f"no memory controller under {root}; expected version 1 in {root}/memory, or version 2 "
            "with memory among its controllers; run this where control groups are mounted"
        )


class ControlGroup:
    """One group with a limit; gone, with all that runs in it, when the context ends.

    Parameters
    ----------
    limit_bytes
        Rounded down to whole pages by the kernel.

    Raises
    ------
    NoControlGroupError
        When it cannot be made or limited.
    """

    def __init__(self, name: str, limit_bytes: int, interface: Interface | None = None) -> None:
        self._interface = interface or Interface.find()
        self.folder = self._interface.root / f"moepack-{name}-{os.getpid()}"
        try:
            self.folder.mkdir()
        except OSError as failure:
            raise NoControlGroupError(
                f"{self.folder}: {failure.strerror}; making a control group needs root, or a "
                "subtree that was delegated"
            ) from None
        try:
            _write(self.folder / self._interface.limit, str(limit_bytes))
            swap = self.folder / self._interface.swap_limit
            if swap.exists():
                of_swap_alone = self._interface.swap_limit == "memory.swap.max"
                _write(swap, "0" if of_swap_alone else str(limit_bytes))
        except NoControlGroupError:
            self.folder.rmdir()
            raise

    @property
    def limit_bytes(self) -> int:
        """The limit as the kernel keeps it."""
        return int((self.folder / self._interface.limit).read_text())

    @property
    def peak_bytes(self) -> int | None:
        """The most that was ever charged; None before Linux 5.19 in version 2."""
        try:
            return int((self.folder / self._interface.peak).read_text())
        except FileNotFoundError:
            return None

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed for want of memory."""
        for line in (self.folder / self._interface.events).read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == self._interface.killed:
                return int(count)
        return 0

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` inside the group from its first instruction."""
        procs = str(self.folder / "cgroup.procs")
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is left inside, and remove the group."""
        ends_s = time.monotonic() + _EMPTYING_S
        while self.folder.exists():
            for pid in (self.folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.folder.rmdir()
            except OSError:  # the kernel is still taking the processes down
                if time.monotonic() > ends_s:
                    raise
                time.sleep(0.05)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as failure:
        raise NoControlGroupError(
            f"{path}: {failure.strerror}; setting a limit needs root, or a delegated subtree"
        ) from None
