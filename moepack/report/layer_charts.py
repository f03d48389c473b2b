"""What the layers of a plan keep, and what caches of every size would hit, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

from moepack.hit_panels import BELADY, HitPanel
from moepack.plan import POLICIES, Plan
from moepack.report.charts import Frame, svg
from moepack.report.layers import LayerRow, single_rows
from moepack.report.markup import Element, add, element
from moepack.units import format_size, short_size

# Tops of the scale of what is kept: the least that holds every bar is taken.
_TOPS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

# Height of the strips for splits and for policies.
_STRIP = 40.0

# A number of a layer is written under every so many-th, so that there are at most about 24.
_LABELS = 24


def layers_chart(plan: Plan) -> Element:
    """Bars of what every layer keeps; below them its split and its policy.

    Of a plan whose layers have slots of their own.
    """
    rows = single_rows(plan)
    frame = Frame(900, 320, left=76, right=16, top=14, bottom=140)
    chart = svg(frame, "what each layer keeps in fast memory, and how it is cut")
    kept = max(row.top_share + row.bottom_share for row in rows)
    top = next(step for step in _TOPS if kept <= step + 1e-9)
    for part in range(5):
        add(chart, *_level(frame, frame.y(part / 4), f"{top * part * 25:.3g} %", "grid"))
    add(chart, _side_label((frame.top + frame.end_y) / 2, "share kept"))
    split_top = frame.end_y + 24
    for share in (0.0, 1.0):
        add(chart, *_level(frame, split_top + (1 - share) * _STRIP, f"{share:g}", "grid"))
    add(chart, _side_label(split_top + _STRIP / 2, "split"))
    policy_top = split_top + _STRIP + 14
    add(chart, element("text", "policy", class_="tick end", x=frame.left - 8, y=policy_top + 11))
    step = (frame.end_x - frame.left) / len(rows)
    width = max(1.0, step * 0.8)
    every = -(-len(rows) // _LABELS)
    for place, row in enumerate(rows):
        left = frame.left + place * step + (step - width) / 2
        group = element("g", element("title", _told(row)), class_="layer")
        add(
            group,
            # What the pointer has to hit: the whole column.
            element(
                "rect", class_="column", x=left, y=frame.top, width=width, height=policy_top + 14
            ),
            *_bar(frame, left, width, row, top),
            element(
                "circle",
                class_="split",
                cx=left + width / 2,
                cy=split_top + (1 - row.splits[0]) * _STRIP,
                r=min(4.0, max(2.0, width / 2)),
            ),
            element(
                "rect",
                class_=f"policy {row.policies[0]}",
                x=left,
                y=policy_top,
                width=width,
                height=14,
            ),
        )
        if place % every == 0:
            at = left + width / 2
            add(group, element("text", row.name, class_="tick middle", x=at, y=policy_top + 30))
        add(chart, group)
    middle = (frame.left + frame.end_x) / 2
    add(chart, element("text", "layer", class_="label middle", x=middle, y=frame.height - 6))
    return chart


def budgets_chart(plans: Sequence[Plan]) -> Element:
    """What every layer keeps under every budget of a sweep, the darker the more."""
    height = 18.0
    frame = Frame(900, 46 + height * len(plans), left=76, right=16, top=6, bottom=40)
    chart = svg(frame, "what each layer keeps under each budget")
    for row, plan in enumerate(plans):
        top = frame.top + row * height
        name = short_size(plan.placement.fast_budget_bytes)
        add(chart, element("text", name, class_="tick end", x=frame.left - 8, y=top + 13))
        shares = _shares(plan)
        step = (frame.end_x - frame.left) / len(shares)
        every = -(-len(shares) // _LABELS)
        for place, (layer, share) in enumerate(shares):
            left = frame.left + place * step
            add(
                chart,
                element(
                    "rect",
                    element("title", f"{name}, layer {layer}: {share:.0%} kept"),
                    class_="heat",
                    x=left,
                    y=top,
                    width=step * 0.94,
                    height=height - 2,
                    fill_opacity=0.06 + 0.94 * share,
                ),
            )
            if row == len(plans) - 1 and place % every == 0:
                at = left + step / 2
                text = element("text", str(layer), class_="tick middle", x=at, y=top + height + 12)
                add(chart, text)
    middle = (frame.left + frame.end_x) / 2
    add(chart, element("text", "layer", class_="label middle", x=middle, y=frame.height - 5))
    return chart


def hit_chart(panel: HitPanel) -> Element:
    """Hit rate over the share of the experts that is cached; a dot for every chosen cache."""
    frame = Frame(300, 210, left=46, right=22, top=24, bottom=34)
    chart = svg(frame, f"hit rate over the share of the experts cached, {panel.name}")
    add(chart, element("text", panel.name, class_="heading", x=frame.left, y=14))
    for part in range(5):
        text = f"{part * 25} %" if part % 2 == 0 else ""
        add(chart, *_level(frame, frame.y(part / 4), text, "grid"))
        if text:
            at = frame.x(part / 4)
            tick = element("text", text, class_="tick middle", x=at, y=frame.end_y + 15)
            add(chart, tick)
    label = element(
        "text", "experts cached", class_="tick middle", x=frame.x(0.5), y=frame.height - 3
    )
    add(chart, label)
    for name in (BELADY, *reversed(POLICIES)):
        path = "M" + "L".join(
            f"{frame.x(share):.1f} {frame.y(rate):.1f}"
            for share, rate in zip(panel.shares, panel.curves[name], strict=True)
        )
        add(chart, element("path", element("title", name), class_=f"curve {name}", d=path))
    for point in panel.chosen:
        told = (
            f"layer {point.layer}: {point.share:.0%} cached, {point.hit_rate:.1%} hit, "
            f"{point.policy}"
        )
        if point.half_life_tokens is not None:
            told += f" {point.half_life_tokens:g}"
        add(
            chart,
            element(
                "circle",
                element("title", told),
                class_=f"chosen {point.policy}",
                cx=frame.x(point.share),
                cy=frame.y(point.hit_rate),
                r=4,
            ),
        )
    return chart


def _level(frame: Frame, at: float, text: str, kind: str) -> tuple[Element, Element]:
    """A horizontal line of the grid and its label."""
    return (
        element("line", class_=kind, x1=frame.left, x2=frame.end_x, y1=at, y2=at),
        element("text", text, class_="tick end", x=frame.left - 8, y=at + 4),
    )


def _side_label(at: float, text: str) -> Element:
    turn = f"rotate(-90 14 {at:g})"
    return element("text", text, class_="label middle", x=14.0, y=at, transform=turn)


def _bar(frame: Frame, left: float, width: float, row: LayerRow, top: float) -> list[Element]:
    """The tops, and the bottoms upon them."""
    parts = []
    base = 0.0
    for kind, share in (("tops", row.top_share), ("bottoms", row.bottom_share)):
        if share:
            upper, lower = frame.y((base + share) / top), frame.y(base / top)
            parts.append(
                element("rect", class_=kind, x=left, y=upper, width=width, height=lower - upper)
            )
        base += share
    return parts


def _told(row: LayerRow) -> str:
    text = (
        f"layer {row.name}: {format_size(row.budgets[0])}, {row.tops[0]} of {row.experts[0]} tops"
    )
    if row.splits[0] < 1:
        text += f", {row.bottoms[0]} bottoms"
    policy = " ".join((row.policies[0], *map("{:g}".format, row.half_lives)))
    return f"{text}, split {row.splits[0]:.2f}, policy {policy}, ahead: {row.prefetches[0]}"


def _shares(plan: Plan) -> list[tuple[int, float]]:
    """Layer, and how much of its experts is kept; of a pool every layer's even part."""
    pool = plan.placement.pool
    if pool is None:
        return [(row.layers[0], row.top_share + row.bottom_share) for row in single_rows(plan)]
    experts = sum(len(place.hot) for place in plan.placement.layers)
    return [(place.layer, pool.slots / experts) for place in plan.placement.layers]
