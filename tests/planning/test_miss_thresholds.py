"""Which rule for missing experts is taken: the one that gains most at the price of rounding all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moepack.damage import DamageProfile, LayerDamage, MissDamage, MissTrial
from moepack.errors import PlanMismatchError
from moepack.miss_thresholds import RULES, fitted_rule, low_encoding
from moepack.model_spec import ModelSpec
from moepack.plan import OnMiss
from tests.pack.fake_models import make_spec
from tests.support.damages import damage_profile

#: Of the model with every expert in 4 bits, groups of 32: 5 of 16 bits, so 11/16 are saved.
ROUNDED = 0.011

#: What a whole share of the bytes may cost.
PRICE = 0.011 / (11 / 16)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return make_spec(hidden=64, width=32, experts=2, moe_layers=2)


def damage_of(spec: ModelSpec, *trials: MissTrial) -> DamageProfile:
    """Two layers that do the same damage, the more the coarser they are, and no floor."""
    errors = ((0.001, 0.001), (0.01, 0.01))
    layers = tuple(
        LayerDamage(number, ("INT8", "INT4_G32"), errors, 0.1, ROUNDED / 20, ROUNDED / 2)
        for number in spec.moe_layers
    )
    return damage_profile(
        spec,
        layers,
        fine_divergence=ROUNDED / 10,
        coarse_divergence=ROUNDED,
        misses=MissDamage("INT4_G32", trials) if trials else None,
    )


#: A rule that saves little for little, one that saves more, and one that costs more than it saves.
GENTLE = MissTrial(0.6, 1.0, 0.2, 0.2 * PRICE * 0.5)
MIDDLE = MissTrial(0.2, 1.0, 0.5, 0.5 * PRICE * 0.7)
HARSH = MissTrial(0.2, 0.9, 0.6, 0.6 * PRICE * 1.01)


def test_what_is_bought_within_the_price_is_bought(spec: ModelSpec) -> None:
    found = fitted_rule(spec, damage_of(spec, GENTLE, MIDDLE, HARSH), "INT4_G32")
    assert found == OnMiss(0.2, 1.0)


def test_what_the_last_bytes_cost_counts_and_not_the_mean(spec: ModelSpec) -> None:
    """All of it within the price, but not what it saves beyond a gentler rule."""
    dear = MissTrial(0.0, 1.0, 0.6, 0.6 * PRICE * 0.9)
    assert (dear.divergence - MIDDLE.divergence) / (dear.saved - MIDDLE.saved) > PRICE
    found = fitted_rule(spec, damage_of(spec, GENTLE, MIDDLE, dear), "INT4_G32")
    assert found == OnMiss(0.2, 1.0)
    cheaper = replace(dear, divergence=0.6 * PRICE * 0.7)
    found = fitted_rule(spec, damage_of(spec, GENTLE, MIDDLE, cheaper), "INT4_G32")
    assert found == OnMiss(0.0, 1.0)


def test_where_every_rule_is_dear_the_one_that_loses_least_is_taken(spec: ModelSpec) -> None:
    trials = (MissTrial(0.6, 0.9, 0.3, 3 * PRICE), MissTrial(0.8, 1.0, 0.1, 0.2 * PRICE))
    assert fitted_rule(spec, damage_of(spec, *trials), "INT4_G32") == OnMiss(0.8, 1.0)


def test_nothing_is_known_of_what_was_not_tried(spec: ModelSpec) -> None:
    assert fitted_rule(spec, damage_of(spec), "INT4_G32") is None
    assert fitted_rule(spec, damage_of(spec, GENTLE), "INT8") is None
    other = make_spec(hidden=64, width=64, experts=2, moe_layers=2)
    with pytest.raises(PlanMismatchError, match="damage was measured on fake"):
        fitted_rule(other, damage_of(spec, GENTLE), "INT4_G32")


def test_every_rule_is_tried_once() -> None:
    assert len({*RULES}) == len(RULES)
    assert OnMiss(0.6, 0.9) in RULES  # HOBBIT's
    assert OnMiss(0.6, 1.0) in RULES


@pytest.mark.parametrize(("width", "name"), [(64, "INT4_G32"), (48, "INT8")])
def test_low_copies_are_in_4_bits_where_these_fit(width: int, name: str) -> None:
    assert low_encoding(make_spec(hidden=64, width=width)) == name
