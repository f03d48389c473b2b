"""The closed form of :mod:`moepack.cost` for layers whose experts differ in size.

A state of the slots is priced as that of a layer that is stored alike, whose experts take what
those of this layer take on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepack.cost import Array, Held, Parts, missing_after, prefill_layer_s
from moepack.layer_prices import Variant, token_prices
from moepack.layer_problem import LayerProblem

# States that are priced at once: of as many by as many results the diagonal is what counts.
_AT_ONCE = 16


class Rates(NamedTuple):
    """What is known of every state of a mixed layer's slots, each [P].

    Attributes
    ----------
    hits
        Of a token's experts.
    miss_s, miss_read_s
        Seconds of the link, and of the disk, for what is missed on average.
    lacking
        Experts of a prompt that have to be fetched.
    lacking_s, lacking_read_s
        Seconds of one of those on average.
    predicted : [R, P]
        How likely the expert predicted at each rank is held.
    reads, predicted_reads : [P], [R, P], or None
        Shares of what is missing that RAM lacks too.
    """

    hits: Array
    miss_s: Array
    miss_read_s: Array
    lacking: Array
    lacking_s: Array
    lacking_read_s: Array
    predicted: Array
    reads: Array | None
    predicted_reads: Array | None

    def some(self, places: slice) -> Rates:
        """Of some states."""
        reads, predicted_reads = self.reads, self.predicted_reads
        return Rates(
            self.hits[places],
            self.miss_s[places],
            self.miss_read_s[places],
            self.lacking[places],
            self.lacking_s[places],
            self.lacking_read_s[places],
            self.predicted[:, places],
            None if reads is None else reads[places],
            None if predicted_reads is None else predicted_reads[:, places],
        )


def state_prices(problem: LayerProblem, variants: Sequence[Variant], rates: Rates) -> Array:
    """Seconds of every state under every variant, [variants, P]."""
    blocks = [
        _prices(problem, variants, rates.some(slice(begin, begin + _AT_ONCE)))
        for begin in range(0, len(rates.hits), _AT_ONCE)
    ]
    return np.concatenate(blocks, axis=1)


def _prices(problem: LayerProblem, variants: Sequence[Variant], rates: Rates) -> Array:
    """Seconds of some states under every variant, [variants, P]."""
    later, disk = max(0, problem.new_tokens - 1), problem.disk
    bounces = 2 if disk is None else disk.bounces
    none = np.zeros_like(rates.hits)
    parts = Parts(none, rates.miss_s, none, none, rates.miss_read_s, bounces)
    token = problem.token._replace(expert_s=problem.token.expert_s + none)
    held = _held(rates.hits, rates.reads)
    found = np.full((len(variants), len(rates.hits)), np.inf)
    for mode in ("off", "all"):  # whole experts: what lacks a bottom lacks all
        wanted = [place for place, variant in enumerate(variants) if variant.prefetch == mode]
        if not wanted:
            continue
        first_s = _prefill_s(problem, rates, bounces, ahead=mode != "off")
        ranks = None if mode == "off" else _held(rates.predicted, rates.predicted_reads)
        tokens_s = token_prices(problem, token, parts, held, mode, ranks)
        own_s = np.diagonal(tokens_s, axis1=1, axis2=2)
        found[wanted] = first_s + later * own_s
    return found


def _held(curve: Array, reads: Array | None) -> Held:
    """Experts that are whole bottoms, of which some are held."""
    held = Held(np.ones_like(curve), curve)
    if reads is None:
        return held
    lacked = (1.0 - curve) * reads
    return held._replace(bottom_disk=lacked, both_disk=np.zeros_like(lacked))


def _prefill_s(problem: LayerProblem, rates: Rates, bounces: int, *, ahead: bool) -> Array:
    read = None
    if problem.disk is not None:
        behind = missing_after(problem.used)[problem.disk.held]
        read = (0.0, np.minimum(rates.lacking, behind))
    seconds = prefill_layer_s(
        problem.prompt.other_s,
        problem.prompt.experts_s,
        problem.token.transfer_s,
        problem.token.burst_s,
        Parts(0.0, rates.lacking_s, 0.0, 0.0, rates.lacking_read_s, bounces),
        (0.0, rates.lacking),
        staging_experts=problem.staging_experts,
        ahead=ahead,
        missing_disk=read,
    )
    return np.asarray(np.diagonal(seconds))
