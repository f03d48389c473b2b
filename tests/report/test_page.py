"""The page: whole, self-contained, and with everything on it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from moepack.explain import Explanation, Finding, TokenTime
from moepack.hit_panels import BELADY, Chosen, HitPanel
from moepack.plan import POLICIES, Plan, SharedPool
from moepack.precision import Precision
from moepack.report.page import PageContents, plan_page
from moepack.sweep import Sweep
from moepack.units import GIB
from moepack.what_if import WhatIf
from tests.support.shown_plans import baseline, shown_plan

BASELINES = {
    "on_demand": baseline(0.2, ttft_s=2.0),
    "lru": baseline(0.06),
    "lru_prefetch": baseline(0.04, why_not="this engine fetches nothing ahead"),
    "belady": baseline(0.03, why_not="it knows the future"),
}
HOSTILE = "</style><script>alert(1)</script><b>&"

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; collects texts, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def read(page: bytes) -> Reader:
    reader = Reader()
    reader.feed(page.decode())
    reader.close()
    assert reader.open == []
    return reader


def contents(plan: Plan, *, asked_for: bool = True, swept: Sweep | None = None) -> PageContents:
    token = TokenTime(0.05, 0.02, 0.03, 0.04, 5e6, 1e6)
    found = Finding("link", "busy for 80% of a token")
    faster = WhatIf("link", 2.0, 12 * GIB, 0.6, 0.03, 0.6, 5 / 3, "link 2x: 30 ms instead of 50 ms")
    shares = (0.0, 0.5, 1.0)
    panel = HitPanel(
        "layers 0 to 2",
        shares,
        dict.fromkeys((*POLICIES, BELADY), (0.0, 0.7, 1.0)),
        (Chosen(0, 0.25, 0.4, "lcp"),),
    )
    explanation = Explanation("link", token, (found,), (faster,))
    return PageContents(plan, asked_for, explanation, [panel], Precision("int8", 8.13), swept)


def swept_plans(count: int = 5, layers: int = 48) -> Sweep:
    return Sweep(
        tuple(
            shown_plan(
                tops=[1 + (layer + step) % 9 for layer in range(layers)],
                budget_bytes=(4 + 2 * step) * GIB,
                tpot_s=0.2 / (1 + step),
                baselines={name: BASELINES[name] for name in BASELINES},
                assumptions=("routing is assumed",),
            )
            for step in range(count)
        ),
        capacity_bytes=9 * GIB,
    )


@pytest.fixture(scope="module")
def page() -> bytes:
    swept = swept_plans()
    return plan_page(contents(swept.plans[2], swept=swept))


def test_elements_are_closed_in_order(page: bytes) -> None:
    tags = read(page).tags
    assert tags[:2] == ["html", "head"]
    assert tags.count("svg") >= 5
    assert page.startswith(b"<!doctype html>")


def test_nothing_is_fetched_from_anywhere(page: bytes) -> None:
    reader = read(page)
    assert not {"link", "img", "iframe", "object", "embed", "script"} & set(reader.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in reader.attributes}
    assert not re.search(rb"https?://|url\(|@import|@font-face", page)


def test_light_dark_and_paper_are_provided_for(page: bytes) -> None:
    assert b"prefers-color-scheme: dark" in page
    assert b"@media print" in page


def test_every_layer_strategy_and_budget_is_told(page: bytes) -> None:
    reader = read(page)
    for layer in range(48):
        assert f"layer {layer}: " in reader.text
    for name in BASELINES:
        assert reader.texts.count(name) >= 2 + 1  # both charts, and the table
    for size in ("4G", "6G", "8G", "10G", "12G"):
        assert size in reader.texts
    for words in (
        "busy for 80% of a token",
        "link 2x: 30 ms instead of 50 ms",
        "layer 0: 25% cached, 40.0% hit, lcp",
        "assumed: routing is assumed",
        "derived, by hand",
        "not to be run: belady: it knows the future",
        "waiting for the link takes 60% of a token",
    ):
        assert words in reader.text


def test_a_single_plan_is_a_page_too() -> None:
    reader = read(plan_page(contents(shown_plan(baselines=BASELINES))))
    assert "The plan for 12G" in reader.texts
    assert "budget of fast memory" not in reader.text


def test_layers_that_share_a_pool_are_told_in_words() -> None:
    swept = Sweep((shown_plan(pool=SharedPool(12, "lru")),))
    reader = read(plan_page(contents(swept.plans[0], asked_for=False, swept=swept)))
    assert "12 slots for whole experts that all 3 layers share" in reader.text
    assert "The plan for 12G, one of the sweep" in reader.texts


def test_no_text_becomes_markup() -> None:
    plan = shown_plan(
        name=HOSTILE,
        chosen=HOSTILE,
        baselines={HOSTILE: baseline(0.1, why_not=HOSTILE)},
        assumptions=(HOSTILE,),
    )
    page = plan_page(contents(plan, swept=Sweep((plan,))))
    reader = read(page)
    assert "script" not in reader.tags
    assert HOSTILE.encode() not in page
    assert HOSTILE in reader.text
