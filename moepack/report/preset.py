"""The presets that ship, each in a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moepack.hardware import HardwareProfile
from moepack.links import LinkPreset
from moepack.presets import Preset
from moepack.report.tables import columns
from moepack.routing_model import RoutingModel
from moepack.units import MIB, format_duration, format_rate, format_size

#: Transfers whose rate stands for a link: about an expert of a large model.
_TRANSFER_BYTES = 16 * MIB


def presets_view(presets: Sequence[Preset]) -> RenderableType:
    """Presets by kind, each with what it says in short."""
    parts: list[RenderableType] = []
    for kind in dict.fromkeys(preset.kind for preset in presets):
        if parts:
            parts.append("")
        records = [preset.load() for preset in presets if preset.kind == kind]
        parts.append(_table(kind.name, records))
    return Group(*parts)


def _table(kind: str, records: Sequence[Any]) -> RenderableType:
    if kind == "hardware":
        head = ("hardware", "fast memory", "its rate", "link", "device")
        return columns(head, [_hardware_row(record) for record in records])
    if kind == "link":
        return columns(("link", "rate", "latency"), [_link_row(record) for record in records])
    titles = (kind, "recall", "fitted to", "off by, on average")
    return columns(titles, [_routing_row(record) for record in records])


def _hardware_row(hardware: HardwareProfile) -> tuple[str | Text, ...]:
    rate = _TRANSFER_BYTES / hardware.link_seconds(_TRANSFER_BYTES)
    return (
        hardware.name,
        format_size(hardware.fast_bytes),
        format_rate(hardware.memory.bytes_per_s),
        format_rate(rate),
        hardware.device_name,
    )


def _routing_row(model: RoutingModel) -> tuple[str, ...]:
    errors = [abs(line.fitted - line.recorded) for line in model.fit]
    fit = (f"{len(errors)} figures", f"{sum(errors) / len(errors):.3f}") if errors else ("", "")
    return model.name, f"{model.recall:.0%}" if model.recall else "blind", *fit


def _link_row(link: LinkPreset) -> tuple[str, ...]:
    return link.name, format_rate(link.rate_bytes_per_s), format_duration(link.latency_s)
