"""A paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from moepack.paper.table import PaperTable, Unit
from moepack.report.tables import columns
from moepack.units import GIB

_SHOWN: dict[Unit, tuple[float, int]] = {
    "ms": (1e3, 1),
    "s": (1, 2),
    "%": (100, 1),
    "GiB": (1 / GIB, 2),
}


def paper_view(tables: Sequence[PaperTable], assumptions: Sequence[str]) -> RenderableType:
    """Table after table, then what was assumed."""
    parts: list[RenderableType] = []
    for table in tables:
        head = ["", *(_head(column.head, column.unit) for column in table.columns)]
        rows = [
            [
                row.name,
                *(
                    _cell(value, column.unit)
                    for value, column in zip(row.values, table.columns, strict=True)
                ),
            ]
            for row in table.rows
        ]
        parts += [table.title, columns(head, rows), *table.notes, ""]
    return Group(*parts, *assumptions)


def _head(head: str, unit: Unit) -> str:
    return f"{head}, {unit}"


def _cell(value: float | None, unit: Unit) -> str:
    if value is None:
        return ""
    scale, digits = _SHOWN[unit]
    return f"{round(value * scale, digits) + 0.0:.{digits}f}"  # no minus before a zero
