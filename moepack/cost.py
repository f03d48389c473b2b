"""The latency model of loading on demand: arithmetic only.

One serial link and one compute queue. A layer's experts are consumed in a fixed order; its missing
segments are asked for as soon as its routing is known and arrive while the others are computed.
Nothing is fetched before its layer's routing, so layers do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

#: Seconds that the link takes for one transfer of so many bytes.
LinkSeconds = Callable[[int], float]


class PartCost(NamedTuple):
    """One part (top or bottom) of a layer's experts.

    Attributes
    ----------
    stored_bytes : int
        What crosses the link for one.
    hit_rate : float
        Probability that it is resident when its expert is activated.
    slots : int
        How many are resident.
    """

    stored_bytes: int
    hit_rate: float
    slots: int


class LayerTimes(NamedTuple):
    """Compute seconds of one layer for one number of tokens.

    ``expert_s`` is for one whole expert over the tokens that it gets; ``transfer_s`` is what each
    transfer costs the computing thread beside the link's time; ``other_s`` is everything but the
    routed experts: attention, router, shared expert or dense FFN.
    """

    other_s: float
    expert_s: float
    transfer_s: float = 0.0


def throttled(link: LinkSeconds, rate_bytes_per_s: float, latency_s: float) -> LinkSeconds:
    """A link that takes at least ``latency_s + bytes / rate``, as the throttled transfer does."""
    return lambda size: max(link(size), latency_s + size / rate_bytes_per_s)


def miss_bytes(top_k: int, parts: Sequence[PartCost]) -> float:
    """Expected bytes over the link for one token of one layer: K * sum (1 - h) * bytes."""
    return top_k * sum((1.0 - part.hit_rate) * part.stored_bytes for part in parts)


def miss_seconds(parts: Sequence[PartCost], link: LinkSeconds) -> tuple[float, float]:
    """How likely an activated expert lacks something, and what fetching it then costs.

    The parts' caches are nested (a bottom is kept only for an expert whose top is hotter still),
    so an expert is whole exactly when its least cached part is resident.

    Returns
    -------
    (probability, seconds)
        Seconds are the expectation given that something is missing.
    """
    if not parts:
        return 0.0, 0.0
    probability = max(1.0 - part.hit_rate for part in parts)
    if probability <= 0.0:
        return 0.0, 0.0
    seconds = sum((1.0 - part.hit_rate) * link(part.stored_bytes) for part in parts)
    return probability, seconds / probability


def decode_layer_s(
    times: LayerTimes,
    top_k: int,
    parts: Sequence[PartCost],
    link: LinkSeconds,
    *,
    staging_experts: int,
) -> float:
    """Expected seconds of one token through one layer.

    With m of K experts missing, m ~ Binomial(K, p), the last arrives after m * t, and what is
    computed from it on cannot overlap: (K + 1) / (m + 1) experts on average, for misses at random
    places in a fixed order. With a single frame each fetch also waits for the compute of the miss
    before it. Derived; checked against a simulation in the tests.
    """
    probability, fetch_s = miss_seconds(parts, link)
    compute_s = top_k * times.expert_s
    expected_s = 0.0
    for misses in range(top_k + 1):
        chance = (
            math.comb(top_k, misses) * probability**misses * (1.0 - probability) ** (top_k - misses)
        )
        link_s = misses * fetch_s
        if misses:
            link_s += times.expert_s * (top_k + 1) / (misses + 1)
            if staging_experts == 1:
                link_s += times.expert_s * (misses - 1)
        expected_s += chance * max(compute_s, link_s)
    transfers = top_k * sum(1.0 - part.hit_rate for part in parts)
    return times.other_s + expected_s + transfers * times.transfer_s


def distinct_experts(shares: Sequence[float], tokens: int, top_k: int) -> list[float]:
    """Probability that each expert is activated by at least one of ``tokens``.

    ``1 - (1 - p)^P`` with p = K * share: tokens taken as independent, which overstates the spread
    of real, correlated text.
    """
    return [1.0 - (1.0 - min(1.0, top_k * share)) ** tokens for share in shares]


def prefill_layer_s(
    times: LayerTimes,
    used: Sequence[float],
    hot: Sequence[int],
    parts: Sequence[PartCost],
    link: LinkSeconds,
    *,
    staging_experts: int,
) -> float:
    """Expected seconds of a whole prompt through one layer.

    Each missing segment crosses the link once per prompt: ``max(link, compute)``, or their sum
    with one frame, which cannot overlap them.

    Parameters
    ----------
    times
        ``expert_s`` for one expert over all its tokens of the prompt.
    used
        From :func:`distinct_experts`, by expert id.
    hot
        Expert ids, hottest first; the first ``slots`` of each part are resident.
    """
    missing = [sum(used[expert] for expert in hot[part.slots :]) for part in parts]
    link_s = sum(
        count * link(part.stored_bytes) for count, part in zip(missing, parts, strict=True)
    )
    compute_s = sum(used) * times.expert_s + sum(missing) * times.transfer_s
    if staging_experts > 1:
        return times.other_s + max(link_s, compute_s)
    return times.other_s + link_s + compute_s
