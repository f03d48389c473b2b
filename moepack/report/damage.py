"""What rounding does to a model, layer by layer, and what choices of precision come to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType

from moepack.calibration import Calibration
from moepack.damage import DamageProfile, LayerDamage
from moepack.mixed_precision import MixedPrecision
from moepack.plan import OnMiss
from moepack.report.routing import bands_of
from moepack.report.tables import columns, facts, figure
from moepack.units import format_size

#: The experts that take rounding worst: one of so many.
_WORST_OF = 8


def damage_view(
    damage: DamageProfile,
    choices: Sequence[tuple[str, MixedPrecision]],
    rule: OnMiss | None = None,
    calibration: Calibration | None = None,
) -> RenderableType:
    """Two tables: every layer, or band of neighbours; and what some choices are predicted to do.

    Parameters
    ----------
    choices
        Each under its name, by ascending bits.
    rule
        For missing experts, of those that were tried; None where none was.
    calibration
        What rounding is weighed by; None: nothing is said of it.
    """
    bands = bands_of([(len(layer.errors[0]), layer.encodings) for layer in damage.layers])
    measured = columns(
        ("layers", "output", *_names(damage), f"worst 1/{_WORST_OF}", "KL", "slope"),
        (
            _row([damage.layers[row] for row in band], _names(damage), damage.scale)
            for band in bands
        ),
    )
    chosen = columns(
        ("precision", "bits", "KL", "perplexity"),
        (
            (name, f"{c.mean_bits:.2f}", figure(c.divergence), f"{c.perplexity_ratio - 1:+.2%}")
            for name, c in choices
        ),
    )
    worst = f"{_WORST_OF}th of the experts that take it worst"
    told = facts(
        [
            ("output", "what a layer's routed experts add, as a share of the residual stream"),
            ("errors", "squared, of the output under rounding, as a share of the stream's square"),
            (f"worst 1/{_WORST_OF}", f"how much of the last is that of the {worst}"),
            ("KL", "of the whole model with only this layer rounded to that, nats a token"),
            ("slope", "how much KL grows for a unit of error"),
            ("floor", f"{figure(damage.floor)}: the KL that any change at all comes to"),
            *(() if rule is None else [("misses", _misses(damage, rule))]),
            *(() if calibration is None else [("rounding", _kept(calibration))]),
            ("measured", f"on {damage.tokens} tokens, KL on {damage.divergence_tokens}"),
        ]
    )
    return Group(measured, "", chosen, "", told)


def _kept(calibration: Calibration) -> str:
    """Which second moments there are, by which errors are made good."""
    kept = calibration.kept.values()
    if not kept:
        return "weighed by mean squares alone"
    whose = "expert's" if all(each.by_expert for each in kept) else "layer's"
    parts = []
    for what, widths in (
        (f"of each {whose} inputs, for gate and up", {each.hidden for each in kept}),
        ("of each expert's neurons, for down", {each.neurons for each in kept}),
    ):
        if widths != {0}:
            parts.append(f"{what}, {_range(widths)} together")
        else:
            parts.append(f"none {what}: they would take too much")
    size = format_size(calibration.second_bytes)
    return f"makes errors good by second moments ({size}): {'; '.join(parts)}"


def _range(widths: set[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low}" if low == high else f"{low} to {high}"


def _misses(damage: DamageProfile, rule: OnMiss) -> str:
    """What replacing missing experts by a rule does, if all are missing."""
    assert damage.misses is not None, "a rule of none"
    trial = next(
        each
        for each in damage.misses.trials
        if (each.exact_up_to, each.low_up_to) == (rule.exact_up_to, rule.low_up_to)
    )
    pair = f"{rule.exact_up_to:g},{rule.low_up_to:g}"
    return (
        f"best replaced by T1,T2 of {pair} ({damage.misses.encoding}): with all experts missing "
        f"{trial.saved:.0%} of their bytes saved, KL {figure(trial.divergence)}"
    )


def _names(damage: DamageProfile) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for layer in damage.layers for name in layer.encodings))


def _row(band: Sequence[LayerDamage], names: Sequence[str], scale: float) -> tuple[str, ...]:
    first, last = band[0].layer, band[-1].layer
    cells = []
    for name in names:
        errors = [
            sum(layer.errors[layer.encodings.index(name)])
            for layer in band
            if name in layer.encodings
        ]
        cells.append(figure(float(np.mean(errors))) if errors else "")
    worst = []
    for layer in band:
        errors = sorted(layer.errors[-1], reverse=True)
        worst.append(sum(errors[: max(1, len(errors) // _WORST_OF)]) / (sum(errors) or 1.0))
    return (
        str(first) if first == last else f"{first} to {last}",
        f"{np.mean([layer.output for layer in band]):.0%}",
        *cells,
        f"{np.mean(worst):.0%}",
        figure(float(np.mean([layer.coarse_divergence for layer in band]))),
        figure(float(np.mean([layer.slope for layer in band]) * scale)),
    )
