"""How a model routes, and what caches would make of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

from rich.console import Group, RenderableType

from moepack.hit_rates import CACHED_SHARES, LayerHitRates
from moepack.report.tables import columns
from moepack.routing import LayerRouting, RoutingSummary

#: More layers than this are shown in bands.
MOST_ROWS = 12

#: Bands that the layers after the first then become.
_BANDS = 8


def routing_view(summary: RoutingSummary) -> RenderableType:
    """Two tables with a row for every layer, or for every band of neighbours: their means."""
    bands = layer_bands(summary.layers)
    routed = columns(
        ("layers", "experts", "top-k", "entropy", "reuse", "recall at k", "at 2k"),
        (_routing_row([summary.layers[row] for row in band]) for band in bands),
    )
    if not summary.hit_rates:
        return routed
    percent = ", ".join(f"{share:.0%}" for share in CACHED_SHARES)
    hits = columns(
        ("hit rate", "lru", "lfu", "lcp", "bound"),
        (_hits_row([summary.hit_rates[row] for row in band]) for band in bands),
    )
    legend = f"in %, with {percent} of the experts cached; bound: knowing what comes"
    return Group(routed, "", hits, legend)


def layer_bands(layers: Sequence[LayerRouting]) -> list[range]:
    """Which layers share a row: none where they are few.

    Else all but the first, which routes unlike the others, in bands of neighbours of one shape.
    """
    return bands_of([(layer.num_experts, layer.top_k) for layer in layers])


def bands_of(shapes: Sequence[Hashable]) -> list[range]:
    """The same of layers whose shapes are these."""
    if len(shapes) <= MOST_ROWS:
        return [range(row, row + 1) for row in range(len(shapes))]
    longest = -(-(len(shapes) - 1) // _BANDS)
    bands = [range(1)]
    for row in range(1, len(shapes)):
        band = bands[-1]
        if row > 1 and shapes[row] == shapes[row - 1] and len(band) < longest:
            bands[-1] = range(band.start, row + 1)
        else:
            bands.append(range(row, row + 1))
    return bands


def _name(band: Sequence[LayerRouting] | Sequence[LayerHitRates]) -> str:
    first, last = band[0].layer, band[-1].layer
    return str(first) if first == last else f"{first} to {last}"


def _routing_row(band: Sequence[LayerRouting]) -> tuple[str, ...]:
    return (
        _name(band),
        str(band[0].num_experts),
        str(band[0].top_k),
        f"{fmean(layer.usage_entropy for layer in band):.2f}",
        f"{fmean(layer.reuse for layer in band):.0%}",
        f"{fmean(layer.recall_at_k for layer in band):.0%}",
        f"{fmean(layer.recall_at_2k for layer in band):.0%}",
    )


def _hits_row(band: Sequence[LayerHitRates]) -> tuple[str, ...]:
    def cell(curves: Sequence[tuple[float, ...]]) -> str:
        means = (fmean(rates) for rates in zip(*curves, strict=True))
        return " ".join(f"{100 * mean:3.0f}" for mean in means)

    return (
        _name(band),
        cell([layer.lru for layer in band]),
        cell([layer.lfu for layer in band]),
        cell([layer.lcp for layer in band]),
        cell([layer.belady for layer in band]),
    )
