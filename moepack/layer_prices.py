"""What a layer costs in the closed form, by state and cut, under every way of fetching ahead.

See :mod:`moepack.layer_tables` for the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.cost import (
    Array,
    Held,
    LayerTimes,
    LinkSeconds,
    Parts,
    missing_after,
    prefill_layer_s,
)
from moepack.decode_cost import decode_ahead_s, decode_layer_s
from moepack.layer_problem import Cuts, LayerProblem
from moepack.plan import PrefetchMode
from moepack.prefetching import Ahead


class Variant(NamedTuple):
    """How a layer fetches ahead."""

    prefetch: PrefetchMode
    depth: int


def ranks_ahead(problem: LayerProblem) -> int:
    """How deep can be fetched ahead."""
    return min(len(problem.accuracy), problem.engine.max_prefetch_depth, problem.staging_experts)


def variants_of(problem: LayerProblem) -> Iterator[Variant]:
    """No prefetching, then every mode to every depth."""
    yield Variant("off", 0)
    for mode in problem.engine.prefetch:
        if mode != "off":
            yield from (Variant(mode, depth) for depth in range(1, ranks_ahead(problem) + 1))


def token_prices(
    problem: LayerProblem,
    token: LayerTimes,
    parts: Parts,
    held: Held,
    mode: PrefetchMode,
    ranks: Held | None,
) -> Array:
    """Seconds of a decoded token, by how many ranks are asked for ahead, [1 or D, S, C].

    ``ranks``: how likely what is predicted at each rank is held; None where nothing is fetched
    ahead.
    """
    frames, as_ready = problem.staging_experts, problem.engine.as_ready
    if ranks is None:
        return decode_layer_s(
            token, problem.top_k, parts, held, staging_experts=frames, as_ready=as_ready
        )[None]
    ahead = Ahead(mode, problem.gap_s, problem.accuracy, ranks, problem.guess_s)
    return decode_ahead_s(
        token,
        problem.top_k,
        parts,
        held,
        ahead,
        ranks_ahead(problem),
        staging_experts=frames,
        as_ready=as_ready,
    )


class Pricer:
    """Prices groups of states and cuts of one layer under every variant."""

    def __init__(
        self,
        problem: LayerProblem,
        hits: Array,
        predicted_held: Array,
        reads: tuple[Array, Array] | None = None,
    ) -> None:
        self._problem = problem
        self._reads = reads
        self._hits = hits
        self._predicted_held = predicted_held
        self._missing = missing_after(problem.used)
        cuts, interior = problem.cuts, problem.cuts.interior
        self._transfers: tuple[Array, ...] = _part_seconds(cuts, problem.link)
        if problem.disk is not None:
            self._transfers += _part_seconds(cuts, problem.disk.link)
        self._pieces = problem.pieces(np.maximum(cuts.top_bytes, cuts.bottom_bytes))
        self._share = np.where(interior, cuts.splits / cuts.width, 0.0)
        self._expert_s = np.where(interior, problem.split_s, problem.token.expert_s)
        self._prompt_s = np.where(interior, problem.prompt.split_s, problem.prompt.experts_s)

    def prices(
        self, variants: tuple[Variant, ...], states: slice, columns: npt.NDArray[np.intp]
    ) -> Iterator[tuple[int, Array]]:
        """(variant, seconds [S, C]) of the first N states, or of those after them."""
        problem = self._problem
        top_s, bottom_s, *read = (seconds[columns] for seconds in self._transfers)
        parts = Parts(top_s, bottom_s, self._share[columns], pieces=self._pieces[columns])
        if problem.disk is not None:
            top_read_s, bottom_read_s = read
            parts = parts._replace(
                top_read_s=top_read_s, bottom_read_s=bottom_read_s, bounces=problem.disk.bounces
            )
        token = problem.token._replace(expert_s=self._expert_s[columns])
        tops = states.start == 0
        reads, predicted_reads = self._reads or (None, None)
        held = self._held(self._hits, tops, reads)
        later = max(0, problem.new_tokens - 1)
        for mode in ("off", "bottoms", "all"):
            wanted = [place for place, variant in enumerate(variants) if variant.prefetch == mode]
            if not wanted or (mode == "bottoms" and not tops):
                continue  # where every top is there, "bottoms" is "all"
            first_s = self._prefill_s(parts, tops, columns, ahead=mode != "off")
            ranks = None
            if mode != "off":
                ranks = self._held(self._predicted_held, tops, predicted_reads)
            tokens_s = token_prices(problem, token, parts, held, mode, ranks)
            yield from zip(wanted, first_s + later * tokens_s, strict=True)

    def _held(self, curve: Array, tops: bool, reads: Array | None) -> Held:
        """Chances by state: N of tops while no bottom is kept, or N + 1 of bottoms beside all."""
        lacked = None if reads is None else (1.0 - curve) * reads
        if tops:
            held = Held(curve[..., :-1], np.zeros_like(curve[..., :-1]))
            if lacked is None:
                return held
            # Of a top that is held, the bottom is read if RAM lacks the expert: all that it lacks
            # are those that no slot would hold.
            kept = np.clip(lacked[..., :1] - lacked[..., :-1], 0.0, curve[..., :-1])
            return held._replace(bottom_disk=kept, both_disk=lacked[..., :-1])
        held = Held(np.ones_like(curve), curve)
        if lacked is None:
            return held
        return held._replace(bottom_disk=lacked, both_disk=np.zeros_like(lacked))

    def _prefill_s(
        self, parts: Parts, tops: bool, columns: npt.NDArray[np.intp], *, ahead: bool
    ) -> Array:
        missing = self._missing
        lacking = (missing[:-1], missing[0]) if tops else (0.0, missing)
        disk, read = self._problem.disk, None
        if disk is not None:
            behind = np.minimum(missing, missing[disk.held])
            read = (behind[:-1], behind[0]) if tops else (0.0, behind)
        prompt = self._problem.prompt
        return prefill_layer_s(
            prompt.other_s,
            self._prompt_s[columns],
            self._problem.token.transfer_s,
            self._problem.token.burst_s,
            parts,
            lacking,
            staging_experts=self._problem.staging_experts,
            ahead=ahead,
            missing_disk=read,
        )


def _part_seconds(cuts: Cuts, link: LinkSeconds) -> tuple[Array, Array]:
    """Seconds of each part's transfer, [C]: an uncut expert counts as all bottom."""
    seconds = {
        int(size): link(int(size))
        for size in {*cuts.top_bytes.tolist(), *cuts.bottom_bytes.tolist()}
        if size
    }
    top_s, bottom_s = (
        np.array([seconds.get(int(size), 0.0) for size in sizes])
        for sizes in (cuts.top_bytes, cuts.bottom_bytes)
    )
    interior = cuts.interior
    return np.where(interior, top_s, 0.0), np.where(interior, bottom_s, top_s + bottom_s)
