"""A measurement beside its prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moepack.drift import Drift
from moepack.report.tables import columns, facts, figure
from moepack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from moepack_runtime.stats import RunStats


#: Name and way of printing of each metric of :data:`moepack.drift.METRICS`.
_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ttft_s": ("first token", format_duration),
    "tpot_s": ("each token", format_duration),
    "tokens_per_s": ("tokens/s", figure),
    "hit_rate": ("hit rate", "{:.1%}".format),
    "ready_rate": ("ready rate", "{:.1%}".format),
    "link_bytes_per_token": ("link bytes a token", format_size),
    "peak_fast_bytes": ("peak fast memory", format_size),
}


def drift_view(drifts: Mapping[str, Drift], band: float) -> Table:
    """Predicted beside measured, with the ratio and whether it lies in the band."""
    rows = []
    for metric, drift in drifts.items():
        name, text = _METRICS[metric]
        ratio = "-" if drift.ratio is None else f"{drift.ratio:.2f}"
        mark = Text("in band", "green") if drift.in_band else Text("outside", "red")
        rows.append((name, text(drift.predicted), text(drift.measured), ratio, mark))
    return columns(
        ("", "predicted", "measured", "ratio", f"band {1 / band:.2f} to {band:.2f}"), rows
    )


def stats_view(stats: RunStats) -> RenderableType:
    """What a generation measured beyond what was predicted."""
    rows = [
        (
            "tokens",
            (
                f"{stats.prompt_tokens} in the prompt at {figure(stats.prefill_tokens_per_s)} "
                f"tokens/s, {stats.new_tokens} new"
            ),
        ),
        (
            "memory",
            (
                f"{format_size(stats.peak_fast_bytes)} of the fast tier, and "
                f"{format_size(stats.process_base_bytes)} for the process itself"
            ),
        ),
    ]
    if stats.wait_s is not None:
        rows.insert(1, ("waited", f"{format_duration(stats.wait_s)} for the link while decoding"))
    if stats.link_bytes_per_s is not None and stats.mean_read_bytes is not None:
        rate, size = format_rate(stats.link_bytes_per_s), format_size(stats.mean_read_bytes)
        rows.insert(1, ("link", f"{rate} while it had work, {size} a transfer"))
    return facts(rows)


def bench_view(stats: RunStats, drifts: Mapping[str, Drift], band: float) -> RenderableType:
    """The table of a bench."""
    return Group(drift_view(drifts, band), "", stats_view(stats))
