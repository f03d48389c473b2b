"""What rounding is predicted to do to a plan's model, beside what uniform precision would do.

From the damage that was measured (:mod:`moepack.damage`); how good a model really is, says
``moepack eval``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from moepack.damage import DamageProfile
from moepack.encodings import ENCODINGS, fitting
from moepack.layout import Layout
from moepack.mixed_precision import MixedPrecision, precision_of_layers, uniform_precision
from moepack.model_spec import ModelSpec
from moepack.records import added, record


@record
class UniformQuality:
    """The same model with every expert in one encoding."""

    encoding: str
    mean_bits: float
    divergence: float
    perplexity_ratio: float


@record
class PredictedQuality:
    """What a layout's experts are predicted to do.

    Attributes
    ----------
    mean_bits : float
        Of a routed weight, its share of scales included.
    divergence : float
        From the exact model, in nats a token.
    perplexity_ratio : float
        By what factor perplexity grows.
    at_random_divergence : float
        With as many bytes, had the experts that get more bits been drawn: what lies on the line
        between the uniform precisions of fewer and of more bytes.
    uniform : tuple of UniformQuality
        By ascending bits. The model's own dtype is the last. With the same trunk.
    trunk_divergence : float or None
        What of it comes of a rounded trunk by itself; None where the trunk is exact, or what
        rounding it does has not been measured and is in none of these figures.
    as_measured : bool
        Whether the layout rounds its experts as they were rounded when damage was measured: by the
        same calibration, or none.
    """

    mean_bits: float
    divergence: float
    perplexity_ratio: float
    at_random_divergence: float
    uniform: tuple[UniformQuality, ...]
    as_measured: bool
    trunk_divergence: float | None = added(default=None)


def predicted_quality(
    spec: ModelSpec, damage: DamageProfile, layout: Layout
) -> PredictedQuality | None:
    """What a layout is predicted to do; None where it has encodings that were not measured.

    Raises
    ------
    PlanMismatchError
        When damage was measured on another model.
    """
    names = [
        fitting(spec.hidden_size, spec.moe(number).intermediate_size) for number in spec.moe_layers
    ]
    if any(
        not {*cut.classes} <= {spec.dtype, *fits}
        for cut, fits in zip(layout.layers, names, strict=True)
    ):
        return None
    found = precision_of_layers(spec, damage, layout.layers)
    shared = [name for name in ENCODINGS if all(name in {*fits, spec.dtype} for fits in names)]
    uniform = sorted(
        (_uniform(name, uniform_precision(spec, damage, name)) for name in shared),
        key=lambda each: each.mean_bits,
    )
    experts = PredictedQuality(
        mean_bits=found.mean_bits,
        divergence=found.divergence,
        perplexity_ratio=found.perplexity_ratio,
        at_random_divergence=_at_random(found, damage.floor, uniform),
        uniform=tuple(uniform),
        as_measured=damage.calibration == layout.calibration or not layout.is_rounded,
    )
    if not layout.trunk or damage.trunk_divergence is None:
        return experts
    return _with_trunk(experts, damage)


def _with_trunk(experts: PredictedQuality, damage: DamageProfile) -> PredictedQuality:
    """What is above the floor adds up; the floor is there once."""
    alone = damage.trunk_divergence
    assert alone is not None, "of a trunk that was not measured"

    def total(divergence: float) -> float:
        return divergence + damage.trunk_cost if divergence else alone

    ratio = math.exp(damage.trunk_cost)
    return replace(
        experts,
        divergence=total(experts.divergence),
        perplexity_ratio=experts.perplexity_ratio * ratio,
        at_random_divergence=total(experts.at_random_divergence),
        uniform=tuple(
            replace(
                each,
                divergence=total(each.divergence),
                perplexity_ratio=each.perplexity_ratio * ratio,
            )
            for each in experts.uniform
        ),
        trunk_divergence=alone,
    )


def _uniform(name: str, found: MixedPrecision) -> UniformQuality:
    return UniformQuality(name, found.mean_bits, found.divergence, found.perplexity_ratio)


def _at_random(found: MixedPrecision, floor: float, uniform: list[UniformQuality]) -> float:
    """Damage of a mean adds up as bytes do; the floor is there once, if anything is rounded."""
    if not found.divergence:
        return 0.0
    above = [max(0.0, each.divergence - floor) for each in uniform]
    bits = [each.mean_bits for each in uniform]
    return floor + float(np.interp(found.mean_bits, bits, above))
