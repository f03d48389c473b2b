"""What a transfer from the disk adds to the computing thread, beside the disk's own time.

    python -m benchmarks.link_overhead --size 72K
    git worktree add /tmp/before COMMIT
    python -m benchmarks.link_overhead --size 72K --against /tmp/before

A pass starts a few segments and computes small matrix products. *Hidden*: it computes for several
times as long as the disk takes and waits at the end, so whatever it takes beyond the products
alone is the transfers' disturbance: the interpreter's lock, threads that are woken, memory traffic.
*Handover*: the same with reads that take nothing, so that only the lock and the threads are left.
*Exposed*: it waits for each segment before a product with it, as an engine does that has nothing
else to do; beside it stands what the same reads take one after the other in the computing thread.

Passes with and without transfers take turns, and so do the versions; printed are medians. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from moepack_runtime.direct_io import DirectFile
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.transfer import HostTransfer, Priority, Transfer

from moepack.segments import SegmentId, SegmentShape, align_up
from moepack.units import format_duration, format_size, parse_size

SEGMENTS = 64

Costs = dict[str, float]


class FileStore(SegmentStore):
    """Segments in one file, found as those of a packed folder are."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.reads = True
        stored_bytes = align_up(size_bytes)
        content = np.random.default_rng(0).bytes(stored_bytes)
        with path.open("wb") as out:
            for _ in range(SEGMENTS):
                out.write(content)
            out.flush()
            os.fsync(out.fileno())
        self._shape = SegmentShape(1, (), size_bytes, stored_bytes)
        self._crc32 = zlib.crc32(content[:size_bytes])
        self._places = {SegmentId(0, n, "top"): n * stored_bytes for n in range(SEGMENTS)}
        self.file = DirectFile(path)

    def shape(self, segment: SegmentId) -> SegmentShape:  # noqa: ARG002
        """All are alike."""
        return self._shape

    def read_into(
        self,
        segment: SegmentId,
        destination: Any,
        check: CheckMode,
        wanted: Any = None,  # noqa: ARG002
    ) -> int:
        """As a packed folder does, of whatever kind of buffer the measured version hands over."""
        if not self.reads:
            return self._shape.stored_bytes
        self.file.read_into(destination, self._places[segment])
        if check is CheckMode.ALWAYS:
            assert zlib.crc32(destination[: self._shape.size_bytes]) == self._crc32
        return self._shape.stored_bytes

    def load_trunk(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """There is none."""
        return {}

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()


class Bench:
    """Passes with and without transfers."""

    def __init__(self, store: FileStore, transfer: Transfer, burst: int, width: int) -> None:
        self._store = store
        self._transfer = transfer
        self._places = [
            transfer.allocate(store.shape(SegmentId(0, 0, "top")).stored_bytes)
            for _ in range(burst)
        ]
        self._segments = [SegmentId(0, n, "top") for n in range(SEGMENTS)]
        self._next = 0
        self._weight = torch.full((width, width), 1e-3)
        self._vector = torch.ones(width)
        self._products = burst

    def set_window(self, seconds: float) -> None:
        """How long the products of a hidden pass take, about."""
        begin_s = perf_counter()
        self._compute(1000)
        each_s = (perf_counter() - begin_s) / 1000
        self._products = max(1, round(seconds / each_s))

    def _compute(self, products: int) -> None:
        for _ in range(products):
            torch.mv(self._weight, self._vector)

    def _take(self) -> list[SegmentId]:
        """The segments of the next pass, never those of the one before."""
        count = len(self._places)
        first, self._next = self._next, (self._next + count) % SEGMENTS
        return [self._segments[(first + n) % SEGMENTS] for n in range(count)]

    def hidden_s(self, *, streaming: bool) -> float:
        """A pass that computes for longer than the disk takes."""
        segments = self._take()
        begin_s = perf_counter()
        tickets = []
        if streaming:
            for segment, place in zip(segments, self._places, strict=True):
                tickets.append(self._transfer.start(segment, place, Priority.PREFETCH))
        self._compute(self._products)
        for ticket in tickets:
            self._transfer.wait(ticket)
        return perf_counter() - begin_s

    def handover_s(self, *, streaming: bool) -> float:
        """A hidden pass whose reads take nothing."""
        self._store.reads = False
        seconds = self.hidden_s(streaming=streaming)
        self._store.reads = True
        return seconds

    def exposed_s(self, *, streaming: bool) -> float:
        """A pass that needs every segment at once, and eight products with each."""
        segments = self._take()
        begin_s = perf_counter()
        tickets = []
        if streaming:
            for segment, place in zip(segments, self._places, strict=True):
                tickets.append(self._transfer.start(segment, place))
        for number in range(len(segments)):
            if streaming:
                self._transfer.wait(tickets[number])
            self._compute(8)
        return perf_counter() - begin_s

    def read_s(self) -> float:
        """One read after the other, in this thread."""
        segments = self._take()
        begin_s = perf_counter()
        for segment, place in zip(segments, self._places, strict=True):
            self._store.file.read_into(place.numpy(), self._segments.index(segment) * place.nbytes)
        return perf_counter() - begin_s


def measure(asked: argparse.Namespace) -> Costs:
    """Seconds for each transfer, of the version that is on the path."""
    torch.set_num_threads(1)
    size_bytes = parse_size(asked.size)
    check = CheckMode.ALWAYS if asked.check else CheckMode.NEVER
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        store = FileStore(Path(folder) / "segments", size_bytes)
        with HostTransfer(store, check=check, readers=asked.readers) as transfer:
            bench = Bench(store, transfer, asked.burst, asked.width)
            reads = statistics.median(bench.read_s() for _ in range(20))
            bench.set_window(4 * reads + 500e-6)
            passes = {
                "hidden": bench.hidden_s,
                "handover": bench.handover_s,
                "exposed": bench.exposed_s,
            }
            samples: dict[str, list[float]] = {name: [] for name in (*passes, "read")}
            for _ in range(asked.passes):
                for name, run in passes.items():
                    alone_s = run(streaming=False)
                    samples[name].append((run(streaming=True) - alone_s) / asked.burst)
                samples["read"].append(bench.read_s() / asked.burst)
    return {name: statistics.median(values) for name, values in samples.items()}


def in_version(folder: Path, arguments: Sequence[str]) -> Costs:
    """Measure the version in a folder, in a process of its own."""
    paths = os.pathsep.join((str(folder), str(folder / "runtime")))
    done = subprocess.run(
        [sys.executable, "-P", __file__, *arguments],  # -P: not the folder of this file
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    costs: Costs = json.loads(done.stdout.splitlines()[-1])["this"]
    return costs


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="72K", help="of a segment")
    parser.add_argument("--burst", type=int, default=4, help="segments started at once")
    parser.add_argument("--width", type=int, default=128, help="of the products")
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--passes", type=int, default=400)
    parser.add_argument("--check", action="store_true", help="compare every segment's CRC-32")
    parser.add_argument("--scratch", type=Path, default=None, help="where the file is written")
    parser.add_argument("--against", type=Path, help="folder of another version to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison")
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser.parse_args(given)
    for name in ("burst", "width", "readers", "passes", "rounds"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} {getattr(asked, name)}: expected 1 or more")
    found = compare(asked, given) if asked.against else {"this": measure(asked)}
    print(
        f"{asked.burst} segments of {format_size(parse_size(asked.size))} a pass, for each of them:"
    )
    for version, costs in found.items():
        figures = ", ".join(f"{name} {format_duration(costs[name])}" for name in sorted(costs))
        print(f"{version}: {figures}")
    if "other" in found:
        ratios = {
            name: found["this"][name] / found["other"][name]
            for name in ("handover", "hidden", "exposed")
        }
        print(", ".join(f"{name}: {ratio:.2f} of the other's" for name, ratio in ratios.items()))
    print(json.dumps(found))


def compare(asked: argparse.Namespace, given: Sequence[str]) -> dict[str, Costs]:
    """Both versions in turn; medians over the rounds."""
    index = given.index("--against") if "--against" in given else None
    assert index is not None, "write --against FOLDER"
    rest = [*given[:index], *given[index + 2 :]]
    folders = {"this": Path(__file__).resolve().parent.parent, "other": asked.against.resolve()}
    rounds: dict[str, list[Costs]] = {name: [] for name in folders}
    for _ in range(asked.rounds):
        for name, folder in folders.items():
            rounds[name].append(in_version(folder, rest))
    return {
        version: {
            name: statistics.median(costs[name] for costs in of_version) for name in of_version[0]
        }
        for version, of_version in rounds.items()
    }


if __name__ == "__main__":
    main()
