"""Which precision each expert gets: the best choice of all, within what was asked for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from moepack.damage import DamageProfile, LayerDamage, load_damage
from moepack.errors import PlanError, PlanMismatchError, ProfileError
from moepack.layout import Layout
from moepack.mixed_precision import (
    MixedPrecision,
    at_mean_bits,
    sample_choices,
    uniform_precision,
    within_perplexity,
)
from moepack.model_spec import ModelSpec
from moepack.precision import precision_of
from tests.pack.fake_models import make_spec
from tests.support.damages import damage_profile

#: Of the divergence of one layer.
FLOOR = 0.001

NAMES = ("INT8", "INT4_G32", "INT4_G64")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return make_spec(hidden=128, width=64, experts=3, moe_layers=2)


@pytest.fixture(scope="module")
def damage(spec: ModelSpec) -> DamageProfile:
    """Experts that differ, and a layer that counts for more than the other."""
    rng = np.random.default_rng(3)
    layers = []
    for number, divergence in zip(spec.moe_layers, (0.02, 0.003), strict=True):
        last = rng.lognormal(0, 1, 3)
        rows = (last * 0.008, last * rng.uniform(0.7, 0.9, 3), last)
        errors = tuple(tuple(row.tolist()) for row in rows)
        layers.append(LayerDamage(number, NAMES, errors, 0.1, FLOOR, divergence))
    return damage_profile(
        spec,
        layers,
        fine_divergence=0.0015,
        coarse_divergence=0.015,
    )


def bits_of(spec: ModelSpec, chosen: MixedPrecision) -> float:
    return precision_of(spec, Layout(spec.digest, chosen.layers(spec))).mean_bits


def by_hand(damage: DamageProfile, encodings: tuple[tuple[str, ...], ...]) -> float:
    """What moepack.damage states: lines through both divergences of each layer, then of all."""
    fine = coarse = total = 0.0
    for layer, names in zip(damage.layers, encodings, strict=True):
        errors = dict(zip(layer.encodings, layer.errors, strict=True))
        first, last = sum(layer.errors[0]), sum(layer.errors[-1])
        slope = (layer.coarse_divergence - layer.fine_divergence) / (last - first)
        total += slope * sum(errors[n][e] if n in errors else 0.0 for e, n in enumerate(names))
        fine, coarse = fine + slope * first, coarse + slope * last
    if {name for names in encodings for name in names} == {"BF16"}:
        return 0.0
    share = (total - fine) / (coarse - fine)
    return 0.0015 + share * (0.015 - 0.0015)


def every_choice(spec: ModelSpec, damage: DamageProfile) -> list[tuple[float, float]]:
    """Mean bits and divergence of every way to store six experts."""
    # Weights are 3 x 128 x 64; INT8 has a scale for each of 2 x 64 + 128 rows.
    bits = dict(zip(NAMES, (8 + 16 * 256 / (3 * 128 * 64), 5.0, 4.5), strict=True))
    bits[spec.dtype] = 16.0
    found = []
    for names in itertools.product(bits, repeat=6):
        mean = sum(bits[name] for name in names) / 6
        found.append((mean, by_hand(damage, (names[:3], names[3:]))))
    return found


@pytest.mark.parametrize("bits", [4.5, 4.9, 5.5, 6.3, 8.0, 11.0, 16.0])
def test_no_choice_of_as_many_bits_does_less_damage(
    spec: ModelSpec, damage: DamageProfile, bits: float
) -> None:
    chosen = at_mean_bits(spec, damage, bits)
    assert chosen.mean_bits <= bits
    assert chosen.mean_bits == pytest.approx(bits_of(spec, chosen))
    assert chosen.divergence == pytest.approx(by_hand(damage, chosen.encodings), abs=1e-15)
    best = min(kl for mean, kl in every_choice(spec, damage) if mean <= bits + 1e-9)
    assert chosen.divergence == pytest.approx(best, abs=1e-15)


@pytest.mark.parametrize("percent", [0.0, 0.05, 0.2, 1.0, 10.0])
def test_no_choice_within_a_perplexity_takes_fewer_bits(
    spec: ModelSpec, damage: DamageProfile, percent: float
) -> None:
    chosen = within_perplexity(spec, damage, percent)
    assert 1 <= chosen.perplexity_ratio <= 1 + percent / 100 + 1e-12
    limit = damage.floor + math.log(1 + percent / 100)
    best = min(mean for mean, kl in every_choice(spec, damage) if kl <= limit or kl == 0)
    assert chosen.mean_bits == pytest.approx(best)


def test_the_prediction_is_what_was_measured_of_uniform_precision(
    spec: ModelSpec, damage: DamageProfile
) -> None:
    fine, coarse = (uniform_precision(spec, damage, name) for name in (NAMES[0], NAMES[-1]))
    assert fine.divergence == pytest.approx(0.0015)
    assert coarse.divergence == pytest.approx(0.015)
    assert 0 < damage.floor < 0.0015
    assert coarse.perplexity_ratio == pytest.approx(math.exp(0.015 - damage.floor))


def test_a_layer_whose_slope_is_lost_in_noise_still_counts(damage: DamageProfile) -> None:
    layer = dataclasses.replace(damage.layers[0], fine_divergence=0.03)
    assert layer.slope == pytest.approx(0.1 * 0.02 / sum(layer.errors[-1]))
    unused = dataclasses.replace(layer, errors=((0.0,), (0.0,), (0.0,)))
    assert unused.slope == 0


def test_uniform_precision_is_one_of_the_choices(spec: ModelSpec, damage: DamageProfile) -> None:
    coarse = uniform_precision(spec, damage, "INT4_G64")
    assert coarse.mean_bits == 4.5
    exact = uniform_precision(spec, damage, spec.dtype)
    assert (exact.mean_bits, exact.divergence, exact.perplexity_ratio) == (16, 0, 1)
    shown = sample_choices(spec, damage)
    assert [name for name, _ in shown if name in NAMES] == ["INT4_G64", "INT4_G32", "INT8"]
    divergences = [choice.divergence for name, choice in shown if name not in NAMES]
    assert divergences == sorted(divergences, reverse=True)
    with pytest.raises(PlanMismatchError, match="no damage has been measured in F16"):
        uniform_precision(spec, damage, "F16")


def test_too_few_bits_and_another_model_are_refused(spec: ModelSpec, damage: DamageProfile) -> None:
    with pytest.raises(PlanError, match=r"4 bits .* fits 4\.5 .* ask for 4\.5 or more"):
        at_mean_bits(spec, damage, 4.0)
    other = dataclasses.replace(damage, model_digest="f" * 64)
    with pytest.raises(PlanMismatchError, match="moepack profile --bits"):
        at_mean_bits(spec, other, 6.0)


def test_an_expert_that_no_text_uses_takes_the_fewest_bits(
    spec: ModelSpec, damage: DamageProfile
) -> None:
    layers = tuple(
        dataclasses.replace(layer, errors=tuple((0.0, *row[1:]) for row in layer.errors))
        for layer in damage.layers
    )
    chosen = within_perplexity(spec, dataclasses.replace(damage, layers=layers), 0.0)
    assert [names[0] for names in chosen.encodings] == ["INT4_G64"] * 2
    assert {name for names in chosen.encodings for name in names[1:]} == {spec.dtype}


def test_the_file_is_read_as_it_was_written(damage: DamageProfile, tmp_path: Path) -> None:
    damage.save(tmp_path)
    assert load_damage(tmp_path) == damage
    dataclasses.replace(damage, version=99).save(tmp_path)
    with pytest.raises(ProfileError, match="version 99"):
        load_damage(tmp_path)
    with pytest.raises(ProfileError, match="moepack profile --bits"):
        load_damage(tmp_path / "nothing")


def test_figures_that_nothing_measures_are_refused() -> None:
    for errors, divergence in (((1.0, -1.0), 0.1), ((1.0, math.nan), 0.1), ((1.0, 1.0), math.inf)):
        with pytest.raises(ValueError, match="below 0 or not finite"):
            LayerDamage(0, ("INT8",), (errors,), 0.1, 0.0, divergence)
    with pytest.raises(ValueError, match="expected those of 2 and of one number"):
        LayerDamage(0, ("INT8", "INT4_G32"), ((1.0, 1.0), (1.0,)), 0.1, 0.0, 0.1)
