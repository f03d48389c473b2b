"""Measuring links: disk to RAM, RAM to VRAM."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import IO, TYPE_CHECKING

from moepack.atomic import output_error
from moepack.errors import DiskFullError
from moepack.progress import NO_PROGRESS, Progress
from moepack.rates import LinkCurve, LinkPoint
from moepack.segments import ALIGNMENT_BYTES
from moepack.timing import Timing, measure, rounded, summarise
from moepack.units import KIB, MIB, format_size

if TYPE_CHECKING:
    import torch
    from moepack_runtime.direct_io import DirectFile

#: Sizes of a transfer at which links are measured.
LINK_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 12 * MIB, 16 * MIB)

#: Reads in flight at once.
READERS = (1, 2, 4)

#: Of the scratch file: larger than the memory inside disks. What no size rules out is a host that
#: keeps what its guest has just written: on one virtual disk older files are a quarter slower.
SCRATCH_BYTES = 512 * MIB
_SMALLEST_SCRATCH_BYTES = 64 * MIB
_BLOCK_BYTES = 16 * MIB

# One timing is a batch of transfers of one size, one behind the other: so many bytes, and at least
# and at most so many transfers.
_BATCH_BYTES = 48 * MIB
_BATCH_LEAST = max(READERS)
_BATCH_MOST = 64

# Rounds go over all sizes and readers: when a link slows down for a while, as shared ones do, every
# number feels it alike.

# More readers that gain less than this are not worth their threads.
_WORTHWHILE = 1.05


@contextmanager
def open_disk(scratch: Path, progress: Progress = NO_PROGRESS) -> Iterator[DiskProbe]:
    """A scratch file on the disk that a folder is on, to be measured in rounds.

    Raises
    ------
    DiskFullError
        When there is too little room for the scratch file.
    OutputError
        When it cannot be written.
    """
    from moepack_runtime.direct_io import DirectFile

    with _scratch_file(scratch, progress) as path, ExitStack() as stack:
        file = DirectFile(path)
        stack.callback(file.close)
        pools = {readers: stack.enter_context(ThreadPoolExecutor(readers)) for readers in READERS}
        yield DiskProbe(file, pools)


@contextmanager
def _scratch_file(folder: Path, progress: Progress) -> Iterator[Path]:
    """A file of incompressible bytes, on the disk and not in the page cache.

    It has no name in the folder (or loses it at once), so it is gone when this process ends, even
    if that is killed. The path is valid inside this process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size_bytes = _scratch_bytes(folder)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed below
    except OSError as failure:
        raise output_error(folder, failure) from failure
    with file:
        try:
            _fill(file, size_bytes, progress)
        except OSError as failure:
            raise output_error(folder, failure) from failure
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _fill(file: IO[bytes], size_bytes: int, progress: Progress) -> None:
    block = os.urandom(_BLOCK_BYTES)
    progress.start("write a scratch file", size_bytes)
    try:
        for number in range(size_bytes // _BLOCK_BYTES):
            # Turned, so that no two blocks are equal to a disk that looks for it.
            turn = number * 4099
            file.write(block[turn:])
            file.write(block[:turn])
            progress.advance(_BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    finally:
        progress.done()
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _scratch_bytes(folder: Path) -> int:
    """As much as is wanted, and at most a quarter of what is free; whole blocks."""
    free_bytes = shutil.disk_usage(folder).free
    size_bytes = min(SCRATCH_BYTES, free_bytes // 4) // _BLOCK_BYTES * _BLOCK_BYTES
    if size_bytes < _SMALLEST_SCRATCH_BYTES:
        raise DiskFullError(
            f"{folder}: {format_size(free_bytes)} are free, measuring the disk needs "
            f"{format_size(4 * _SMALLEST_SCRATCH_BYTES)}; free some or name another folder"
        )
    return size_bytes


class RandomReads:
    """Batches of reads at random places of a file, into the memory that the runtime uses.

    Attributes
    ----------
    moved_bytes : int
        By all of them.
    """

    def __init__(self, file: DirectFile) -> None:
        from moepack_runtime.direct_io import allocate

        self._file = file
        self._memory = allocate(max(_BATCH_BYTES, _BATCH_LEAST * LINK_SIZES[-1])).numpy()
        self._chance = random.Random(0)
        self.moved_bytes = 0

    def read(self, size_bytes: int, place: int = 0) -> None:
        """One read, into the place of that number: no two at once into the same."""
        blocks = (self._file.size_bytes - size_bytes) // ALIGNMENT_BYTES
        offset_bytes = self._chance.randrange(blocks) * ALIGNMENT_BYTES
        self._file.read_into(self._memory[place * size_bytes :][:size_bytes], offset_bytes)

    def time_one(self, size_bytes: int) -> float:
        """Seconds of one read on an idle disk."""
        begin_s = perf_counter()
        self.read(size_bytes)
        self.moved_bytes += size_bytes
        return perf_counter() - begin_s

    def time_batch(self, size_bytes: int, readers: ThreadPoolExecutor) -> float:
        """Seconds for each read of a batch, as many in flight as there are readers."""
        count = _batch(size_bytes)
        begin_s = perf_counter()
        list(readers.map(self.read, [size_bytes] * count, range(count)))
        self.moved_bytes += count * size_bytes
        return (perf_counter() - begin_s) / count


def _batch(size_bytes: int) -> int:
    return min(max(_BATCH_BYTES // size_bytes, _BATCH_LEAST), _BATCH_MOST)


class DiskProbe:
    """Reads from a file, past the page cache where that can be had."""

    def __init__(self, file: DirectFile, pools: Mapping[int, ThreadPoolExecutor]) -> None:
        self._reads = RandomReads(file)
        self._file = file
        self._pools = pools
        self._singles_s: list[float] = []
        self._batches_s: dict[int, dict[int, list[float]]] = {
            readers: {size: [] for size in LINK_SIZES} for readers in pools
        }
        self._device_before = _device_read_bytes()

    def round(self) -> None:
        """Every size and number of readers once."""
        reads = self._reads
        self._singles_s += [reads.time_one(LINK_SIZES[0]) for _ in range(_BATCH_MOST // 4)]
        for readers, pool in self._pools.items():
            for size_bytes, durations_s in self._batches_s[readers].items():
                durations_s.append(reads.time_batch(size_bytes, pool))

    def curve(self) -> LinkCurve:
        """The medians over the rounds."""
        moved_bytes = self._reads.moved_bytes
        past_cache, how = _verdict(self._file, moved_bytes, self._device_before)
        latency_s = summarise(self._singles_s).median_s
        return _curve(self._batches_s, latency_s, past_cache=past_cache, how=how)


def _curve(
    batches_s: dict[int, dict[int, list[float]]], latency_s: float, *, past_cache: bool, how: str
) -> LinkCurve:
    """One curve, for the numbers of readers that a runtime should use."""
    timings = {
        readers: {size: summarise(durations_s) for size, durations_s in sizes.items()}
        for readers, sizes in batches_s.items()
    }
    # The size of experts counts: the geometric mean of the rates from 256 KiB on.
    slowness = {
        readers: fmean(log(t.median_s) for size, t in sizes.items() if size >= 256 * KIB)
        for readers, sizes in timings.items()
    }
    best = min(slowness.values())
    readers = min(r for r, value in slowness.items() if value <= best + log(_WORTHWHILE))
    curve = LinkCurve(
        readers=readers,
        latency_s=rounded(latency_s),
        past_cache=past_cache,
        how=how,
        points=tuple(_point(size, timing) for size, timing in timings[readers].items()),
    )
    # Each size as a runtime reads it: with as many readers as it takes, of the numbers measured.
    sizes = timings[readers]
    used = {size: max(r for r in timings if r <= curve.readers_for(size)) for size in sizes}
    points = tuple(_point(size, timings[count][size]) for size, count in used.items())
    return dataclasses.replace(curve, points=points)


def _point(size_bytes: int, timing: Timing) -> LinkPoint:
    return LinkPoint(
        size_bytes=size_bytes,
        bytes_per_s=rounded(size_bytes / timing.median_s),
        repeats=timing.repeats,
        spread=rounded(timing.spread),
    )


def _verdict(file: DirectFile, moved_bytes: int, device_before: int | None) -> tuple[bool, str]:
    """Whether the reads went to the device, and how they were made."""
    what = f"random reads of {format_size(file.size_bytes)} written just before"
    if not file.direct:
        return False, f"{what} through the page cache ({file.reason}): the disk was not measured"
    device_after = _device_read_bytes()
    if device_before is None or device_after is None:
        return True, f"{what} with O_DIRECT; this system does not count what came from the device"
    if device_after - device_before < moved_bytes * 0.9:
        return False, f"{what} with O_DIRECT, which this file system answers from memory"
    return True, f"{what} with O_DIRECT; the system counted every byte as read from the device"


def _device_read_bytes() -> int | None:
    """What this process has had fetched from storage devices, as the system counts it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(": ", 1) for line in lines)
    return int(fields["read_bytes"]) if "read_bytes" in fields else None


class BusProbe:
    """Copies from pinned RAM to VRAM, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._source = torch.empty(LINK_SIZES[-1], dtype=torch.uint8, pin_memory=True)
        self._destination = torch.empty_like(self._source, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._singles_s: list[float] = []
        self._batches_s: dict[int, list[float]] = {size: [] for size in LINK_SIZES}

    def round(self) -> None:
        """Every size once."""
        self._singles_s.append(self._time(LINK_SIZES[0], 1))
        for size_bytes, durations_s in self._batches_s.items():
            count = _batch(size_bytes)
            durations_s.append(self._time(size_bytes, count) / count)

    def _time(self, size_bytes: int, count: int) -> float:
        work = partial(self._copy, size_bytes, count)
        return measure(work, repeats=5, synchronize=self._stream.synchronize).median_s

    def _copy(self, size_bytes: int, count: int) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            for _ in range(count):
                self._destination[:size_bytes].copy_(self._source[:size_bytes], non_blocking=True)

    def curve(self) -> LinkCurve:
        """The medians over the rounds."""
        return LinkCurve(
            readers=1,
            latency_s=rounded(summarise(self._singles_s).median_s),
            past_cache=True,
            how="copies from pinned RAM on one stream",
            points=tuple(
                _point(size, summarise(durations_s))
                for size, durations_s in self._batches_s.items()
            ),
        )
