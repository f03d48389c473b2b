"""The precision of each expert, by the damage that it really does.

Every expert may be stored in the model's own dtype or in any encoding that its sizes fit. Of all
choices that stay within a mean number of bits for each routed weight (scales counted) the one with
the least predicted divergence is taken; or the smallest of those whose predicted perplexity stays
within a bound. Both exactly (:mod:`moepack.knapsack`). What divergence is predicted, and how, is in
:mod:`moepack.damage`.

A bound is said as the increase of perplexity: a token's expected loss grows by the divergence where
the exact model is right about its text, so perplexity grows by a factor of ``exp`` of it. Of what
any change at all comes to, the floor, nothing is expected: it is as often for the better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepack.damage import DamageProfile
from moepack.encodings import ENCODINGS, fitting
from moepack.errors import PlanError, PlanMismatchError
from moepack.knapsack import Choices, Floats, Integers, least_cost, least_size
from moepack.layout import LayerLayout
from moepack.layouts import mixed_layout
from moepack.model_spec import ModelSpec, MoeSpec
from moepack.records import record


@record
class MixedPrecision:
    """What each expert is stored in.

    Attributes
    ----------
    encodings : tuple of tuple of str
        [layers that have experts][experts].
    mean_bits : float
        Of a routed weight, its share of scales included.
    divergence : float
        Predicted, in nats a token, on text like that on which damage was measured.
    perplexity_ratio : float
        By what factor perplexity is predicted to grow.
    """

    encodings: tuple[tuple[str, ...], ...]
    mean_bits: float
    divergence: float
    perplexity_ratio: float

    def layers(self, spec: ModelSpec) -> tuple[LayerLayout, ...]:
        """Every layer of a layout that stores experts so, whole."""
        return tuple(
            mixed_layout(spec, number, names)
            for number, names in zip(spec.moe_layers, self.encodings, strict=True)
        )


class _Table(NamedTuple):
    """All experts of all layers: for each choice its bytes and its divergence.

    A layer that fits fewer encodings than another has their columns filled with its own dtype.
    """

    names: list[tuple[str, ...]]  # of every layer, its columns
    size: Integers  # [experts, choices]
    cost: Floats
    weights: int  # of all experts
    floor: float


def at_mean_bits(spec: ModelSpec, damage: DamageProfile, bits: float) -> MixedPrecision:
    """The least predicted divergence within a mean number of bits.

    Raises
    ------
    PlanError
        When no encoding that fits has so few, naming the fewest.
    PlanMismatchError
        When damage was measured on another model.
    """
    table = _table(spec, damage)
    bound = math.floor(table.weights * bits / 8)
    fewest = int(table.size.min(axis=1).sum())
    if fewest > bound:
        least = math.ceil(fewest * 8 / table.weights * 1000) / 1000
        raise PlanError(
            f"{bits:g} bits for each expert weight are too few: {spec.name} fits {least:g} at the "
            f"least, scales included; ask for {least:g} or more"
        )
    return _precision(spec, table, least_cost(table.size, table.cost, bound))


def within_perplexity(
    spec: ModelSpec, damage: DamageProfile, percent: float, *, spent: float = 0.0
) -> MixedPrecision:
    """The fewest bytes with which perplexity is predicted to grow by ``percent`` at the most.

    Parameters
    ----------
    spent
        What a rounded trunk adds to the loss already, nats a token.

    Raises
    ------
    PlanError
        When that is more than the bound.
    PlanMismatchError
        When damage was measured on another model.
    """
    table = _table(spec, damage)
    bound = math.log1p(max(0.0, percent) / 100)
    if spent > bound:
        raise PlanError(
            f"perplexity may grow by {percent:g}%, and is predicted to by "
            f"{100 * math.expm1(spent):.3g}% of rounding the trunk alone; leave out --trunk, or "
            "allow more"
        )
    return _precision(spec, table, least_size(table.size, table.cost, bound - spent))


def uniform_precision(spec: ModelSpec, damage: DamageProfile, name: str) -> MixedPrecision:
    """Every expert in one encoding.

    Raises
    ------
    PlanMismatchError
        When damage was measured on another model, or not in this encoding.
    """
    table = _table(spec, damage)
    if any(name not in names for names in table.names):
        raise PlanMismatchError(
            f"{spec.name}: no damage has been measured in {name}; expected one of "
            f"{', '.join(dict.fromkeys(n for names in table.names for n in names))}"
        )
    counts = [spec.moe(number).num_experts for number in spec.moe_layers]
    columns = [names.index(name) for names in table.names]
    return _precision(spec, table, np.repeat(np.array(columns, np.intp), counts))


def precision_of_layers(
    spec: ModelSpec, damage: DamageProfile, layers: Sequence[LayerLayout]
) -> MixedPrecision:
    """What a layout's experts are stored in, and what that is predicted to do.

    Raises
    ------
    PlanMismatchError
        When damage was measured on another model.
    """
    table = _table(spec, damage)
    columns = [
        names.index(cut.encoding_of(expert))
        for cut, names in zip(layers, table.names, strict=True)
        for expert in range(spec.moe(cut.layer).num_experts)
    ]
    return _precision(spec, table, np.array(columns, np.intp))


def sample_choices(
    spec: ModelSpec, damage: DamageProfile, between: int = 3
) -> list[tuple[str, MixedPrecision]]:
    """Uniform precisions and, between the fewest and most bits of them, choices; each named."""
    fits = [
        {*fitting(spec.hidden_size, spec.moe(number).intermediate_size)}
        for number in spec.moe_layers
    ]
    found = [
        (name, uniform_precision(spec, damage, name))
        for name in ENCODINGS
        if all(name in fit for fit in fits)
    ]
    bits = [choice.mean_bits for _, choice in found]
    if bits:
        step = (max(bits) - min(bits)) / (between + 1)
        targets = [min(bits) + step * number for number in range(1, between + 1)]
        found += [("chosen by expert", at_mean_bits(spec, damage, target)) for target in targets]
    return sorted(found, key=lambda item: item[1].mean_bits)


def expert_bytes(spec: ModelSpec, moe: MoeSpec, name: str) -> int:
    """Bytes of an expert's matrices, scales included; biases are the same in all encodings."""
    stored, width, hidden = ENCODINGS[name], moe.intermediate_size, spec.hidden_size
    return 2 * stored.matrix_bytes(width, hidden) + stored.matrix_bytes(hidden, width)


def _table(spec: ModelSpec, damage: DamageProfile) -> _Table:
    numbers = spec.moe_layers
    measured = {layer.layer: layer for layer in damage.layers}
    if damage.model_digest != spec.digest or tuple(measured) != numbers:
        raise PlanMismatchError(
            f"damage was measured on {damage.model_name} ({damage.model_digest[:12]}), this is "
            f"{spec.name} ({spec.digest[:12]}); measure it with moepack profile --bits"
        )
    fits = [fitting(spec.hidden_size, spec.moe(number).intermediate_size) for number in numbers]
    choices = 1 + max(map(len, fits))
    names = [(spec.dtype,) * (choices - len(fit)) + fit for fit in fits]
    sizes, costs, weights = [], [], 0
    for number, columns in zip(numbers, names, strict=True):
        moe, layer = spec.moe(number), measured[number]
        taken = [expert_bytes(spec, moe, name) for name in columns]
        sizes.append(np.tile(np.array(taken, np.int64), (moe.num_experts, 1)))
        costs.append(damage.costs(layer, columns))
        weights += 3 * moe.num_experts * moe.intermediate_size * spec.hidden_size
    return _Table(names, np.concatenate(sizes), np.concatenate(costs), weights, damage.floor)


def _precision(spec: ModelSpec, table: _Table, choices: Choices) -> MixedPrecision:
    rows = np.arange(len(choices))
    encodings, begin = [], 0
    for number, names in zip(spec.moe_layers, table.names, strict=True):
        end = begin + spec.moe(number).num_experts
        encodings.append(tuple(names[choice] for choice in choices[begin:end]))
        begin = end
    rounded = any(name != spec.dtype for names in encodings for name in names)
    cost = float(table.cost[rows, choices].sum())
    return MixedPrecision(
        tuple(encodings),
        8 * int(table.size[rows, choices].sum()) / table.weights,
        divergence=cost + table.floor if rounded else 0.0,
        perplexity_ratio=math.exp(cost),
    )
