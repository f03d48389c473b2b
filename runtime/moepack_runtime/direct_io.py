"""Memory that disks fill fast, and files read past the page cache. Linux only.

Two measured facts shape this file (12 MiB reads, one core, NVMe): into private anonymous memory
with huge pages, populated beforehand, direct reads reach 1.4 GB/s; into small pages 0.7 to
0.9 GB/s with five times the processor time; into memory not yet populated 0.7 GB/s. And a read
through the page cache takes the memory that the budget was promised, and halves decoding.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moepack.errors import OutOfMemoryError, TransferError
from moepack.segments import ALIGNMENT_BYTES, PIECE_BYTES, align_up
from moepack.units import MIB, format_size

Buffer = npt.NDArray[np.uint8]

#: Whether what is being read is wanted still: asked before each piece, in the reader's thread.
Wanted = Callable[[], bool]

HUGE_PAGE_BYTES = 2 * MIB

# Since Linux 5.14; the mmap module of our oldest Python does not name it.
_MADV_POPULATE_WRITE = 23

# Populating holds the interpreter lock: in steps, so that Ctrl-C is heard.
_POPULATE_STEP_BYTES = 256 * MIB

# Their files are memory: they accept O_DIRECT since Linux 6.6 and have no cache to go past.
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})

_log = logging.getLogger(__name__)


def allocate(size_bytes: int) -> torch.Tensor:
    """Memory for segments: private, populated, in huge pages as far as it fills whole ones.

    What becomes resident is ``size_bytes`` rounded up to 4 KiB, all of it now: the pages of the
    last, partial huge page are small ones. The memory is returned to the system when the last
    view of the tensor goes. It is not inherited by forked processes: direct reads into memory
    that a fork marks copy-on-write may be lost (open(2), NOTES on O_DIRECT).

    Parameters
    ----------
    size_bytes
        0 or more.

    Returns
    -------
    torch.Tensor
        uint8 [size_bytes], zeroed, 4 KiB aligned, 2 MiB aligned from 2 MiB on.

    Raises
    ------
    OutOfMemoryError
        When the system refuses. (A container that runs into its limit is killed by the system
        instead: compare with the machine's capacity before.)
    """
    if size_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    span_bytes = align_up(size_bytes, max(ALIGNMENT_BYTES, mmap.PAGESIZE))
    huge_bytes = span_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    slack_bytes = HUGE_PAGE_BYTES if huge_bytes else 0  # for the alignment; never touched
    try:
        memory = mmap.mmap(
            -1, span_bytes + slack_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        memory.madvise(mmap.MADV_DONTFORK)
        start = 0
        if huge_bytes:
            start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE_BYTES
            _use_huge_pages(memory, start, huge_bytes, span_bytes)
        _populate(memory, start, span_bytes)
    except (OSError, OverflowError) as failure:
        raise OutOfMemoryError(
            f"the system refused {format_size(size_bytes)} of memory ({failure}); "
            "free some, raise the limit (ulimit -v) or plan with a smaller budget"
        ) from None
    return torch.frombuffer(memory, dtype=torch.uint8, count=size_bytes, offset=start)


def _use_huge_pages(memory: mmap.mmap, start: int, huge_bytes: int, span_bytes: int) -> None:
    """Huge pages for the whole ones, small pages for the rest: nothing beyond the span."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
        if span_bytes > huge_bytes:
            memory.madvise(mmap.MADV_NOHUGEPAGE, start + huge_bytes, span_bytes - huge_bytes)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
        _log.warning("this kernel has no transparent huge pages: direct reads will be slower")


def _populate(memory: mmap.mmap, start: int, span_bytes: int) -> None:
    done = 0
    while done < span_bytes:
        step = min(_POPULATE_STEP_BYTES, span_bytes - done)
        try:
            memory.madvise(_MADV_POPULATE_WRITE, start + done, step)
        except InterruptedError:
            continue  # a signal whose handler returned
        except OSError as failure:
            if failure.errno != errno.EINVAL:
                raise
            # Before Linux 5.14: touch every page.
            np.frombuffer(memory, np.uint8)[start + done : start + done + step : mmap.PAGESIZE] = 0
        done += step


class DirectFile:
    """A file read past the page cache, from any number of threads at once.

    Where the file system refuses direct reads the file is read through the page cache and dropped
    from it after each read; :attr:`direct` is then False and :attr:`reason` says why. Whoever
    opens files for a run shows that (see :class:`moepack_runtime.store.PackStore`).

    Attributes
    ----------
    path : Path
    size_bytes : int
        When it was opened.
    direct : bool
    reason : str
        Why not, or empty.

    Raises
    ------
    TransferError
        When the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor, self.reason = _open(path)
            self.size_bytes = os.fstat(self._descriptor).st_size
        except OSError as failure:
            raise TransferError(f"{path}: {failure.strerror}; expected a readable file") from None
        self.direct = not self.reason

    def read_into(
        self, destination: Buffer, offset_bytes: int, needed_bytes: int | None = None
    ) -> None:
        """Fill the destination from an offset.

        Parameters
        ----------
        destination
            4 KiB aligned, and a multiple of 4 KiB long.
        offset_bytes
            A multiple of 4 KiB.
        needed_bytes
            How much of it the file must have; all of it when None. A file whose length is not a
            multiple of 4 KiB is read to its end with fewer.

        Raises
        ------
        TransferError
            When the file ends before, or the read fails. Nothing is known of the destination then.
        """
        view = destination.data
        size_bytes = view.nbytes
        if needed_bytes is None:
            needed_bytes = size_bytes
        try:
            got_bytes = os.preadv(self._descriptor, (view,), offset_bytes)
            if got_bytes < needed_bytes:
                got_bytes = self._read_on(view, offset_bytes, got_bytes, needed_bytes)
        except OSError as failure:
            raise TransferError(
                f"{self.path}: {failure.strerror} while reading {size_bytes} bytes at offset "
                f"{offset_bytes}; check the disk and its log"
            ) from None
        if got_bytes < needed_bytes:
            raise TransferError(
                f"{self.path}: the file ends early: at offset {offset_bytes} expected "
                f"{needed_bytes} bytes, got {got_bytes}; check it with moepack verify"
            )
        if not self.direct:
            os.posix_fadvise(self._descriptor, offset_bytes, size_bytes, os.POSIX_FADV_DONTNEED)

    def read_while(self, wanted: Wanted | None, destination: Buffer, offset_bytes: int) -> int:
        """The same in pieces, as long as it is wanted; at one go where nobody is to be asked.

        Returns
        -------
        int
            Bytes read: all that the destination takes, or fewer where it was no longer wanted.
        """
        if wanted is None:
            self.read_into(destination, offset_bytes)
            return destination.nbytes
        for done_bytes in range(0, destination.nbytes, PIECE_BYTES):
            if not wanted():
                return done_bytes
            piece = destination[done_bytes : done_bytes + PIECE_BYTES]
            self.read_into(piece, offset_bytes + done_bytes)
        return destination.nbytes

    def _read_on(self, view: memoryview, offset_bytes: int, done: int, needed_bytes: int) -> int:
        """Go on after a short read of ``done`` bytes; fewer than needed at the end of the file."""
        while done < needed_bytes:
            # A short read may end inside a block, where a direct read cannot go on: read that
            # block again. A read that does not get further than the last one met the end.
            resume = done - done % ALIGNMENT_BYTES
            count = os.preadv(self._descriptor, (view[resume:],), offset_bytes + resume)
            if resume + count <= done:
                break
            done = resume + count
        return done

    def close(self) -> None:
        """Close the file; a read that comes later raises. Closing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: Path) -> tuple[int, str]:
    """A descriptor, and why it is not a direct one (or nothing)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise
        return _open_buffered(path), "its file system refuses O_DIRECT"
    try:
        if _is_memory(descriptor):
            reason = "its file system keeps files in memory"
        elif _reads_directly(descriptor):
            return descriptor, ""
        else:
            reason = "its file system refuses direct reads of 4 KiB blocks"
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return _open_buffered(path), reason


def _open_buffered(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    # The default read-ahead would bring in, and pay for, up to 8 MiB that nobody asked for.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def _reads_directly(descriptor: int) -> bool:
    """Try one block: some file systems accept the flag and refuse the read."""
    with mmap.mmap(-1, ALIGNMENT_BYTES) as block:
        try:
            os.preadv(descriptor, [block], 0)
        except OSError as failure:
            if failure.errno == errno.EINVAL:
                return False
            raise
    return True


def _is_memory(descriptor: int) -> bool:
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    for line in mounts.splitlines():
        # id parent major:minor root point options ... - type source options     (proc(5))
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0] in _MEMORY_FILE_SYSTEMS
    return False
