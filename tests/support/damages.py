"""Damage as a profile of it says, made up."""

from __future__ import annotations

from collections.abc import Iterable

from moepack.damage import DAMAGE_VERSION, DamageProfile, LayerDamage, MissDamage
from moepack.model_spec import ModelSpec


def damage_profile(
    spec: ModelSpec,
    layers: Iterable[LayerDamage],
    *,
    fine_divergence: float,
    coarse_divergence: float,
    misses: MissDamage | None = None,
) -> DamageProfile:
    """Of the layers of a model, on texts that nobody read."""
    return DamageProfile(
        version=DAMAGE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        weights_digest="0" * 64,
        recorded_utc="2026-01-01T00:00:00+00:00",
        tokens=1000,
        sampled=256,
        divergence_tokens=200,
        fine_divergence=fine_divergence,
        coarse_divergence=coarse_divergence,
        sources=(),
        layers=tuple(layers),
        misses=misses,
    )
