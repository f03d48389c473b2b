"""How fast the disk is just now, beside what was profiled of it.

A disk that is shared, or whose host keeps some of it in memory, reads at another rate from one hour
to the next, and by the age of a file. Whoever races engines times some reads of the very files that
they read, past the engines: what a time owes to the disk is not the engines' doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, median_low
from time import sleep

from moepack_runtime.direct_io import DirectFile

from benchmarks.options import Throttle
from moepack.formats import PackedModel
from moepack.hardware import HardwareProfile
from moepack.probe_link import LINK_SIZES, RandomReads
from moepack.rates import LinkCurve
from moepack.segments import ALIGNMENT_BYTES

# Of so many batches, some 50 MiB each, the median counts.
_BATCHES = 5

# What engines have asked for ahead of a token that nobody draws has arrived by then.
_REST_S = 0.25


class DiskPace:
    """Reads of one size at random places of a file, as ``moepack profile`` times them.

    Parameters
    ----------
    curve
        What was profiled: seconds, and how many of these reads are in flight at once.
    """

    def __init__(
        self, reads: RandomReads, readers: ThreadPoolExecutor, size_bytes: int, curve: LinkCurve
    ) -> None:
        self._reads = reads
        self._readers = readers
        self._size_bytes = size_bytes
        self._profiled_s = curve.seconds(size_bytes)

    def slowness(self) -> float:
        """How many times as long as when it was profiled a read takes; engines must rest."""
        sleep(_REST_S)
        batches = (self._reads.time_batch(self._size_bytes, self._readers) for _ in range(_BATCHES))
        return median(batches) / self._profiled_s


@contextmanager
def open_disk_pace(
    folder: Path, hardware: HardwareProfile, throttle: Throttle | None
) -> Iterator[DiskPace | None]:
    """Time reads of the largest file of a packed folder, as large as its segments mostly are.

    Or as large as any that was profiled: beyond that a disk is as fast, and the memory ends.
    None where the disk is not what is raced on: behind a bus, or throttled.
    """
    if hardware.bus is not None or throttle is not None:
        yield None
        return
    sizes = (entry.stored_bytes for entry in PackedModel.open(folder).entries.values())
    file = DirectFile(max(folder.iterdir(), key=lambda path: path.stat().st_size))
    try:
        half_bytes = file.size_bytes // 2 // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        size_bytes = min(median_low(sizes), LINK_SIZES[-1], half_bytes)
        with ThreadPoolExecutor(hardware.disk.readers_for(size_bytes)) as readers:
            yield DiskPace(RandomReads(file), readers, size_bytes, hardware.disk)
    finally:
        file.close()
