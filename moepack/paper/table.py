"""Figures side by side: published ones, ours, and what there is to say of them."""

from __future__ import annotations

from typing import Literal

from moepack.records import record

#: Values are in seconds, shares and bytes; shown in these.
Unit = Literal["ms", "s", "%", "GiB"]


@record
class Column:
    """Head of a column of figures, and the unit that they are shown in."""

    head: str
    unit: Unit


@record
class Row:
    """One line: None where there is no figure."""

    name: str
    values: tuple[float | None, ...]


@record
class PaperTable:
    """Figures side by side, and what there is to say of them."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
