"""Charts as SVG: points at their places, labels apart, texts as texts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.hit_panels import BELADY, Chosen, HitPanel
from moepack.plan import POLICIES, SharedPool
from moepack.report.charts import Frame, Line, line_chart, spread
from moepack.report.layer_charts import budgets_chart, hit_chart, layers_chart
from moepack.report.markup import Element, element, to_html
from moepack.report.scale import axis
from tests.support.shown_plans import shown_plan

PLACES = st.lists(st.floats(0, 300), min_size=1, max_size=20).map(sorted)


@given(PLACES)
def test_labels_are_apart_and_inside_if_there_is_room(places: list[float]) -> None:
    found = spread(places, 14, 0, 300)
    assert all(b - a >= 14 - 1e-6 for a, b in itertools.pairwise(found))
    assert min(found) >= -1e-6
    assert max(found) <= 300 + 1e-6


@given(PLACES)
def test_labels_that_are_apart_stay_where_they_are(places: list[float]) -> None:
    apart = [place + 20 * index for index, place in enumerate(places)]
    assert spread(apart, 14, -1e6, 1e6) == pytest.approx(apart)


def circles(chart: Element) -> list[tuple[float, float]]:
    return [
        (float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in chart.iter("circle")
    ]


def chart(*lines: Line) -> Element:
    points = [point for line in lines for point in line.points]
    return line_chart(
        lines,
        axis([across for across, _, _ in points], str, most_ticks=5),
        axis([up for _, up, _ in points], str, most_ticks=5),
        frame=Frame(400, 200, left=50, right=100, top=10, bottom=40),
        x_label="memory",
        y_label="time",
    )


def test_points_lie_at_their_share_of_the_field() -> None:
    drawn = chart(Line("plan", "plan", ((1.0, 100.0, "a"), (10.0, 10.0, "b"), (100.0, 1.0, "c"))))
    assert circles(drawn) == [(50, 10), (175, 85), (300, 160)]
    told = [title.text for title in drawn.iter("title")]
    assert told == ["a", "b", "c"]


def test_every_line_is_named_and_no_two_names_touch() -> None:
    lines = [
        Line(name, "other", ((1.0, 10.0, ""), (10.0, 1.0 + index / 100, "")))
        for index, name in enumerate(("one", "two", "three"))
    ]
    drawn = chart(*lines)
    names = {
        text.text: float(text.attrib["y"])
        for text in drawn.iter("text")
        if text.attrib["class"] == "name"
    }
    assert names.keys() == {"one", "two", "three"}
    assert names["three"] < names["two"] < names["one"]
    assert min(abs(a - b) for a, b in itertools.combinations(names.values(), 2)) >= 14 - 1e-6


def test_texts_cannot_become_markup() -> None:
    hostile = "<script>alert('&')</script>\""
    text = to_html(element("p", hostile, title=hostile))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_mixed_children_stay_in_order() -> None:
    text = to_html(element("p", "a", element("b", "c"), "d", element("i"), "e"))
    assert "<p>a<b>c</b>d<i></i>e</p>" in text


def test_bars_are_as_high_as_what_is_kept() -> None:
    drawn = layers_chart(shown_plan(tops=(4, 8, 16), bottoms=(0, 0, 8), splits=(1.0, 1.0, 0.25)))
    kept = [
        {
            rect.attrib["class"]: float(rect.attrib["height"])
            for rect in group.iter("rect")
            if rect.attrib["class"] in {"tops", "bottoms"}
        }
        for group in drawn.iter("g")
    ]
    quarter = kept[0]["tops"]
    assert kept[1] == pytest.approx({"tops": 2 * quarter}, abs=0.02)
    assert kept[2] == pytest.approx({"tops": quarter, "bottoms": 1.5 * quarter}, abs=0.02)


@pytest.mark.parametrize("layers", [1, 3, 48, 94])
def test_every_layer_is_drawn_inside_the_chart(layers: int) -> None:
    plan = shown_plan(tops=[1 + layer % 9 for layer in range(layers)])
    drawn = layers_chart(plan)
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    titles = [title.text or "" for title in drawn.iter("title")]
    assert [title.split(":")[0] for title in titles] == [f"layer {n}" for n in range(layers)]
    for rect in drawn.iter("rect"):
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_a_sweep_shows_every_layer_under_every_budget() -> None:
    plans = [
        shown_plan(tops=(4, 8, 16), budget_bytes=4 << 30),
        shown_plan(pool=SharedPool(24, "lru"), budget_bytes=8 << 30),
    ]
    drawn = budgets_chart(plans)
    titles = [title.text for title in drawn.iter("title")]
    assert titles[:3] == [
        f"4G, layer {layer}: {share} kept" for layer, share in enumerate(("25%", "50%", "100%"))
    ]
    assert titles[3:] == [f"8G, layer {layer}: 50% kept" for layer in range(3)]


def test_curves_and_chosen_caches_lie_where_their_shares_are() -> None:
    shares = (0.0, 0.5, 1.0)
    curves = dict.fromkeys((*POLICIES, BELADY), (0.0, 0.6, 1.0))
    panel = HitPanel("layer 3", shares, curves, (Chosen(3, 0.5, 0.6, "lcp"),))
    drawn = hit_chart(panel)
    paths = [path.attrib["d"] for path in drawn.iter("path")]
    assert len(paths) == len(POLICIES) + 1
    middle = re.findall(r"[\d.]+ [\d.]+", paths[0])[1]
    assert circles(drawn) == [pytest.approx(tuple(map(float, middle.split())), abs=0.06)]
    assert [title.text for title in drawn.iter("title")][-1] == (
        "layer 3: 50% cached, 60.0% hit, lcp"
    )
