"""Reading a trace back: its tracks, and whether a viewer could draw them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from moepack_runtime.chrome_trace import ChromeTrace


class Slice(NamedTuple):
    name: str
    begin_ns: int
    end_ns: int
    event: dict[str, Any]


def written(trace: ChromeTrace) -> dict[str, Any]:
    out = io.BytesIO()
    trace.write(out)
    document = json.loads(out.getvalue())
    assert isinstance(document, dict)
    return document


def tracks(document: dict[str, Any]) -> dict[str, list[Slice]]:
    """The slices of each named track, as the file orders them."""
    names = {
        event["tid"]: event["args"]["name"]
        for event in document["traceEvents"]
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    found: dict[str, list[Slice]] = {name: [] for name in names.values()}
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            begin_ns, length_ns = round(event["ts"] * 1000), round(event["dur"] * 1000)
            piece = Slice(event["name"], begin_ns, begin_ns + length_ns, event)
            found[names[event["tid"]]].append(piece)
    return found


def assert_apart(slices: Iterable[Slice]) -> None:
    for before, after in pairwise(slices):
        assert before.end_ns <= after.begin_ns


def assert_nested(slices: Iterable[Slice]) -> None:
    """In the file's order each slice lies inside the one that is open, or behind it."""
    open_ends: list[int] = []
    for piece in slices:
        while open_ends and open_ends[-1] <= piece.begin_ns:
            open_ends.pop()
        assert not open_ends or piece.end_ns <= open_ends[-1]
        open_ends.append(piece.end_ns)
