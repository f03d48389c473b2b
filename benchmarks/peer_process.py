"""One run of one program inside a memory control group, watched from outside.

A program tells that a token is there by writing to standard output. What it has read from the disk
by then, and the most memory that it has taken, is what the kernel counts of the process.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.control_group import ControlGroup
from moepack.units import KIB


class Moment(NamedTuple):
    """What the kernel had counted at one time since the start.

    ``read_bytes`` came from a block device, whether asked for or read ahead.
    """

    seconds: float
    read_bytes: int
    peak_process_bytes: int


class Watched(NamedTuple):
    """A run that has ended.

    Attributes
    ----------
    first, last : Moment or None
        When the first and the last token appeared; None where none did.
    tokens : int
        That appeared.
    peak_group_bytes : int or None
        The most that was charged to the group, page cache included.
    failure : str
        Why it did not go through, in words; empty where it did.
    """

    first: Moment | None
    last: Moment | None
    tokens: int
    output: str
    messages: str
    peak_group_bytes: int | None
    failure: str


def process_moment(pid: int | str, seconds: float) -> Moment:
    """What the kernel has counted of a process so far."""
    folder = Path("/proc") / str(pid)
    counted = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
    peak_bytes = 0
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak_bytes = int(line.split()[1]) * KIB
    return Moment(seconds, int(counted["read_bytes"]), peak_bytes)


def forget_files(paths: Sequence[Path]) -> None:
    """Drop what the page cache holds of files, or of block devices."""
    for path in paths:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        for file in files:
            with file.open("rb") as opened:
                with contextlib.suppress(OSError):  # read-only devices have nothing to write
                    os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_watched(
    command: Sequence[str],
    *,
    limit_bytes: int,
    messages: Path,
    timeout_s: float,
    count_tokens: Callable[[str], int],
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> Watched:
    """Run a command in a group of its own.

    Parameters
    ----------
    messages
        A file for its standard error.
    count_tokens
        How many new tokens a piece of its output shows.
    folder
        Where it runs; None: here.
    """
    began_s = time.monotonic()
    with (
        ControlGroup("peer", limit_bytes) as group,
        messages.open("w+", encoding="utf-8", errors="replace") as errors,
    ):
        child = subprocess.Popen(
            group.inside(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            cwd=folder,
        )
        assert child.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces: list[str] = []
        first: Moment | None = None
        last: Moment | None = None
        tokens = 0
        late = False
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                left_s = began_s + timeout_s - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    late = True
                    child.kill()
                    break
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    break
                pieces.append(decoder.decode(data))
                appeared = count_tokens(pieces[-1])
                if appeared:
                    tokens += appeared
                    last = process_moment(child.pid, time.monotonic() - began_s)
                    first = first or last
        code = child.wait()
        child.stdout.close()
        errors.flush()
        errors.seek(0)
        said = errors.read()
        return Watched(
            first,
            last,
            tokens,
            "".join(pieces),
            said,
            group.peak_bytes,
            _failure(code, late=late, kills=group.kills, timeout_s=timeout_s, said=said),
        )


def _failure(code: int, *, late: bool, kills: int, timeout_s: float, said: str) -> str:
    if late:
        return f"stopped after {timeout_s:.0f} s"
    if kills:
        return "killed for want of memory"
    if code:
        lines = [line for line in said.strip().splitlines() if line.strip()]
        return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
    return ""
