"""What each layer keeps, as bars; neighbours that do alike share a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from moepack.layout import LayerLayout
from moepack.plan import LayerPlacement, Plan, SharedPool
from moepack.report.tables import columns
from moepack.units import short_size

T = TypeVar("T")
V = TypeVar("V", int, float, str)

#: More rows than this become bands of neighbours.
MOST_ROWS = 24

_BAR = 19
_TOP, _BOTTOM, _EMPTY = "█", "▒", "·"


class LayerRow(NamedTuple):
    """Some neighbouring layers, and how they are placed.

    Attributes
    ----------
    layers : tuple of int
    top_share, bottom_share : float
        Of all bytes of their experts, how many stay as tops and as bottoms.
    """

    layers: tuple[int, ...]
    top_share: float
    bottom_share: float
    splits: tuple[float, ...]
    tops: tuple[int, ...]
    bottoms: tuple[int, ...]
    experts: tuple[int, ...]
    budgets: tuple[int, ...]
    policies: tuple[str, ...]
    half_lives: tuple[float, ...]
    prefetches: tuple[str, ...]

    @property
    def name(self) -> str:
        """``7`` or ``7 to 11``."""
        first, last = self.layers[0], self.layers[-1]
        return str(first) if first == last else f"{first} to {last}"


def layer_rows(plan: Plan, most: int = MOST_ROWS) -> list[LayerRow]:
    """Every layer in order; at most so many rows."""
    single = single_rows(plan)
    alike = [_joined(list(group)) for _, group in groupby(single, key=lambda row: row[1:])]
    if len(alike) <= most:
        return alike
    longest = -(-len(single) // most)
    return [_joined(single[at : at + longest]) for at in range(0, len(single), longest)]


def single_rows(plan: Plan) -> list[LayerRow]:
    """Every layer in a row of its own."""
    return [
        _row(cut, place)
        for cut, place in zip(plan.layout.layers, plan.placement.layers, strict=True)
    ]


def layers_view(plan: Plan) -> RenderableType:
    """Per layer a bar of what is kept, its split, its policy and what it fetches ahead."""
    if plan.placement.pool is not None:
        return Text(pool_sentence(plan, plan.placement.pool))
    rows = layer_rows(plan)
    table = columns(
        ("layer", "kept of all experts", "slots", "tops", "bottoms", "split", "policy", "ahead"),
        (
            (
                row.name,
                bar(row.top_share, row.bottom_share),
                _span(row.budgets, short_size),
                f"{_span(row.tops, str)}/{row.experts[0]}",
                f"{_span(row.bottoms, str)}/{row.experts[0]}" if any(row.bottoms) else "-",
                _span(row.splits, "{:.2f}".format),
                "\n".join(row.policies),
                ",".join(row.prefetches),
            )
            for row in rows
        ),
        texts=("policy", "ahead"),
    )
    half_lives = sorted({each for row in rows for each in row.half_lives})
    marks = f"{_TOP} tops" + (f"   {_BOTTOM} bottoms" if any(any(r.bottoms) for r in rows) else "")
    told = [f"{marks}   {_EMPTY} fetched when needed"]
    if half_lives:
        span = _span(half_lives, "{:g}".format)
        told.append(f"lfu_decay: an activation counts half after {span} tokens")
    return Group(table, *told)


def pool_sentence(plan: Plan, pool: SharedPool) -> str:
    """What a plan whose layers share their slots keeps."""
    experts = sum(len(place.hot) for place in plan.placement.layers)
    ahead = sorted({_prefetch(place) for place in plan.placement.layers})
    return (
        f"{pool.slots} slots for whole experts that all {len(plan.placement.layers)} layers share "
        f"({pool.slots / experts:.0%} of {experts} experts), policy {pool.policy}, fetched ahead: "
        f"{', '.join(ahead)}"
    )


def bar(top_share: float, bottom_share: float, cells: int = _BAR) -> str:
    """A bar of so many cells; anything that is there at all takes one at least."""
    tops = min(cells, max(round(top_share * cells), int(top_share > 0)))
    kept = min(cells, max(round((top_share + bottom_share) * cells), tops + (bottom_share > 0)))
    return _TOP * tops + _BOTTOM * (kept - tops) + _EMPTY * (cells - kept)


def _row(cut: LayerLayout, place: LayerPlacement) -> LayerRow:
    experts, split = len(place.hot), cut.split_ratio
    return LayerRow(
        layers=(place.layer,),
        top_share=split * place.top_slots / experts,
        bottom_share=(1 - split) * place.bottom_slots / experts,
        splits=(split,),
        tops=(place.top_slots,),
        bottoms=(place.bottom_slots,),
        experts=(experts,),
        budgets=(place.budget_bytes,),
        policies=(place.policy,),
        half_lives=() if place.half_life_tokens is None else (place.half_life_tokens,),
        prefetches=(_prefetch(place),),
    )


def _joined(rows: Sequence[LayerRow]) -> LayerRow:
    """One row for several: mean shares, and every value that occurs, once."""

    def values(of: Callable[[LayerRow], tuple[V, ...]]) -> tuple[V, ...]:
        return tuple(sorted({value for row in rows for value in of(row)}))

    return LayerRow(
        layers=tuple(layer for row in rows for layer in row.layers),
        top_share=sum(row.top_share for row in rows) / len(rows),
        bottom_share=sum(row.bottom_share for row in rows) / len(rows),
        splits=values(lambda row: row.splits),
        tops=values(lambda row: row.tops),
        bottoms=values(lambda row: row.bottoms),
        experts=values(lambda row: row.experts),
        budgets=values(lambda row: row.budgets),
        policies=values(lambda row: row.policies),
        half_lives=values(lambda row: row.half_lives),
        prefetches=values(lambda row: row.prefetches),
    )


def _span(values: Sequence[T], text: Callable[[T], str]) -> str:
    """``7``, or ``5-9`` where they differ; the values ascend."""
    ends = text(values[0]), text(values[-1])
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def _prefetch(place: LayerPlacement) -> str:
    return "off" if place.prefetch == "off" else f"{place.prefetch} {place.prefetch_depth}"
