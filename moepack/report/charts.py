"""Line charts as SVG: lines are named where they end, and every point tells its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moepack.report.markup import Element, add, element
from moepack.report.scale import Axis

# Of a line of small text.
_LINE = 14.0


class Line(NamedTuple):
    """One line of a chart.

    Attributes
    ----------
    kind : str
        Class of its group: how it is drawn is the page's matter.
    points : tuple of (x, y, text)
        The text is shown over the point.
    """

    name: str
    kind: str
    points: tuple[tuple[float, float, str], ...]


class Frame(NamedTuple):
    """Where a chart has its field, in its own units."""

    width: float
    height: float
    left: float = 76.0
    right: float = 150.0
    top: float = 12.0
    bottom: float = 44.0

    @property
    def end_x(self) -> float:
        """The right edge of the field."""
        return self.width - self.right

    @property
    def end_y(self) -> float:
        """The lower edge of the field."""
        return self.height - self.bottom

    def x(self, share: float) -> float:
        """Of a share of the horizontal axis."""
        return self.left + share * (self.end_x - self.left)

    def y(self, share: float) -> float:
        """Of a share of the vertical axis, which points up."""
        return self.end_y - share * (self.end_y - self.top)


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    frame: Frame,
    x_label: str,
    y_label: str,
    marker: tuple[float, str] | None = None,
) -> Element:
    """A chart of lines; the first lies above the others.

    Parameters
    ----------
    marker
        A value of the horizontal axis to be marked, and its name.
    """
    chart = svg(frame, f"{y_label} over {x_label}")
    add(chart, *_grid(x, y, frame, x_label, y_label))
    if marker is not None:
        at = frame.x(x.share(marker[0]))
        add(
            chart,
            element("line", class_="marker", x1=at, x2=at, y1=frame.top, y2=frame.end_y),
            element("text", marker[1], class_="note", x=at + 4, y=frame.top + 10),
        )
    long = [line for line in lines if len(line.points) > 1]
    # Lines that end alike are named in the order in which they lie on the way there.
    long.sort(key=lambda line: _order(line, y))
    ends = [frame.y(y.share(line.points[-1][1])) for line in long]
    labels = dict(zip(long, spread(ends, _LINE, frame.top + 4, frame.end_y), strict=True))
    for line in reversed(lines):
        add(chart, _line(line, x, y, frame, labels.get(line)))
    return chart


def svg(frame: Frame, title: str) -> Element:
    """An empty drawing, as wide as there is room for."""
    return element(
        "svg",
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_label=title,
        style=f"max-width:{frame.width:g}px",
    )


def spread(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move ascending places apart until neighbours are ``least`` apart, no farther than they must.

    They stay between ``low`` and ``high`` if there is room for all.
    """
    # Each group of touching labels lies around the mean of where its members want to be.
    groups: list[tuple[list[int], float]] = []
    for index, wish in enumerate(places):
        members, centre = [index], wish
        while True:
            half = (len(members) - 1) * least / 2
            centre = max(low + half, min(high - half, centre))
            if not groups:
                break
            before, before_centre = groups[-1]
            reach = before_centre + len(before) * least / 2 + len(members) * least / 2
            if centre >= reach - 1e-9:
                break
            groups.pop()
            members = before + members
            wanted = [places[i] - place * least for place, i in enumerate(members)]
            centre = sum(wanted) / len(wanted) + (len(members) - 1) * least / 2
        groups.append((members, centre))
    found = [0.0] * len(places)
    for members, centre in groups:
        for place, index in enumerate(members):
            found[index] = centre + (place - (len(members) - 1) / 2) * least
    return found


def _grid(x: Axis, y: Axis, frame: Frame, x_label: str, y_label: str) -> list[Element]:
    parts = []
    for tick in y.ticks:
        at = frame.y(y.share(tick))
        parts += [
            element("line", class_="grid", x1=frame.left, x2=frame.end_x, y1=at, y2=at),
            element("text", y.text(tick), class_="tick end", x=frame.left - 8, y=at + 4),
        ]
    for tick in x.ticks:
        at = frame.x(x.share(tick))
        parts += [
            element("line", class_="grid", x1=at, x2=at, y1=frame.end_y, y2=frame.end_y + 5),
            element("text", x.text(tick), class_="tick middle", x=at, y=frame.end_y + 18),
        ]
    middle_x, middle_y = (frame.left + frame.end_x) / 2, (frame.top + frame.end_y) / 2
    turn = f"rotate(-90 14 {middle_y:g})"
    parts += [
        element(
            "line", class_="axis", x1=frame.left, x2=frame.end_x, y1=frame.end_y, y2=frame.end_y
        ),
        element("text", x_label, class_="label middle", x=middle_x, y=frame.height - 6),
        element("text", y_label, class_="label middle", x=14.0, y=middle_y, transform=turn),
    ]
    return parts


def _order(line: Line, y: Axis) -> tuple[float, float]:
    """From the top: by where a line ends, roughly, and then by its mean."""
    shares = [y.share(up) for _, up, _ in line.points]
    return -round(shares[-1], 2), -sum(shares) / len(shares)


def _line(line: Line, x: Axis, y: Axis, frame: Frame, label: float | None) -> Element:
    """A line, named at ``label`` in the margin; a single point is named beside it."""
    places = [(frame.x(x.share(across)), frame.y(y.share(up))) for across, up, _ in line.points]
    path = "M" + "L".join(f"{across:.1f} {up:.1f}" for across, up in places)
    group = element("g", class_=f"line {line.kind}")
    end_x, end_y = places[-1]
    if label is None:
        add(group, element("text", line.name, class_="name", x=end_x + 8, y=end_y - 8))
    else:
        name_x = frame.end_x + 16
        leader = f"M{end_x + 2:.1f} {end_y:.1f}L{name_x - 3:.1f} {label:.1f}"
        add(
            group,
            element("path", class_="reach", d=path),
            element("path", class_="stroke", d=path),
            element("path", class_="leader", d=leader),
            element("text", line.name, class_="name", x=name_x, y=label + 4),
        )
    for (across, up), (_, _, text) in zip(places, line.points, strict=True):
        add(group, element("circle", element("title", text), cx=across, cy=up, r=3.5))
    return group
