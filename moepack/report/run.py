"""A measurement beside its prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moepack.drift import Drift
from moepack.report.layers import bar
from moepack.report.tables import columns, facts, figure
from moepack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from moepack_runtime.stats import LayerStats, RunStats

    from moepack.yardstick import Slowness

#: More layers than this share rows.
MOST_ROWS = 16

_BAR = 24

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
    """Predicted beside measured, with the ratio and whether it lies in the band.

    What is expected at the speed that the processor had meanwhile stands between the two.
    """
    rows: list[tuple[str | Text, ...]] = []
    paced = any(drift.expected != drift.predicted for drift in drifts.values())
    for metric, drift in drifts.items():
        name, text = _METRICS[metric]
        predicted = [text(drift.predicted), *([text(drift.expected)] if paced else [])]
        ratio = "-" if drift.ratio is None else f"{drift.ratio:.2f}"
        mark = Text("in band", "green") if drift.in_band else Text("outside", "red")
        rows.append((name, *predicted, text(drift.measured), ratio, mark))
    titles = ("predicted", *(("at this pace",) if paced else ()), "measured", "ratio")
    return columns(("", *titles, f"band {1 / band:.2f} to {band:.2f}"), rows)


def run_view(
    stats: RunStats,
    drifts: Mapping[str, Drift],
    band: float,
    efficiency: float | None,
    slow: Slowness | None = None,
) -> RenderableType:
    """A measurement: what was predicted of it, what else there is, and its layers.

    Parameters
    ----------
    efficiency
        Rate of the link over what it gives at that size, where that is known.
    slow
        How many times as long the processor took as when it was profiled, where that is known.
    """
    told = [] if slow is None else [("processor", _pace_text(slow))]
    told += _facts(stats, efficiency)
    parts: list[RenderableType] = [drift_view(drifts, band), "", facts(told)]
    if stats.layers:
        parts += ["", _layers_table(stats.layers)]
    return Group(*parts)


def _facts(stats: RunStats, efficiency: float | None) -> Iterator[tuple[str, str]]:
    prompt = f"{stats.prompt_tokens} in the prompt, {format_duration(stats.ttft_s)} for it"
    rate = f"{figure(stats.prefill_tokens_per_s)} tokens/s"
    yield "tokens", f"{prompt} ({rate}); {stats.new_tokens} new"
    if stats.link_bytes_per_token is not None:
        yield "link", _bytes_text(stats)
        yield "", _link_text(stats, efficiency)
    if stats.wait_s is not None and stats.tpot_s is not None:
        wait_s = stats.wait_s / (stats.new_tokens - 1)
        share = wait_s / stats.tpot_s
        yield "waited", f"{format_duration(wait_s)} a token for the link, {share:.0%} of its time"
    if stats.substituted_per_token is not None and stats.substituted_rate is not None:
        yield (
            "replaced",
            (
                f"{figure(stats.substituted_per_token)} experts a token by low copies "
                f"({stats.substituted_rate:.1%} of those activated)"
            ),
        )
    if stats.skipped_per_token is not None and stats.skipped_rate is not None:
        yield "left out", f"{figure(stats.skipped_per_token)} a token ({stats.skipped_rate:.1%})"
    if stats.recall is not None:
        yield "recall", f"{stats.recall:.1%} of the experts that were needed had been predicted"
    process = f"{format_size(stats.process_base_bytes)} of it before the model"
    if stats.peak_process_bytes is not None:
        process = f"the process at most {format_size(stats.peak_process_bytes)}, {process}"
    else:
        process = f"the process itself {format_size(stats.process_base_bytes)}"
    yield "memory", f"{format_size(stats.peak_fast_bytes)} of the fast tier; {process}"


def _pace_text(slow: Slowness) -> str:
    """``took 1.31 times as long as when it was profiled beside prompts, 1.02 beside tokens``."""
    return (
        f"took {slow.prompt:.2f} times as long as when it was profiled beside prompts, "
        f"{slow.token:.2f} beside tokens"
    )


def _bytes_text(stats: RunStats) -> str:
    """``1.50 MiB a token: 1.00 MiB on demand, 512.00 KiB ahead, 0 B in vain``."""
    assert stats.link_bytes_per_token is not None
    parts = (
        (stats.demand_bytes_per_token, "on demand"),
        (stats.ahead_used_bytes_per_token, "ahead"),
        (stats.ahead_wasted_bytes_per_token, "in vain"),
    )
    told = [f"{format_size(size)} {name}" for size, name in parts if size is not None]
    return f"{format_size(stats.link_bytes_per_token)} a token: {', '.join(told)}"


def _link_text(stats: RunStats, efficiency: float | None) -> str:
    """How much of the time the link had work, and how fast it was then."""
    told = []
    if stats.link_busy_fraction is not None:
        told.append(f"busy {stats.link_busy_fraction:.0%} of the time")
    if stats.link_bytes_per_s is not None and stats.mean_read_bytes is not None:
        told.append(f"{format_rate(stats.link_bytes_per_s)} then")
        told.append(f"{format_size(stats.mean_read_bytes)} a transfer")
    if efficiency is not None:
        told.append(f"{efficiency:.0%} of what it gives at that size")
    return ", ".join(told)


def _layers_table(layers: Sequence[LayerStats]) -> Table:
    """A row for every layer, or the means of neighbours where there are many."""
    together = -(-len(layers) // MOST_ROWS)
    bands = [layers[at : at + together] for at in range(0, len(layers), together)]
    waits = [fmean(layer.wait_s_per_token for layer in band) for band in bands]
    longest = max(waits)

    def row(band: Sequence[LayerStats], wait_s: float) -> tuple[str, ...]:
        first, last = band[0].layer, band[-1].layer
        recalls = [layer.recall for layer in band if layer.recall is not None]
        return (
            str(first) if first == last else f"{first} to {last}",
            f"{fmean(layer.hit_rate for layer in band):.0%}",
            f"{fmean(layer.ready_rate for layer in band):.0%}",
            f"{fmean(recalls):.0%}" if recalls else "-",
            format_duration(wait_s),
            bar(wait_s / longest, 0.0, _BAR) if longest else "",
        )

    return columns(
        ("layers", "hit", "ready", "recall", "waited", ""),
        map(row, bands, waits),
        texts=("",),
    )
