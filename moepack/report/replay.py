"""Strategies replayed side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from moepack.replayed_strategies import ReplayedStrategy
from moepack.report.tables import columns, figure
from moepack.units import format_duration, format_size

HEAD = (
    "strategy",
    "TTFT",
    "TPOT",
    "hit rate",
    "ready",
    "on demand",
    "ahead, used",
    "ahead, wasted",
    "waits a token",
    "events/s",
    "note",
)


def replay_view(found: Sequence[ReplayedStrategy], about: Sequence[str]) -> RenderableType:
    """A line for each strategy, then what the figures are of."""
    table = columns(HEAD, [_row(each) for each in found], texts=HEAD[-1:])
    events, seconds = sum(each.events for each in found), sum(each.seconds for each in found)
    speed = (
        f"{events} events (a layer over a token) in {format_duration(seconds)}, "
        f"{figure(events / seconds)} a second, tables of the routing included"
    )
    return Group(table, *_reasons(found), "", *about, speed)


def _reasons(found: Sequence[ReplayedStrategy]) -> list[str]:
    """Why strategies cannot be run, one line for each reason."""
    reasons = dict.fromkeys(each.why_not for each in found if not each.eligible)
    return [
        f"not to be run: {', '.join(each.name for each in found if each.why_not == why)}: {why}"
        for why in reasons
    ]


def _row(each: ReplayedStrategy) -> tuple[str, ...]:
    return (
        each.name,
        format_duration(each.ttft_s),
        format_duration(each.tpot_s),
        f"{each.hit_rate:.1%}",
        f"{each.ready_rate:.1%}",
        format_size(each.demand_bytes),
        format_size(each.ahead_used_bytes),
        format_size(each.ahead_wasted_bytes),
        format_duration(round(each.wait_s, 12)),  # less is rounding
        figure(each.events_per_s),
        "" if each.eligible else "not here",
    )
