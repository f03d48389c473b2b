"""A plan, or a sweep of plans, as one page that a browser shows without any network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import NamedTuple

from moepack.explain import Explanation
from moepack.hit_panels import BELADY, HitPanel
from moepack.plan import POLICIES, Plan
from moepack.precision import Precision
from moepack.report.explain import WHAT_IF_HEAD, limit_sentence, what_if_cells
from moepack.report.layer_charts import budgets_chart, hit_chart, layers_chart
from moepack.report.layers import pool_sentence
from moepack.report.markup import Child, Element, element, to_html
from moepack.report.plan import (
    host_sentence,
    memory_rows,
    planner_sentence,
    precision_words,
    trunk_rows,
)
from moepack.report.strategies import HEAD, reasons, standing_sentences, strategy_rows
from moepack.report.sweep import SWEEP_HEAD, sweep_cells, sweep_sentences
from moepack.report.sweep_charts import sweep_charts
from moepack.report.tables import figure
from moepack.sweep import Sweep
from moepack.units import format_duration, format_size, short_size


class PageContents(NamedTuple):
    """What a page tells.

    Attributes
    ----------
    plan : Plan
        The one that is told in full.
    asked_for : bool
        Whether it was asked for; otherwise it is one of the sweep's.
    panels : sequence of HitPanel
        What caches of every size would hit, and what the plan chose.
    precision : Precision
        Of the plan's experts.
    swept : Sweep or None
        Plans for other budgets.
    """

    plan: Plan
    asked_for: bool
    explanation: Explanation
    panels: Sequence[HitPanel]
    precision: Precision
    swept: Sweep | None = None


def plan_page(contents: PageContents) -> bytes:
    """The whole document, in UTF-8; everything that it needs is inside."""
    plan, swept = contents.plan, contents.swept
    title = f"{plan.model_name} on {plan.provenance.hardware}"
    sections = [] if swept is None else [_swept(swept, plan if contents.asked_for else None)]
    sections += [
        _plan(contents),
        _strategies(plan),
        _limits(contents.explanation),
        _caches(contents.panels, pooled=plan.placement.pool is not None),
        _made_from(plan, contents.precision),
    ]
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"moepack: {title}"),
            element("style", (files("moepack.report") / "page.css").read_text("utf-8")),
        ),
        element("body", element("h1", title), _lead(contents), *sections),
        lang="en",
    )
    return to_html(root).encode()


def _lead(contents: PageContents) -> Element:
    plan = contents.plan
    text = "What fast memory should hold, and how fast the model then is: made by moepack plan"
    if contents.swept is not None:
        budgets = [short_size(point.budget_bytes) for point in contents.swept.points]
        text += f" for {len(budgets)} budgets from {budgets[0]} to {budgets[-1]}"
    priced = plan.placement
    text += (
        f". Priced for a prompt of {priced.prompt_tokens} tokens and {priced.new_tokens} new ones, "
        f"with room for {priced.context_tokens}."
    )
    if priced.host is not None and priced.host.bounces:
        text += f" Host memory: {host_sentence(plan)}."
    return element("p", text, class_="soft")


def _swept(swept: Sweep, marked: Plan | None) -> Element:
    rows = [_row(sweep_cells(plan), {0, len(SWEEP_HEAD) - 1}, "baseline") for plan in swept.plans]
    charts = [
        element("figure", chart, element("figcaption", caption))
        for chart, caption in sweep_charts(swept, marked)
    ]
    return element(
        "section",
        element("h2", "Over the budget of fast memory"),
        _sentences(sweep_sentences(swept)),
        *charts,
        element(
            "figure",
            element("h3", "What each layer keeps under each budget"),
            budgets_chart(swept.plans),
            element(
                "figcaption",
                "Share of the layer's experts, by bytes: the stronger the colour, the more.",
            ),
        ),
        element(
            "details",
            element("summary", "The figures of every budget"),
            _table(SWEEP_HEAD, rows, {0, len(SWEEP_HEAD) - 1}),
        ),
    )


def _plan(contents: PageContents) -> Element:
    plan = contents.plan
    placement, forecast = plan.placement, plan.prediction
    budget = short_size(placement.fast_budget_bytes)
    tiles = [
        ("first token", format_duration(forecast.ttft_s), f"{placement.prompt_tokens} tokens"),
        (
            "each token",
            format_duration(forecast.tpot_s),
            f"{figure(forecast.tokens_per_s)} a second",
        ),
        ("hit rate", f"{forecast.hit_rate:.1%}", f"whole in time: {forecast.ready_rate:.1%}"),
        ("over the link", format_size(forecast.link_bytes_per_token), "a token"),
        (
            "fast memory",
            format_size(placement.memory.total_bytes),
            f"of {format_size(placement.fast_budget_bytes)}",
        ),
        ("band", f"x {forecast.band:.3g}", "times are expected within"),
    ]
    grid = element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", value, element("small", beside)),
            )
            for name, value, beside in tiles
        ),
        class_="tiles",
    )
    if placement.pool is not None:
        layers: list[Child] = [element("p", pool_sentence(plan, placement.pool))]
    else:
        layers = [
            element(
                "figure",
                layers_chart(plan),
                _legend((f"policy {policy}", f"policy {policy}") for policy in POLICIES),
                element(
                    "figcaption",
                    "Share of each layer's experts that stays in fast memory (bottoms paler, above "
                    "the tops), where its experts are cut, and which expert leaves a full cache.",
                ),
            )
        ]
    memory = [_row(cells, {0}, "baseline") for cells in memory_rows(placement.memory)]
    which = "" if contents.asked_for else ", one of the sweep"
    return element(
        "section",
        element("h2", f"The plan for {budget}{which}"),
        grid,
        *layers,
        element(
            "details",
            element("summary", "Fast memory by purpose"),
            _table(("fast memory", "bytes", "share"), memory, {0}),
        ),
    )


def _strategies(plan: Plan) -> Element:
    text_columns = {0, len(HEAD) - 1}
    rows = [_row(row.cells, text_columns, row.kind) for row in strategy_rows(plan)]
    return element(
        "section",
        element("h2", "Beside other strategies"),
        _table(HEAD, rows, text_columns),
        _sentences([*standing_sentences(plan), *reasons(plan)]),
    )


def _limits(explanation: Explanation) -> Element:
    words = element("dl", class_="words")
    for finding in explanation.findings:
        words.extend([element("dt", finding.about), element("dd", finding.text)])
    rows = [_row(what_if_cells(row), {0}, "baseline") for row in explanation.what_if]
    return element(
        "section",
        element("h2", "What limits it"),
        element("p", element("strong", limit_sentence(explanation))),
        words,
        *([_table(WHAT_IF_HEAD, rows, {0})] if rows else []),
    )


def _caches(panels: Sequence[HitPanel], *, pooled: bool) -> Element:
    curves = [(f"curve {name}", name) for name in (*POLICIES, BELADY)]
    caption = (
        "Hit rate over the share of a layer's experts that is cached, mean of the layers; belady "
        "knows the future. "
    )
    caption += (
        "Layers share one pool: none has a size of its own."
        if pooled
        else ("A dot is the cache of one layer under the plan.")
    )
    return element(
        "section",
        element("h2", "What caches would hit"),
        element("p", caption, class_="soft"),
        _legend(curves),
        element("div", *(hit_chart(panel) for panel in panels), class_="panels"),
    )


def _made_from(plan: Plan, precision: Precision) -> Element:
    made = plan.provenance
    rows = [
        ("experts", precision_words(precision)),
        *trunk_rows(plan),
        ("hardware", made.hardware + (" (this machine)" if made.hardware_is_this_machine else "")),
        ("compute", made.compute),
        ("routing", made.routing),
        ("planner", planner_sentence(plan.planner)),
        ("layout", plan.layout.digest),
    ]
    words = element("dl", class_="words")
    for name, value in rows:
        words.extend([element("dt", name), element("dd", value)])
    assumed = [f"assumed: {sentence}" for sentence in made.assumptions]
    return element("section", element("h2", "Made from"), words, _sentences(assumed))


def _sentences(sentences: Iterable[str]) -> Element:
    return element("ul", *(element("li", sentence) for sentence in sentences))


def _legend(entries: Iterable[tuple[str, str]]) -> Element:
    """Names beside what they stand for: a stroke of a curve, or a patch."""

    def sample(kind: str) -> Element:
        if kind.startswith("curve"):
            return element("path", class_=kind, d="M0 5H26")
        return element("rect", class_=kind, width=26, height=10)

    return element(
        "div",
        *(
            element(
                "span", element("svg", sample(kind), viewBox="0 0 26 10", aria_hidden="true"), name
            )
            for kind, name in entries
        ),
        class_="legend",
    )


def _row(cells: Sequence[str], texts: set[int], kind: str) -> Element:
    return element(
        "tr",
        *(
            element("td", cell, **({"class_": "text"} if place in texts else {}))
            for place, cell in enumerate(cells)
        ),
        class_=kind,
    )


def _table(head: Sequence[str], rows: Sequence[Element], texts: set[int]) -> Element:
    titles = (
        element("th", title, **({"class_": "text"} if place in texts else {}))
        for place, title in enumerate(head)
    )
    table = element("table", element("thead", element("tr", *titles)), element("tbody", *rows))
    return element("div", table, class_="scroll")
