"""The replay of a plan on the routing of a run: what exactly these tokens should have taken.

A forecast is for routing like that of the texts that were recorded; this is for the generations
that were measured. Their caches are stepped as the engine steps them, pass by pass, from one
generation to the next, by the rules of :mod:`moepack.residency` themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moepack.activations import activations
from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.decoding import Decoding
from moepack.fixed_times import fixed_times
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.passes import guessed_layers
from moepack.plan import Placement
from moepack.prefilling import prefill
from moepack.prompts import prompt_passes, prompts_at
from moepack.replayed import Replayed
from moepack.routing import make_profile
from moepack.routing_tables import RoutingTables
from moepack.segment_times import behind_ram, segments_of
from moepack.stepped_caches import SteppedCaches
from moepack.stepped_decoding import stepped_decoding
from moepack.tier_decoding import TierDecoding
from moepack.trace import LayerShape, Trace

if TYPE_CHECKING:
    from moepack_runtime.engine import Engine


def record_run(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Trace:
    """What :func:`moepack.measuring.measure` runs, as a trace, its warm-up as the first sequences.

    One sequence for each generation: its prompt is *fit*, what was decoded behind it is *test*. The
    last token that is drawn goes through no layer. Observing takes time, and changes nothing of
    what is computed: so a run is measured first and recorded then.
    """
    from moepack.measuring import draw, warm_up, warming_tokens
    from moepack.profiling import RoutingRecorder

    recorder = RoutingRecorder(engine)
    engine.observe(recorder)
    warming = [(len(prompt), warming_tokens(engine, prompt) - 1) for prompt in prompts]
    lengths = [*warming, *((len(prompt), new_tokens - 1) for prompt in prompts)]
    try:
        warm_up(engine, prompts)
        for prompt in prompts:
            for _ in draw(engine, prompt, new_tokens):
                pass
    finally:
        engine.observe(None)
    sequence = np.repeat(np.arange(len(lengths), dtype=np.uint32), [sum(pair) for pair in lengths])
    part = np.concatenate([np.repeat(np.array([0, 2], np.uint8), pair) for pair in lengths])
    return recorder.trace(sequence, part)


def replay_run(
    spec: ModelSpec,
    compute: ComputeProfile,
    link: LinkSeconds,
    layout: Layout,
    placement: Placement,
    run: Trace,
    *,
    disk: LinkSeconds | None = None,
) -> list[Replayed]:
    """Replay generations one after the other, with the caches as each leaves them to the next.

    Parameters
    ----------
    link
        Seconds of one transfer of so many bytes; see :func:`moepack.cost.throttled`.
    run
        From :func:`record_run`: one sequence for each generation, its prompt *fit* and what was
        decoded *test*. The caches are as planned before the first of them. Where the placement
        replaces missing experts, what is computed depends on what is resident: such a run is to be
        recorded under this placement, from the start.
    disk
        Seconds of one read from the disk, where the placement's RAM does not hold everything.

    Returns
    -------
    list of Replayed
        Of each generation that decoded anything, in their order.
    """
    shapes = [
        LayerShape(number, spec.moe(number).num_experts, spec.moe(number).top_k)
        for number in spec.moe_layers
    ]
    profile = make_profile(
        run,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how="recorded from a run",
        sources=(),
        layers=tuple(shapes),
    )
    replayer = RunReplayer(spec, compute, link, disk, layout, placement, RoutingTables(profile))
    found = []
    for number in np.unique(run.sequence):
        rows = np.flatnonzero(run.sequence == number)
        decoded = rows[run.part[rows] != 0]
        if len(decoded):
            found.append(replayer.generation(rows[run.part[rows] == 0], decoded))
        else:
            replayer.caches.step(rows)
    return found


def mean_of(replays: Sequence[Replayed]) -> Replayed:
    """What generations of one length took on average, as :func:`moepack.measuring.average` does."""
    values = (np.mean(np.array(field), axis=0) for field in zip(*replays, strict=True))
    mean = Replayed(*values)
    return mean._replace(events=sum(each.events for each in replays))


class RunReplayer:
    """Replays generations of one run under one placement, in their order."""

    def __init__(
        self,
        spec: ModelSpec,
        compute: ComputeProfile,
        link: LinkSeconds,
        disk: LinkSeconds | None,
        layout: Layout,
        placement: Placement,
        tables: RoutingTables,
    ) -> None:
        self._spec = spec
        self._compute = compute
        self._layout = layout
        self._placement = placement
        self._tables = tables
        segments = segments_of(spec, compute, layout, link)
        self._segments = behind_ram(segments, spec, layout, placement, disk)
        self.caches = SteppedCaches(tables, placement, self._segments)

    def generation(self, prompt: npt.NDArray[np.intp], decoded: npt.NDArray[np.intp]) -> Replayed:
        """One generation, given by its tokens in the trace."""
        tables, segments, frames = self._tables, self._segments, self._placement.staging_experts
        prompts = prompts_at(tables, [prompt], self._layout.prefill_block_tokens)
        passes = prompt_passes(
            self._compute,
            tables,
            prompts,
            self._layout,
            self._placement,
            segments,
            "none",
            held=self.caches.all_held(),
        )
        guessed = guessed_layers(self._placement, segments, tables.layers)
        fixed = fixed_times(self._spec, self._compute, prompts.blocks, guessed)
        first_s = float(prefill(passes, fixed, segments, frames=frames)[0])
        self.caches.step(prompt)
        return self.decoding(decoded).replayed(first_s)

    def decoding(self, decoded: npt.NDArray[np.intp]) -> Decoding | TierDecoding:
        """Tokens that are decoded one after the other, with the link idle before the first."""
        tables, segments = self._tables, self._segments
        guessed = guessed_layers(self._placement, segments, tables.layers)
        return stepped_decoding(
            tables,
            self.caches,
            activations(tables, decoded),
            self._placement,
            segments,
            fixed_times(self._spec, self._compute, (1,), guessed),
            as_ready=True,
        )
