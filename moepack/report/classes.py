"""Plans whose experts differ in precision: who is stored in what, and what that will do."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from moepack.budget import class_slots
from moepack.plan import Plan
from moepack.predicted_quality import PredictedQuality, UniformQuality
from moepack.report.tables import by_layer, columns, figure


def classes_view(plan: Plan) -> RenderableType:
    """By layer and encoding how many experts there are, and how many of them have slots."""
    layers = [
        (
            place.layer,
            cut.class_sizes(len(place.hot)),
            dict(zip(cut.classes, class_slots(cut, place), strict=True)),
        )
        for cut, place in zip(plan.layout.layers, plan.placement.layers, strict=True)
    ]
    names = list(dict.fromkeys(name for _, sizes, _ in layers for name in sizes))
    rows = (
        (
            layer,
            tuple(f"{slots[name]}/{sizes[name]}" if name in sizes else "-" for name in names),
        )
        for layer, sizes, slots in layers
    )
    return columns(("slots of experts in", *names), by_layer(rows))


def quality_rows(quality: PredictedQuality, *, mixed: bool) -> Iterator[tuple[str, str]]:
    """What rounding is predicted to do, and what else the same bytes, or others, would.

    ``mixed``: whether experts differ in precision; else nothing was drawn among them.
    """
    told = f"perplexity {quality.perplexity_ratio - 1:+.2%}, KL {figure(quality.divergence)} nats"
    if mixed:
        told += f"; {figure(quality.at_random_divergence)} if as many bytes went to any experts"
    yield "predicted", told
    if not quality.as_measured:
        yield "", "measured of experts rounded by another calibration than these, or by one at all"
    yield "uniform", "; ".join(map(_uniform_words, quality.uniform))


def _uniform_words(each: UniformQuality) -> str:
    return (
        f"{each.encoding} {each.mean_bits:.3g} bits, perplexity {each.perplexity_ratio - 1:+.2%}, "
        f"KL {figure(each.divergence)}"
    )
