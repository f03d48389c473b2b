"""The routed experts of one token where some of what is missing is read from the disk first.

See :mod:`moepack.expert_stage`. How long the experts take is asked of the replay's own clock
(:mod:`moepack.tier_timeline`), for every way in which they can lack something, and averaged over
orders of the experts that are drawn once and for all.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import numpy.typing as npt

from moepack.cost import Array, Lacks, LayerTimes, Parts
from moepack.expert_stage import Stage
from moepack.link_lanes import TierClock, TierWork
from moepack.prefetching import Brought
from moepack.tier_timeline import advance_tiers

#: Orders of the experts that are averaged over.
ORDERS = 6

#: Cuts that are timed; between them times are drawn straight.
TIMED_CUTS = 9

#: How many lack their bottom alone and all they have: each from RAM, and from the disk.
_Way = tuple[int, int, int, int]

_Key = tuple[float, ...]


class TierStage(Stage):
    """A stage whose link has a disk behind it.

    Parameters
    ----------
    lacks : Lacks
        With what of it RAM does not hold.
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
        kinds = _kinds(lacks)
        self._tier_ways = _ways(top_k, *(bool(kind.any()) for kind in kinds))
        columns = (*parts.columns(), *parts.read_columns())
        expert_s = np.broadcast_to(self._expert_s, columns[0].shape)
        self.seconds: Array = _stage_s(
            top_k,
            self._tier_ways,
            tuple(tuple(np.asarray(each).tolist()) for each in (expert_s, *columns)),
            min(staging_experts, top_k),
            times.shared_s,
            as_ready,
            parts.bounces,
        )

    def disk_idle_s(self, lacks: Lacks) -> Array:
        """How long the disk has no demand while the stage lasts; see :meth:`Stage.link_idle_s`."""
        return self._idle_s(lacks, self._top_k * self._parts.read_s(lacks))

    def _chances(self, brought: Brought) -> Array:
        """Chance of each way, [J, D + 1, S]: multinomial in those that are not covered."""
        top_k, lacks = self._top_k, brought.lacks
        kinds = _kinds(lacks)
        ready = np.clip(1.0 - lacks.bottom - lacks.both, 0.0, 1.0)
        powers = [[kind**count for count in range(top_k + 1)] for kind in (*kinds, ready)]
        lacking = [
            sum(
                brought.covered[:, top_k - lack - more, None]
                * (math.comb(lack + more, lack) * powers[4][more])
                for more in range(top_k - lack + 1)
            )
            for lack in range(top_k + 1)
        ]
        chances = np.empty((len(self._tier_ways), *ready.shape))
        for chance, way in zip(chances, self._tier_ways, strict=True):
            lack = sum(way)
            orders = math.factorial(lack) // math.prod(map(math.factorial, way))
            np.multiply(orders, lacking[lack], out=chance)
            for power, count in zip(powers, way, strict=False):
                if count:
                    np.multiply(chance, power[count], out=chance)
        return chances


def _kinds(lacks: Lacks) -> tuple[Array, Array, Array, Array]:
    assert lacks.bottom_disk is not None, "RAM holds everything"
    assert lacks.both_disk is not None, "RAM holds everything"
    return (
        np.maximum(lacks.bottom - lacks.bottom_disk, 0.0),
        lacks.bottom_disk,
        np.maximum(lacks.both - lacks.both_disk, 0.0),
        lacks.both_disk,
    )


@functools.cache
def _ways(top_k: int, *occurs: bool) -> tuple[_Way, ...]:
    """All ways, but for kinds of lack that do not occur."""
    counts = [range(top_k * kind + 1) for kind in occurs]
    return tuple(
        (ram_bottom, disk_bottom, ram_both, disk_both)
        for ram_bottom, disk_bottom, ram_both, disk_both in itertools.product(*counts)
        if ram_bottom + disk_bottom + ram_both + disk_both <= top_k
    )


@functools.lru_cache(maxsize=64)  # layers of one kind ask for the same
def _stage_s(
    top_k: int,
    ways: tuple[_Way, ...],
    columns: tuple[_Key, ...],
    frames: int,
    shared_s: float,
    as_ready: bool,
    bounces: int,
) -> Array:
    """Seconds by way and cut, [J, C].

    Parameters
    ----------
    columns
        Seconds of an expert's compute, its top's and its bottom's transfer; the top's share of the
        compute; seconds of reading the top and the bottom.
    """
    known = np.array(columns)  # [6, C]
    timed = _timed(known)
    expert_s, top_s, bottom_s, share, top_read_s, bottom_read_s = known[:, timed]
    kinds = _kinds_in_order(top_k, ways)  # [J, P, K]
    lanes = (*kinds.shape[:2], len(timed))
    shape = (*lanes, top_k, 2)
    lacks_top, lacks_any = (flags[:, :, None] for flags in (kinds >= 3, kinds >= 1))
    reads = ((kinds == 2) | (kinds == 4))[:, :, None]
    fetch_s, read_s = np.zeros(shape), np.zeros(shape)
    fetch_s[..., 0] = lacks_top * top_s[:, None]
    fetch_s[..., 1] = lacks_any * bottom_s[:, None]
    read_s[..., 0] = (lacks_top & reads) * top_read_s[:, None]
    read_s[..., 1] = reads * bottom_read_s[:, None]
    compute_s = np.broadcast_to(
        (expert_s * np.stack([share, 1.0 - share])).T[:, None], (len(timed), top_k, 2)
    )
    flat = (math.prod(lanes), 2 * top_k)
    nothing = np.zeros((flat[0], 0))
    work = TierWork(
        before_s=0.0,
        guess_s=0.0,
        after_s=shared_s,
        compute_s=np.broadcast_to(compute_s, shape).reshape(flat),
        fetch_s=fetch_s.reshape(flat),
        read_s=read_s.reshape(flat),
        ahead_s=nothing,
        ahead_read_s=nothing,
        ahead_of=np.zeros(flat, dtype=np.intp),
        next_s=nothing,
        next_read_s=nothing,
    )
    clock = TierClock.start(flat[0], 0, bounces)
    done = advance_tiers(clock, work, as_ready=as_ready, frames=frames, segments_per_expert=2)
    seconds = done.clock.now_s.reshape(lanes).mean(axis=1)  # [J, timed]
    return _between(seconds, timed, known.shape[1])


def _timed(columns: Array) -> npt.NDArray[np.intp]:
    """Which cuts are timed: the first, which may be uncut, and some of the others."""
    count = columns.shape[1]
    if count <= TIMED_CUTS:
        return np.arange(count)
    others = np.linspace(1, count - 1, TIMED_CUTS - 1).round().astype(np.intp)
    return np.concatenate([[0], others])


def _between(seconds: Array, timed: npt.NDArray[np.intp], count: int) -> Array:
    if len(timed) == count:
        return np.asarray(seconds)
    places = np.arange(1, count)
    rest = [np.interp(places, timed[1:], row[1:]) for row in seconds]
    return np.concatenate([seconds[:, :1], np.array(rest)], axis=1)


@functools.lru_cache(maxsize=8)
def _kinds_in_order(top_k: int, ways: tuple[_Way, ...]) -> npt.NDArray[np.intp]:
    """For each way what each of the experts lacks, in several orders, [J, P, K]; 0: nothing."""
    rng = np.random.default_rng(0)
    orders = rng.random((ORDERS, top_k)).argsort(axis=1)
    found = np.zeros((len(ways), top_k), dtype=np.intp)
    for row, way in zip(found, ways, strict=True):
        row[: sum(way)] = np.repeat(np.arange(1, 5), way)
    return found[:, orders]
