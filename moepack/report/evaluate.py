"""How good a packed model is, text by text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Group, RenderableType

from moepack.evaluating import Evaluation
from moepack.quality import BLOCK_TOKENS, CONFIDENCE, Estimate, Quality
from moepack.report.tables import columns, facts, figure


def evaluation_view(
    found: Evaluation, *, model: str, encodings: Mapping[str, int], exact: str
) -> RenderableType:
    """Every text, then all of them, and how it was measured.

    Parameters
    ----------
    encodings
        How many of the packed experts are in each.
    exact
        The exact model's name; or why there is none.
    """
    rows = [(domain.name, domain.quality) for domain in found.domains]
    if len(rows) > 1:
        rows.append(("all", found.quality))
    level = f"{CONFIDENCE:.0%}"
    head = ["text", "tokens", "perplexity", level]
    if found.quality.nearness is not None:
        head += ["exact", "KL", level, "same first", level]
    table = columns(head, [(name, *_cells(quality)) for name, quality in rows])
    scored = f"in windows of {found.window_tokens} tokens, {found.stride_tokens} apart"
    told = [
        ("model", f"{model}, {_experts(encodings)}"),
        *_nearness(found, exact),
        ("scored", f"what no routing profile learns from, each token once, {scored}"),
        *_decoded(found),
        (level, f"bootstrap over blocks of {BLOCK_TOKENS} tokens, within each text"),
    ]
    return Group(table, "", facts(told))


def _decoded(found: Evaluation) -> list[tuple[str, str]]:
    if not found.decoded:
        return []
    return [
        (
            "decoded",
            "one at a time, missing experts replaced or left out as planned: which, the caches say",
        )
    ]


def _experts(encodings: Mapping[str, int]) -> str:
    """``experts in INT8``, or ``96 experts in INT8, 160 in INT4_G32``."""
    if len(encodings) == 1:
        return f"experts in {next(iter(encodings))}"
    (first, count), *others = encodings.items()
    return ", ".join([f"{count} experts in {first}", *(f"{n} in {name}" for name, n in others)])


def _cells(quality: Quality) -> tuple[str, ...]:
    cells = (str(quality.tokens), *_with_interval(quality.perplexity, figure))
    if quality.nearness is None:
        return cells
    near = quality.nearness
    return (
        *cells,
        figure(near.exact_perplexity.value),
        *_with_interval(near.kl, _small),
        *_with_interval(near.top1_agreement, "{:.1%}".format),
    )


def _with_interval(estimate: Estimate, text: Callable[[float], str]) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return text(estimate.value), "-"
    return text(estimate.value), f"{text(estimate.low)} to {text(estimate.high)}"


def _small(number: float) -> str:
    """Three significant digits, of numbers far below 1 as well: ``0``, ``0.0120``, ``3.10e-07``."""
    return f"{number:#.3g}".rstrip(".") if number else "0"


def _nearness(found: Evaluation, exact: str) -> list[tuple[str, str]]:
    near = found.quality.nearness
    if near is None:
        return [("exact", f"not at hand: {exact}")]
    value, interval = _with_interval(near.perplexity_ratio, "{:.4f}".format)
    return [
        ("exact", f"{exact}; the perplexity is {value} of its own ({interval})"),
        (
            "KL",
            "of the exact model's next token from the packed model's, KL(exact || packed), nats",
        ),
        ("same first", "tokens at which both find the same one likeliest"),
    ]
