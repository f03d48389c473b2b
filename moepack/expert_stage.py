"""The routed experts of one token, between the routing and the last partial sum.

How long that takes depends on how many of the K experts lack what; how many do is chance. See
:mod:`moepack.cost` for the terms and the shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.cost import Array, Lacks, LayerTimes, Parts
from moepack.in_order import in_order_s
from moepack.prefetching import Brought


class Stage:
    """The experts of one token: how long from the routing to the last partial sum.

    The shared expert is computed first.

    Parameters
    ----------
    lacks : Lacks
        Kinds of lack that never occur here are left out from the start.
    staging_experts : int
        Experts in flight at once; one cannot be computed while another arrives.
    as_ready : bool
        Whether resident parts are computed while the rest arrives; else in one fixed order.

    Attributes
    ----------
    seconds : [J, C]
        For each way in which the K experts can lack something.
    """

    def __init__(
        self,
        times: LayerTimes,
        top_k: int,
        parts: Parts,
        lacks: Lacks,
        *,
        staging_experts: int,
        as_ready: bool,
    ) -> None:
        self._prepare(times, top_k, parts, as_ready=as_ready)
        self._ways = _ways(top_k, bool(lacks.bottom.any()), bool(lacks.both.any()))
        # By how many lack their bottom, and how many both, [K + 1, K + 1, C].
        top_s, bottom_s, _ = parts.columns()
        hidden_s = self._expert_s - self._last_s
        stage_s = in_order_s(
            top_k,
            self._expert_s,
            top_s,
            bottom_s,
            hidden_s,
            staging_experts,
            times.shared_s,
            as_ready=as_ready,
        )
        # To lack less never takes longer: a rule that averages break a little.
        stage_s = np.maximum.accumulate(np.maximum.accumulate(stage_s, axis=0), axis=1)
        self.seconds: Array = stage_s[self._ways.bottom, self._ways.both]

    def _prepare(self, times: LayerTimes, top_k: int, parts: Parts, *, as_ready: bool) -> None:
        self._top_k = top_k
        self._parts = parts
        self._as_ready = as_ready
        _, bottom_s, share = parts.columns()
        self._expert_s = np.atleast_1d(np.asarray(times.expert_s, dtype=np.float64))
        # What is left to compute when the last part has arrived.
        self._last_s = self._expert_s * np.where(bottom_s > 0.0, 1.0 - share, 1.0)
        self._compute_s = times.shared_s + top_k * self._expert_s

    def expected(self, brought: Brought) -> tuple[Array, Array]:
        """Expectations over the ways after m = 0 ... D ranks, each [D + 1, S, C].

        Returns
        -------
        seconds
        bound
            How likely the link decides when the stage ends.
        """
        chances = self._chances(brought)
        bound = np.asarray(self.seconds > self._compute_s * (1.0 + 1e-12), np.float64)
        seconds, share = (np.tensordot(chances, of, axes=(0, 0)) for of in (self.seconds, bound))
        return seconds, share

    def link_idle_s(self, lacks: Lacks) -> Array:
        """How long the link has no demand while the stage lasts, [..., C].

        The computing that demands leave, or what is left of it when they have all arrived:
        ``max(K * expert - D, tail)`` at the expected lack. It stands for the layer before, which is
        taken to be like this one, so that layers can be priced one by one.
        """
        return self._idle_s(lacks, self._top_k * self._parts.link_s(lacks))

    def _idle_s(self, lacks: Lacks, demand_s: Array) -> Array:
        tail_s = self._last_s
        if not self._as_ready:
            lack = self._top_k * (lacks.bottom + lacks.both)[..., None]
            tail_s = self._expert_s * (self._top_k + 1) / (lack + 1.0)
        return np.maximum(self._compute_s - demand_s, tail_s)

    def _chances(self, brought: Brought) -> Array:
        """Chance of each way, [J, D + 1, S]: multinomial in those that are not covered."""
        top_k, (bottom_lack, both_lack) = self._top_k, brought.lacks[:2]
        ready = np.clip(1.0 - bottom_lack - both_lack, 0.0, 1.0)
        bottom, both, rest = (
            list(_powers(chance, top_k)) for chance in (bottom_lack, both_lack, ready)
        )
        # Exactly so many lack something, whatever it is: all others are covered or ready.
        covered, orders = _others(top_k)
        lacking = (brought.covered[:, covered] * orders) @ np.stack(rest, axis=1)
        lacking = lacking.transpose(1, 0, 2)  # [K + 1, D + 1, S]
        ways = self._ways
        chances = np.empty((len(ways.factor), *ready.shape))
        for chance, i, j, factor in zip(chances, ways.bottom, ways.both, ways.factor, strict=True):
            np.multiply(bottom[i], both[j], out=chance)
            np.multiply(chance, lacking[i + j], out=chance)
            np.multiply(chance, factor, out=chance)
        return chances


class _Ways(NamedTuple):
    """The ways in which K experts can lack something, each [J].

    So many lack their bottom alone, so many all they have; ``factor`` says in how many orders.
    """

    bottom: npt.NDArray[np.intp]
    both: npt.NDArray[np.intp]
    factor: Array


@functools.cache
def _ways(top_k: int, bottoms: bool, boths: bool) -> _Ways:
    """All of them, but for kinds of lack that do not occur."""
    pairs = [
        (bottom, both)
        for both in range(top_k * boths + 1)
        for bottom in range((top_k - both) * bottoms + 1)
    ]
    bottom, both = np.array(pairs, dtype=np.intp).T
    factor = [float(math.comb(bottom + both, both)) for bottom, both in pairs]
    return _Ways(bottom, both, np.array(factor))


@functools.cache
def _others(top_k: int) -> tuple[npt.NDArray[np.intp], Array]:
    """Of so many that lack something and so many that are ready: how many others, in what orders.

    Returns
    -------
    covered : int [K + 1, K + 1]
    orders : float64 [K + 1, K + 1]
        0 where the two are more than K.
    """
    count = range(top_k + 1)
    orders = [
        [float(math.comb(lack + ready, lack)) * (lack + ready <= top_k) for ready in count]
        for lack in count
    ]
    each = np.arange(top_k + 1)
    return np.maximum(top_k - each[:, None] - each, 0), np.array(orders)


def _powers(base: Array, top_k: int) -> Iterator[Array]:
    """The powers 0 to K."""
    power = np.ones_like(base)
    for _ in range(top_k + 1):
        yield power
        power = power * base
