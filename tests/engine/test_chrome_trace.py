"""A trace is what Perfetto expects, whatever order the events came in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moepack_runtime.chrome_trace import ChromeTrace
from moepack_runtime.observers import Purpose
from moepack_runtime.transfer import Ticket

from moepack.segments import SegmentId
from tests.support.traces import assert_apart, assert_nested, tracks, written

TOP, BOTTOM = SegmentId(3, 17, "top"), SegmentId(3, 17, "bottom")


def ticket(segment: SegmentId, begin_s: float, end_s: float, stored_bytes: int = 4096) -> Ticket:
    made = Ticket(segment, stored_bytes)
    made.begin_s, made.end_s = begin_s, end_s
    return made


def two_layers_and_a_head(trace: ChromeTrace, at_s: float) -> None:
    """One pass, told as an engine does: what is inside ends, and is told, first."""
    for layer in (0, 3):
        begin_s = at_s + 0.01 * layer
        trace.computed("attention", layer, begin_s, begin_s + 0.002)
        trace.computed("route", layer, begin_s + 0.002, begin_s + 0.003)
        trace.segment(TOP, begin_s + 0.004, begin_s + 0.005)
        trace.waited(BOTTOM, begin_s + 0.005, begin_s + 0.007)
        trace.segment(BOTTOM, begin_s + 0.007, begin_s + 0.008)
        trace.computed("layer", layer, begin_s, begin_s + 0.008)
    trace.computed("head", 4, at_s + 0.038, at_s + 0.04)


def test_a_layer_holds_its_parts_and_a_pass_its_layers() -> None:
    trace = ChromeTrace()
    for at_s in (7000.0, 7000.05):
        two_layers_and_a_head(trace, at_s)
    found = tracks(written(trace))
    assert_nested(found["compute"])
    first = found["compute"][:5]
    assert [piece.name for piece in first] == [
        "layer 0",
        "attention",
        "route",
        "3/17/top",
        "3/17/bottom",
    ]
    assert [piece.begin_ns for piece in first] == [0, 0, 2_000_000, 4_000_000, 7_000_000]
    assert [piece.name for piece in found["waits"]] == 4 * ["3/17/bottom"]
    assert [(piece.name, piece.begin_ns, piece.end_ns) for piece in found["passes"]] == [
        ("pass 0", 0, 40_000_000),
        ("pass 1", 50_000_000, 90_000_000),
    ]


def test_transfers_that_overlap_lie_on_tracks_of_their_own() -> None:
    trace = ChromeTrace()
    trace.fetched(ticket(TOP, 5.2, 5.3), "ahead_used")
    trace.fetched(ticket(TOP, 5.0, 5.2), "demand")
    trace.fetched(ticket(BOTTOM, 5.1, 5.4, stored_bytes=8192), "ahead_wasted")
    document = written(trace)
    found = tracks(document)
    assert [piece.name for piece in found["link 1"]] == ["demand 3/17/top", "ahead 3/17/top"]
    assert [piece.name for piece in found["link 2"]] == ["wasted 3/17/bottom"]
    assert found["link 2"][0].event["args"] == {"bytes": 8192, "purpose": "ahead_wasted"}
    colours = {piece.event["cname"] for name in ("link 1", "link 2") for piece in found[name]}
    assert len(colours) == 3
    carried = [
        (event["ts"], event["args"]["bytes"])
        for event in document["traceEvents"]
        if event["ph"] == "C"
    ]
    assert carried == [
        (0.0, 4096),
        (100_000.0, 12288),
        (200_000.0, 8192),
        (200_000.0, 12288),
        (300_000.0, 8192),
        (400_000.0, 0),
    ]


PURPOSES: list[Purpose] = ["demand", "ahead_used", "ahead_wasted"]


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 2), st.integers(0, 3), st.sampled_from(PURPOSES)),
        max_size=40,
    )
)
def test_no_track_of_the_link_ever_overlaps(
    transfers: list[tuple[float, float, int, Purpose]],
) -> None:
    trace = ChromeTrace()
    for begin_s, length_s, expert, purpose in transfers:
        segment = SegmentId(0, expert, "top")
        trace.fetched(ticket(segment, begin_s, begin_s + length_s), purpose)
    found = tracks(written(trace))
    links = [slices for name, slices in found.items() if name.startswith("link")]
    assert sum(map(len, links)) == len(transfers)
    for slices in links:
        assert_apart(slices)
        assert all(piece.begin_ns >= 0 for piece in slices)


def test_a_full_trace_says_what_it_dropped() -> None:
    trace = ChromeTrace(most=3)
    two_layers_and_a_head(trace, 1.0)
    assert len(trace) == 3
    document = written(trace)
    assert document["otherData"] == {"dropped_events": trace.dropped} == {"dropped_events": 10}
    assert sum(map(len, tracks(document).values())) == 3


def test_an_empty_trace_is_a_trace() -> None:
    assert not any(tracks(written(ChromeTrace())).values())


@pytest.mark.parametrize("uptime_s", [1.0, 4e7])
def test_what_touches_as_numbers_touches_as_text(uptime_s: float) -> None:
    trace = ChromeTrace()
    at_s = uptime_s
    for _ in range(100):
        end_s = at_s + 1e-6 / 3
        trace.segment(TOP, at_s, end_s)
        at_s = end_s
    slices = tracks(written(trace))["compute"]
    assert_apart(slices)
    assert all(before.end_ns == after.begin_ns for before, after in pairwise(slices))


def test_memory_is_what_is_said_of_it() -> None:
    trace = ChromeTrace()
    for place in range(100_000):
        trace.segment(TOP, place * 1e-3, place * 1e-3 + 5e-4)
    numbers = trace._computed._numbers
    assert numbers.buffer_info()[1] * numbers.itemsize == 24 * 100_000
