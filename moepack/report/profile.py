"""A machine, and a model on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from moepack.agreement import Comparison
from moepack.compute import ComputeProfile
from moepack.hardware import HardwareProfile
from moepack.report.routing import routing_view
from moepack.report.tables import columns, facts, figure
from moepack.roofline_check import RooflineCheck
from moepack.routing import RoutingProfile
from moepack.units import format_duration, format_rate, format_size

#: What a piece of a layer is called in the table.
_PIECES = {
    "attention": "attention",
    "router": "router",
    "fixed": "pass over experts",
    "expert": "expert",
    "expert_split": "expert in two",
    "ffn": "FFN",
}


def hardware_view(
    hardware: HardwareProfile, comparisons: Sequence[Comparison] = ()
) -> RenderableType:
    """A machine, measured or not, and how it compares with an earlier profile."""
    link = hardware.link
    memory = hardware.memory
    rows = [
        ("machine", f"{hardware.name} ({hardware.source})"),
        ("device", f"{hardware.device_name}, {hardware.cores} cores"),
        ("RAM", format_size(hardware.ram_bytes)),
    ]
    if hardware.vram_bytes is not None:
        rows.append(("VRAM", format_size(hardware.vram_bytes)))
    rows += [
        ("memory", f"{format_rate(memory.bytes_per_s)}, spread {memory.spread:.0%}"),
        ("launch", f"{format_duration(hardware.launch_s)}, spread {hardware.launch_spread:.0%}"),
        ("link", f"{link.how}{'' if link.past_cache else ' (NOT past the page cache)'}"),
    ]
    if comparisons:
        rows.append(("last time", _agreement(comparisons)))
    curve = columns(
        ("transfer", "rate", "spread"),
        (
            (format_size(point.size_bytes), format_rate(point.bytes_per_s), f"{point.spread:.0%}")
            for point in link.points
        ),
    )
    return Group(facts(rows), "", curve)


def _agreement(comparisons: Sequence[Comparison]) -> str:
    outside = [comparison for comparison in comparisons if not comparison.agrees]
    text = (
        f"{len(comparisons) - len(outside)} of {len(comparisons)} figures are within their spreads "
        "of the profile before"
    )
    if outside:
        worst = max(outside, key=lambda found: abs(math.log(found.ratio)) / found.allowed)
        text += f"; {worst.name} is {figure(worst.ratio)} of what it was"
    return text


def profile_view(
    hardware: HardwareProfile,
    compute: ComputeProfile,
    routing: RoutingProfile,
    check: RooflineCheck,
    comparisons: Sequence[Comparison] = (),
) -> RenderableType:
    """A machine, and a model on it."""
    summary = routing.summary
    overview = facts(
        [
            ("model", summary.model_name),
            ("threads", str(compute.threads)),
            ("head", _head(compute)),
            ("roofline", _roofline(check)),
            ("routing", f"{summary.tokens} tokens of {len(summary.sources)} texts"),
        ]
    )
    return Group(
        hardware_view(hardware, comparisons),
        "",
        overview,
        "",
        _compute(check),
        "",
        routing_view(summary),
    )


def _head(compute: ComputeProfile) -> str:
    words = f"{format_duration(compute.head_s)} a token"
    if compute.rounded_head_s is None:
        return words
    return f"{words}, {format_duration(compute.rounded_head_s)} in int8"


def _roofline(check: RooflineCheck) -> str:
    return (
        f"derives {check.token_ratio:.2f} of the measured time for a token and "
        f"{check.block_ratio:.2f} for {check.block_tokens}"
    )


def _compute(check: RooflineCheck) -> Table:
    """Seconds of each piece for one token and for a block, measured and derived."""
    rows = []
    for found in check.pieces:
        piece, _, stored = found.piece.partition(" ")
        name = f"layers {found.layers[0]} to {found.layers[-1]}: {_PIECES[piece]}"
        name += f", {stored}" if stored else ""
        rows.append((name, *map(format_duration, found[2:])))
    whole = (check.token_s, check.derived_token_s, check.block_s, check.derived_block_s)
    rows.append(("the whole model", *map(format_duration, whole)))
    head = ("compute", "1 token", "derived", f"{check.block_tokens} tokens", "derived")
    return columns(head, rows)
