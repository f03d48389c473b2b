"""A machine, and a model on it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from moepack.compute import ComputeProfile
from moepack.hardware import HardwareProfile
from moepack.report.routing import routing_view
from moepack.report.tables import columns, facts
from moepack.routing import RoutingProfile
from moepack.units import format_duration, format_rate, format_size


def hardware_view(hardware: HardwareProfile) -> RenderableType:
    """A machine, measured or not."""
    link = hardware.link
    rows = [
        ("machine", f"{hardware.name} ({hardware.source})"),
        ("device", f"{hardware.device_name}, {hardware.cores} cores"),
        ("RAM", format_size(hardware.ram_bytes)),
    ]
    if hardware.vram_bytes is not None:
        rows.append(("VRAM", format_size(hardware.vram_bytes)))
    rows += [
        ("memory", format_rate(hardware.memory.bytes_per_s)),
        ("launch", format_duration(hardware.launch_s)),
        ("link", f"{link.how}{'' if link.past_cache else ' (NOT past the page cache)'}"),
    ]
    curve = columns(
        ("transfer", "rate", "spread"),
        (
            (format_size(point.size_bytes), format_rate(point.bytes_per_s), f"{point.spread:.0%}")
            for point in link.points
        ),
    )
    return Group(facts(rows), "", curve)


def profile_view(
    hardware: HardwareProfile, compute: ComputeProfile, routing: RoutingProfile
) -> RenderableType:
    """A machine, and a model on it."""
    summary = routing.summary
    overview = facts(
        [
            ("model", summary.model_name),
            ("head", f"{format_duration(compute.head_s)} a token"),
            ("routing", f"{summary.tokens} tokens of {len(summary.sources)} texts"),
        ]
    )
    return Group(
        hardware_view(hardware),
        "",
        overview,
        "",
        _compute(compute),
        "",
        routing_view(summary),
    )


def _compute(compute: ComputeProfile) -> Table:
    """Seconds of each piece for one token and for a block."""
    rows = []
    for kind in compute.layers:
        pieces = {
            "attention": kind.attention,
            "router": kind.router,
            "expert": kind.expert,
            "expert in two": kind.expert_split,
            "FFN": kind.ffn,
        }
        name = f"layers {kind.layers[0]} to {kind.layers[-1]}"
        for piece, curve in pieces.items():
            if curve is not None:
                one, block = curve.seconds[0], curve.seconds[-1]
                rows.append((f"{name}: {piece}", format_duration(one), format_duration(block)))
    tokens = compute.layers[0].attention.tokens
    return columns(("compute", f"{tokens[0]} token", f"{tokens[-1]} tokens"), rows)
