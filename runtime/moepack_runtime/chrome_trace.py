"""When things happened in a run, as a trace that Perfetto and Chrome's tracing page open.

The format is the JSON object of the Trace Event Format: complete events (``ph`` X) on named
tracks, a counter, times in microseconds. While the model runs an event is three numbers; all else
is worked out when the trace is written.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from moepack.segments import SegmentId
from moepack_runtime.observers import Purpose, Timeline
from moepack_runtime.progress import NO_PROGRESS, Progress, working
from moepack_runtime.transfer import Ticket

#: Events that a trace holds at most: about a thousand tokens of 48 layers.
MAX_EVENTS = 1 << 21

#: Of each purpose the word in front of the name, which is where Perfetto takes its colour from,
#: and the colour in Chrome's palette.
_PURPOSES: dict[Purpose, tuple[str, str]] = {
    "demand": ("demand", "thread_state_running"),
    "ahead_used": ("ahead", "thread_state_runnable"),
    "ahead_wasted": ("wasted", "terrible"),
}

# Tracks; the link takes as many as it needs from its own on.
_PASSES, _COMPUTE, _WAITS, _LINK = 1, 2, 3, 10

# Events that are text at once.
_CHUNK = 1 << 14

Integers = npt.NDArray[np.int64]
Kind = TypeVar("Kind", bound=Hashable)


class _Computed(NamedTuple):
    what: str
    layer: int


class _Fetched(NamedTuple):
    segment: SegmentId
    purpose: Purpose
    crossed_bytes: int


class ChromeTrace(Timeline):
    """Remembers what an engine shows of its time, and writes it.

    Tracks: the passes over all layers, the compute, what it waited for, and the link, of which
    there are as many as transfers overlapped. Memory: 24 bytes an event while the model runs, six
    times that while it is written.

    Parameters
    ----------
    most : int
        Events after this many are dropped.

    Attributes
    ----------
    dropped : int
        How many that were.
    """

    def __init__(self, most: int = MAX_EVENTS) -> None:
        self._left = most
        self.dropped = 0
        self._computed: _Lane[_Computed | SegmentId] = _Lane()
        self._waited: _Lane[SegmentId] = _Lane()
        self._fetched: _Lane[_Fetched] = _Lane()

    def __len__(self) -> int:
        return len(self._computed) + len(self._waited) + len(self._fetched)

    @override
    def fetched(self, ticket: Ticket, purpose: Purpose) -> None:
        if self._has_room():
            kind = _Fetched(ticket.segment, purpose, ticket.crossed_bytes)
            self._fetched.add(kind, ticket.begin_s, ticket.end_s)

    @override
    def computed(self, what: str, layer: int, begin_s: float, end_s: float) -> None:
        if self._has_room():
            self._computed.add(_Computed(what, layer), begin_s, end_s)

    @override
    def segment(self, segment: SegmentId, begin_s: float, end_s: float) -> None:
        if self._has_room():
            self._computed.add(segment, begin_s, end_s)

    @override
    def waited(self, segment: SegmentId, begin_s: float, end_s: float) -> None:
        if self._has_room():
            self._waited.add(segment, begin_s, end_s)

    def _has_room(self) -> bool:
        if not self._left:
            self.dropped += 1
            return False
        self._left -= 1
        return True

    def write(self, out: BinaryIO, progress: Progress = NO_PROGRESS) -> None:
        """Write the trace as JSON, a few thousand events at a time."""
        computed = self._computed.in_order()
        waited = self._waited.in_order()
        fetched = self._fetched.in_order()
        every = (computed.begin_ns, waited.begin_ns, fetched.begin_ns)
        begins = [int(begin_ns[0]) for begin_ns in every if len(begin_ns)]
        zero_ns = min(begins, default=0)
        link = _side_by_side(fetched)
        few = [*_names(tracks=max(link, default=-1) + 1), *_passes(computed, zero_ns)]
        many = chain(
            _slices(computed, [_COMPUTE] * len(computed), zero_ns),
            _slices(waited, [_WAITS] * len(waited), zero_ns),
            _slices(fetched, [_LINK + track for track in link], zero_ns),
            _bytes_in_flight(fetched, zero_ns),
        )
        out.write(f'{{"otherData":{{"dropped_events":{self.dropped}}},'.encode())
        out.write(b'"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(few).encode())
        total = len(self) + 2 * len(fetched)
        with working(progress, "write the trace (events)", total, "items"):
            while chunk := list(islice(many, _CHUNK)):
                out.write(b",\n" + ",\n".join(chunk).encode())
                progress.advance(len(chunk))
        out.write(b"\n]}\n")


@dataclass(frozen=True)
class _Events(Generic[Kind]):
    """Events by their begin; one that contains others stands before them.

    Attributes
    ----------
    kinds
        What events there are.
    kind, begin_ns, end_ns : int64 [events]
        Of each its place among the kinds, and when it was: in whole nanoseconds, so that what
        nests or touches does so as text, too.
    """

    kinds: tuple[Kind, ...]
    kind: Integers
    begin_ns: Integers
    end_ns: Integers

    def __len__(self) -> int:
        return len(self.kind)

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Kind, begin and end of each."""
        for at in range(0, len(self), _CHUNK):
            some = slice(at, at + _CHUNK)
            yield from zip(
                self.kind[some].tolist(),
                self.begin_ns[some].tolist(),
                self.end_ns[some].tolist(),
                strict=True,
            )


class _Lane(Generic[Kind]):
    """Events as they come."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, int] = {}
        self._numbers = array("d")

    def __len__(self) -> int:
        return len(self._numbers) // 3

    def add(self, kind: Kind, begin_s: float, end_s: float) -> None:
        self._numbers.extend((self._kinds.setdefault(kind, len(self._kinds)), begin_s, end_s))

    def in_order(self) -> _Events[Kind]:
        numbers = np.frombuffer(self._numbers).reshape(-1, 3)
        begin_ns, end_ns = np.rint(numbers[:, 1:] * 1e9).astype(np.int64).T
        order = np.lexsort((-end_ns, begin_ns))
        kind = numbers[order, 0].astype(np.int64)
        return _Events(tuple(self._kinds), kind, begin_ns[order], end_ns[order])


def _side_by_side(events: _Events[_Fetched]) -> list[int]:
    """Of each the first track that is free when it begins."""
    free_ns: list[int] = []
    tracks = []
    for _, begin_ns, end_ns in events.rows():
        track = next((i for i, free in enumerate(free_ns) if free <= begin_ns), len(free_ns))
        free_ns[track : track + 1] = [end_ns]
        tracks.append(track)
    return tracks


def _names(tracks: int) -> Iterator[str]:
    """What the process and its tracks are called; the order of tracks is that of their numbers."""
    names = {_PASSES: "passes", _COMPUTE: "compute", _WAITS: "waits"}
    names |= {_LINK + track: f"link {track + 1}" for track in range(tracks)}
    yield json.dumps({"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "moepack"}})
    for track, name in names.items():
        of_track = {"ph": "M", "pid": 1, "tid": track}
        yield json.dumps({**of_track, "name": "thread_name", "args": {"name": name}})
        yield json.dumps({**of_track, "name": "thread_sort_index", "args": {"sort_index": track}})


def _slices(
    events: _Events[_Computed | SegmentId] | _Events[SegmentId] | _Events[_Fetched],
    tracks: Sequence[int],
    zero_ns: int,
) -> Iterator[str]:
    heads = [json.dumps(_head(kind), separators=(",", ":"))[:-1] for kind in events.kinds]
    for (kind, begin_ns, end_ns), track in zip(events.rows(), tracks, strict=True):
        begin, duration = _microseconds(begin_ns - zero_ns), _microseconds(end_ns - begin_ns)
        yield f'{heads[kind]},"tid":{track},"ts":{begin},"dur":{duration}}}'


def _head(kind: _Computed | SegmentId | _Fetched) -> dict[str, object]:
    """What all slices of a kind have in common."""
    head: dict[str, object] = {"ph": "X", "pid": 1}
    if isinstance(kind, SegmentId):
        return {**head, "name": _name(kind), "cat": "segment"}
    if isinstance(kind, _Computed):
        name = f"layer {kind.layer}" if kind.what == "layer" else kind.what
        return {**head, "name": name, "cat": "compute", "args": {"layer": kind.layer}}
    word, colour = _PURPOSES[kind.purpose]
    return {
        **head,
        "name": f"{word} {_name(kind.segment)}",
        "cat": "link",
        "cname": colour,
        "args": {"bytes": kind.crossed_bytes, "purpose": kind.purpose},
    }


def _name(segment: SegmentId) -> str:
    return f"{segment.layer}/{segment.expert}/{segment.part}"


def _passes(events: _Events[_Computed | SegmentId], zero_ns: int) -> Iterator[str]:
    """One slice for each run through the layers, from the first of them to behind the last."""
    found: list[list[int]] = []
    last_layer = -1
    for number, begin_ns, end_ns in events.rows():
        kind = events.kinds[number]
        if not isinstance(kind, _Computed) or kind.what not in ("layer", "head"):
            continue
        if kind.layer <= last_layer or not found:
            found.append([begin_ns, end_ns])
        found[-1][1] = end_ns
        last_layer = kind.layer
    for place, (begin_ns, end_ns) in enumerate(found):
        begin, duration = _microseconds(begin_ns - zero_ns), _microseconds(end_ns - begin_ns)
        yield (
            f'{{"ph":"X","pid":1,"name":"pass {place}","cat":"pass","tid":{_PASSES},'
            f'"ts":{begin},"dur":{duration}}}'
        )


def _bytes_in_flight(events: _Events[_Fetched], zero_ns: int) -> Iterator[str]:
    """A counter: what the link carries at any time."""
    crossed_bytes = np.array([kind.crossed_bytes for kind in events.kinds], np.int64)[events.kind]
    times_ns = np.concatenate((events.begin_ns, events.end_ns))
    changes = np.concatenate((crossed_bytes, -crossed_bytes))
    order = np.lexsort((changes, times_ns))  # what ends makes room for what begins
    for time_ns, carried in zip(
        times_ns[order].tolist(), changes[order].cumsum().tolist(), strict=True
    ):
        yield (
            f'{{"ph":"C","pid":1,"name":"bytes in flight","ts":{_microseconds(time_ns - zero_ns)},'
            f'"args":{{"bytes":{carried}}}}}'
        )


def _microseconds(time_ns: int) -> str:
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"
