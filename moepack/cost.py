"""The latency model in closed form: arithmetic only.

One serial link and one compute queue. What counts is deadlines: which experts are in the fast tier
when their layer's routing is known, what then has to be fetched on demand, and how much of that no
computing hides. The notation is that of MoEpic (arXiv 2509.08342); the formulas are derived, and
checked against a simulation in the tests. Here are the terms and what is shared; a decoded token is
priced in :mod:`moepack.decode_cost`.

Everything is computed for many options at once: ``S`` states of the slots (how likely a part is
resident) times ``C`` cuts (how long a part takes), with results of [S, C]; one option is S = C = 1.
Every step is monotone in the link: a faster one never makes anything dearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Seconds that the link takes for one transfer of so many bytes.
LinkSeconds = Callable[[int], float]

Array = npt.NDArray[np.float64]
Number = float | Array


class LayerTimes(NamedTuple):
    """Compute seconds of one layer for one token.

    Attributes
    ----------
    other_s : float
        Before the routing is known: attention and router.
    expert_s : float or [C]
        One routed expert, with all its segments.
    transfer_s : float
        What each transfer costs the computing thread beside the link's time.
    burst_s : float
        What having to transfer anything costs it, once.
    shared_s : float
        After the routing, before any routed expert: the shared expert.
    ahead_transfer_s, ahead_burst_s : float
        What each transfer that was begun ahead costs it, and having any of them where nothing is
        demanded.
    """

    other_s: float
    expert_s: Number
    transfer_s: float = 0.0
    shared_s: float = 0.0
    burst_s: float = 0.0
    ahead_transfer_s: float = 0.0
    ahead_burst_s: float = 0.0


class Lacks(NamedTuple):
    """How likely an activated expert lacks its bottom alone, and all that it has.

    ``bottom_disk`` and ``both_disk``: and RAM lacks it too; None where RAM holds everything.
    """

    bottom: Array
    both: Array
    bottom_disk: Array | None = None
    both_disk: Array | None = None

    def each(self, change: Callable[[Array], Array]) -> Lacks:
        """All of them changed alike."""
        return Lacks(
            change(self.bottom),
            change(self.both),
            None if self.bottom_disk is None else change(self.bottom_disk),
            None if self.both_disk is None else change(self.both_disk),
        )


class Parts(NamedTuple):
    """How experts are cut, each a float or [C].

    ``top_s`` and ``bottom_s`` are the link's seconds for one, 0 where there is none; ``top_share``
    is theta, the top's share of an expert's computing. ``top_read_s`` and ``bottom_read_s`` are the
    disk's, for what RAM does not hold; ``bounces`` says how many of those may be on their way.
    ``pieces``: in how many a transfer goes, of which those that have not begun can be broken off.
    """

    top_s: Number
    bottom_s: Number
    top_share: Number
    top_read_s: Number = 0.0
    bottom_read_s: Number = 0.0
    bounces: int = 2
    pieces: Number = 1.0

    def columns(self) -> tuple[Array, Array, Array]:
        """The link's seconds and the share, each [C]."""
        top_s, bottom_s, share = (np.atleast_1d(np.asarray(part, np.float64)) for part in self[:3])
        return top_s, bottom_s, share

    def read_columns(self) -> tuple[Array, Array]:
        """The disk's seconds, each [C]."""
        top_s, bottom_s = (np.atleast_1d(np.asarray(part, np.float64)) for part in self[3:5])
        return top_s, bottom_s

    def read_s(self, lacks: Lacks) -> Array:
        """Disk seconds of what an expert lacks on average, [..., C] for lacks of [...]."""
        assert lacks.bottom_disk is not None, "RAM holds everything"
        assert lacks.both_disk is not None, "RAM holds everything"
        top_s, bottom_s = self.read_columns()
        both = lacks.both_disk[..., None] * (top_s + bottom_s)
        return np.asarray(lacks.bottom_disk[..., None] * bottom_s + both)

    def link_s(self, lacks: Lacks) -> Array:
        """Link seconds of what an expert lacks on average, [..., C] for lacks of [...]."""
        top_s, bottom_s, _ = self.columns()
        return np.tensordot(
            np.stack(lacks[:2]), np.stack([bottom_s, top_s + bottom_s]), axes=(0, 0)
        )


class Held(NamedTuple):
    """How likely each part of an expert is resident, each a float or [S].

    1 where there is no such part. Caches are nested (a bottom is kept only where every top is), so
    an expert is whole with the smaller of the two chances. ``bottom_disk`` and ``both_disk``: see
    :class:`Lacks`.
    """

    top: Number
    bottom: Number
    bottom_disk: Array | None = None
    both_disk: Array | None = None

    def lacking(self) -> Lacks:
        """What an activated expert lacks if nothing is fetched ahead, each [S]."""
        top, bottom = (np.atleast_1d(np.asarray(chance, np.float64)) for chance in self[:2])
        lacks = Lacks(top - np.minimum(top, bottom), 1.0 - top)
        return lacks._replace(bottom_disk=self.bottom_disk, both_disk=self.both_disk)


def throttled(link: LinkSeconds, rate_bytes_per_s: float, latency_s: float) -> LinkSeconds:
    """A link that takes at least ``latency_s + bytes / rate``, as the throttled transfer does."""
    return lambda size: max(link(size), latency_s + size / rate_bytes_per_s)


def missing_after(used: Array) -> Array:
    """Expected experts of a prompt that caches of 0, 1 ... N slots lack, [N + 1].

    Parameters
    ----------
    used : [N]
        How likely a prompt needs each expert, in the order in which slots are filled.
    """
    return np.append(np.cumsum(used[::-1])[::-1], 0.0)


def distinct_experts(shares: Array, tokens: int, top_k: int) -> Array:
    """Probability that each expert is activated by at least one of ``tokens``, [N].

    ``1 - (1 - p)^P`` with p = K * share: tokens taken as independent, which overstates the spread
    of real, correlated text.
    """
    chance = np.minimum(1.0, top_k * np.asarray(shares, dtype=np.float64))
    return np.asarray(1.0 - (1.0 - chance) ** tokens)


def prefill_layer_s(
    other_s: float,
    experts_s: Number,
    transfer_s: float,
    burst_s: float,
    parts: Parts,
    missing: tuple[Number, Number],
    *,
    staging_experts: int,
    ahead: bool = False,
    missing_disk: tuple[Number, Number] | None = None,
) -> Array:
    """Expected seconds of a whole prompt through one layer, [S, C].

    Each missing segment crosses the link once per prompt: ``other + max(link, experts)``; with one
    frame, which cannot overlap them, their sum; fetched ahead ``max(link, other + experts)``, the
    predictions of a whole prompt taken to name all that it needs.

    Parameters
    ----------
    other_s, experts_s
        Everything but the routed experts, and these, the latter a float or [C].
    transfer_s, burst_s
        See :class:`LayerTimes`.
    missing
        Tops and bottoms that have to be fetched, each a float or [S]: :func:`missing_after`.
    missing_disk
        Those of them that RAM lacks too. The disk works beside the bus as far as experts are in
        flight: with one frame one after the other, with many both at once.
    """
    tops, bottoms = (np.atleast_1d(np.asarray(count, np.float64))[:, None] for count in missing)
    top_s, bottom_s, _ = parts.columns()
    link_s = tops * top_s + bottoms * bottom_s
    if missing_disk is not None:
        tops_read, bottoms_read = (
            np.atleast_1d(np.asarray(count, np.float64))[:, None] for count in missing_disk
        )
        top_read_s, bottom_read_s = parts.read_columns()
        read_s = tops_read * top_read_s + bottoms_read * bottom_read_s
        link_s = np.maximum(link_s, read_s) + np.minimum(link_s, read_s) / staging_experts
    transfers = tops * (top_s > 0.0) + bottoms * (bottom_s > 0.0)
    compute_s = np.atleast_1d(experts_s) + transfers * transfer_s
    compute_s = compute_s + np.minimum(transfers, 1.0) * burst_s
    if staging_experts == 1:
        return np.asarray(other_s + link_s + compute_s)
    if ahead:
        return np.maximum(link_s, other_s + compute_s)
    return np.asarray(other_s + np.maximum(link_s, compute_s))
