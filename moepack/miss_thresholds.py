"""From which weights on a missing expert is replaced, and left out: fitted to what that does.

A rule (:class:`moepack.plan.OnMiss`) saves bytes and costs divergence. Both are measured on
calibration text (:mod:`moepack.damage_probe`) as if every expert were missing, with low copies for
every token of the text: so they depend on no cache. Of misses that come as they do, both shrink
alike, and their ratio, the *price* of a byte, stays about what it is.

What a byte may cost is bounded by what it costs to save it for good: the divergence of the model
with all experts in the low copies' encoding, over the bytes that this saves. Of the rules that were
tried the one is taken that gains most by this price,

    price * bytes saved - divergence,

so what it saves beyond another rule is bought within the bound as well.

Source: derived; rule and the pair that HOBBIT takes for Mixtral are its own (arXiv 2411.01433).
"""

from __future__ import annotations

import itertools

from moepack.damage import DamageProfile, MissTrial
from moepack.errors import GroupMismatchError
from moepack.mixed_precision import expert_bytes, uniform_precision
from moepack.model_spec import ModelSpec
from moepack.plan import OnMiss
from moepack.precision import encoding_of

#: What is tried: from no expert but the first of a token exact to nearly all, and with the last
#: tenth of the weights left out, the last twentieth, or none.
RULES = tuple(
    OnMiss(exact, low)
    for exact, low in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8), (0.9, 0.95, 1.0))
)


def low_encoding(spec: ModelSpec) -> str:
    """What low copies are stored in unless something else is asked for.

    Raises
    ------
    GroupMismatchError
        When the experts fit no encoding below the model's own.
    """
    try:
        return encoding_of(spec, "int4")
    except GroupMismatchError:
        return encoding_of(spec, "int8")


def fitted_rule(spec: ModelSpec, damage: DamageProfile, low: str) -> OnMiss | None:
    """The best of the rules that were tried with low copies in an encoding; None: none was.

    Raises
    ------
    PlanMismatchError
        When damage was measured on another model.
    """
    misses = damage.misses
    if misses is None or misses.encoding != low:
        return None
    price = uniform_precision(spec, damage, low).divergence / (1.0 - _low_share(spec, low))

    def gain(trial: MissTrial) -> float:
        return price * trial.saved - trial.divergence

    best = max(misses.trials, key=gain)
    return OnMiss(best.exact_up_to, best.low_up_to)


def _low_share(spec: ModelSpec, low: str) -> float:
    """Bytes of all experts in an encoding, over those as the model has them."""
    stored, exact = (
        sum(
            moe.num_experts * expert_bytes(spec, moe, name)
            for moe in map(spec.moe, spec.moe_layers)
        )
        for name in (low, spec.dtype)
    )
    return stored / exact
