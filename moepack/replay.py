"""Replaying a recorded trace under a placement: what a run would take, token by token.

What is resident comes from the rules of :mod:`moepack.residency` (through the stack positions of
:mod:`moepack.stack_ranks`, which are equal to them); when things happen comes from
:mod:`moepack.timeline`. Contents of a cache do not depend on times, so the two are separate passes.

Decoding is replayed over the tokens of one part of the trace, with the caches as the trace up to
each token has left them. For passes of one token that is what an engine's caches do, event by
event. A whole prompt, which an engine accounts for in one pass, may leave another expert or two in
a cache for a while; on recorded runs the hit rate after it moved by less than a point.

A prompt is replayed as the runtime runs it, layer by layer over all its blocks, with the caches as
they are at the start. Where an engine fetches nothing ahead, no pass depends on another and all are
computed at once; otherwise the passes are cut into lanes that run side by side, each again from
where the one before it has ended, until nothing changes: the result is that of one lane.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moepack.activations import activations, perfect
from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.decoding import Decoding
from moepack.fixed_times import fixed_times
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.passes import Oracle, decode_passes, guessed_layers
from moepack.plan import Placement
from moepack.prefilling import computing_s, prefill
from moepack.prompts import Prompts, prompt_passes, prompts_of
from moepack.replayed import Replayed
from moepack.routing_tables import RoutingTables
from moepack.segment_times import Segments, behind_ram, segments_of
from moepack.stepped_caches import SteppedCaches
from moepack.stepped_decoding import stepped_decoding
from moepack.tier_decoding import TierDecoding
from moepack.trace import RoutingPart


class Replayer:
    """Replays placements of one model on one machine, over one part of one trace.

    Parameters
    ----------
    link
        Seconds of one transfer of so many bytes.
    prompt_tokens
        Length of the prompts, see :func:`moepack.prompts.prompts_of`.
    part
        Where a trace is so short that it has no token of this part, all of it.
    disk
        Seconds of one read from the disk, for placements whose RAM does not hold everything.
    """

    def __init__(
        self,
        spec: ModelSpec,
        compute: ComputeProfile,
        tables: RoutingTables,
        link: LinkSeconds,
        *,
        prompt_tokens: int,
        part: RoutingPart,
        disk: LinkSeconds | None = None,
    ) -> None:
        self._spec = spec
        self._disk = disk
        self._compute = compute
        self._tables = tables
        self._link = link
        self._part = part
        self._prompt_tokens = prompt_tokens
        tokens = tables.tokens(part)
        if not len(tokens):
            tokens = np.arange(len(tables.trace.ids))
        self._found = activations(tables, tokens)
        self._prompts: dict[int, Prompts] = {}

    def replay(
        self, layout: Layout, placement: Placement, *, as_ready: bool, oracle: Oracle = "none"
    ) -> Replayed:
        """Replay one placement.

        Parameters
        ----------
        as_ready
            Whether the engine computes what is resident while the rest arrives, for one token.
        oracle
            Knowledge that no engine has: for bounds.

        Raises
        ------
        ProfileError
            Where RAM does not hold everything, and nothing is known of the disk.
        """
        tables = self._tables.starting(tuple(place.hot for place in placement.layers))
        segments = segments_of(self._spec, self._compute, layout, self._link)
        segments = behind_ram(segments, self._spec, layout, placement, self._disk)
        guessed = guessed_layers(placement, segments, self._tables.layers)
        ttft_s, wait_s = self._prefill_s(layout, placement, segments, guessed, oracle)
        found = self._found if oracle == "none" else perfect(self._found)
        fixed = fixed_times(self._spec, self._compute, (1,), guessed)
        if placement.on_miss is not None and oracle == "none":
            # Over the tokens of the part alone, from what the caches start with.
            caches = SteppedCaches(tables, placement, segments)
            stepped = stepped_decoding(
                tables, caches, found, placement, segments, fixed, as_ready=as_ready
            )
            return stepped.replayed(ttft_s)._replace(prompt_wait_s=wait_s)
        passes = decode_passes(tables, found, placement, segments, oracle)
        frames = placement.staging_experts
        decoding = Decoding if passes.read_s is None else TierDecoding
        run = decoding(passes, found, fixed, segments, as_ready=as_ready, frames=frames)
        return run.replayed(ttft_s)._replace(prompt_wait_s=wait_s)

    def _prefill_s(
        self,
        layout: Layout,
        placement: Placement,
        segments: Segments,
        guessed: Sequence[bool],
        oracle: Oracle,
    ) -> tuple[float, float]:
        """Mean seconds to the first token over the prompts, and what of them is waiting."""
        block_tokens = layout.prefill_block_tokens
        if block_tokens not in self._prompts:
            self._prompts[block_tokens] = prompts_of(
                self._tables,
                self._part,
                prompt_tokens=self._prompt_tokens,
                block_tokens=block_tokens,
            )
        prompts = self._prompts[block_tokens]
        passes = prompt_passes(
            self._compute, self._tables, prompts, layout, placement, segments, oracle
        )
        fixed = fixed_times(self._spec, self._compute, prompts.blocks, guessed)
        ttft_s = float(prefill(passes, fixed, segments, frames=placement.staging_experts).mean())
        return ttft_s, max(0.0, ttft_s - float(computing_s(passes, fixed, segments).mean()))
