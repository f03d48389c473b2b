"""A prompt under a placement: each layer over all its blocks, each missing segment once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.compute import ComputeProfile, Curve
from moepack.lane_clock import Seconds
from moepack.layout import Layout
from moepack.mixed_residency import starting
from moepack.passes import Oracle, ahead_seconds, read_seconds
from moepack.plan import Placement
from moepack.routing_tables import RoutingTables
from moepack.segment_classes import whole_part
from moepack.segment_times import Segments
from moepack.trace import NO_PREDICTION, RoutingPart

#: Prompts whose mean is the time to the first token.
MAX_PROMPTS = 4

Counts = npt.NDArray[np.int64]


class Prompts(NamedTuple):
    """What some prompts of one length use. ``W`` counts prompts, ``N`` is the widest layer.

    Attributes
    ----------
    blocks : tuple of int
        Lengths of the blocks that a prompt is run in.
    counts : int [W, L, blocks, N]
        Tokens of each block that use each expert.
    predicted : bool [W, L, N]
        Some token's prediction, to the layer's top-k, names the expert.
    """

    blocks: tuple[int, ...]
    counts: Counts
    predicted: npt.NDArray[np.bool_]


def block_lengths(tokens: int, block_tokens: int) -> tuple[int, ...]:
    """Lengths of the blocks that ``tokens`` are run in."""
    whole, rest = divmod(tokens, block_tokens)
    return (block_tokens,) * whole + ((rest,) if rest else ())


def prompts_of(
    tables: RoutingTables, part: RoutingPart, *, prompt_tokens: int, block_tokens: int
) -> Prompts:
    """Take prompts from a part of the trace.

    From the whole trace where the part is shorter than one prompt, and repeated where that is
    too short as well.
    """
    tokens = tables.tokens(part)
    if len(tokens) < prompt_tokens:
        tokens = np.arange(len(tables.trace.ids))
    if len(tokens) < prompt_tokens:
        tokens = np.resize(tokens, prompt_tokens)
    prompts = min(MAX_PROMPTS, len(tokens) // prompt_tokens)
    starts = np.linspace(0, len(tokens) - prompt_tokens, prompts).astype(int)
    return prompts_at(
        tables, [tokens[start : start + prompt_tokens] for start in starts], block_tokens
    )


def prompts_at(
    tables: RoutingTables, prompts: Sequence[npt.NDArray[np.intp]], block_tokens: int
) -> Prompts:
    """What some prompts of one length use, each given by its tokens in the trace."""
    blocks = block_lengths(len(prompts[0]), block_tokens)
    widest = max(shape.num_experts for shape in tables.layers)
    counts = np.zeros((len(prompts), len(tables.layers), len(blocks), widest), dtype=np.int64)
    predicted = np.zeros((len(prompts), len(tables.layers), widest), dtype=np.bool_)
    bounds = np.cumsum((0, *blocks))
    for prompt, taken in enumerate(prompts):
        for index, shape in enumerate(tables.layers):
            ids = tables.trace.ids[taken, index, : shape.top_k]
            for block in range(len(blocks)):
                inside = ids[bounds[block] : bounds[block + 1]].ravel()
                counts[prompt, index, block] = np.bincount(inside, minlength=widest)
            guesses = tables.trace.predicted[taken, index, : shape.top_k].ravel()
            predicted[prompt, index, guesses[guesses != NO_PREDICTION]] = True
    return Prompts(blocks, counts, predicted)


class PromptPasses(NamedTuple):
    """The work of some prompts, each [W, L, N * G]; see :class:`moepack.lane_clock.Work`.

    ``read_s`` and ``ahead_read_s``: of the disk, before the other two; None where RAM holds all.
    """

    compute_s: Seconds
    fetch_s: Seconds
    ahead_s: Seconds
    read_s: Seconds | None = None
    ahead_read_s: Seconds | None = None


def prompt_passes(
    compute: ComputeProfile,
    tables: RoutingTables,
    prompts: Prompts,
    layout: Layout,
    placement: Placement,
    segments: Segments,
    oracle: Oracle,
    held: npt.NDArray[np.bool_] | None = None,
) -> PromptPasses:
    """What prompts have to compute and to fetch.

    An engine that fetches ahead asks for what the predictions for all tokens of the prompt name.

    Parameters
    ----------
    held : bool [L, N, G] or None
        What is resident when they begin; None: what the caches start with.
    """
    used = prompts.counts.sum(axis=2) > 0  # [W, L, N]
    parts = segments.link_s.shape[1]
    if held is None:
        held = _held_at_start(tables, placement, segments, used.shape[2])
    everyone = np.broadcast_to(np.arange(used.shape[2]), used.shape[1:])  # [L, N]
    link_s = segments.linking_s(everyone).reshape(*everyone.shape, parts)
    fetch_s = np.where(used[..., None] & ~held, link_s, 0.0)
    expert_s = np.zeros(used.shape)
    longest = int(prompts.counts.max())
    for index, cut in enumerate(layout.layers):
        entry, two = compute.layer(cut.layer), bool(segments.interior[index])
        curves = [entry.expert_times(name, cut=two) for name in cut.classes]
        seconds = np.array([_first_seconds(curve, longest) for curve in curves])
        its = 0 if segments.classes is None else segments.classes.place[index]
        expert_s[:, index] = seconds[its, prompts.counts[:, index]].sum(axis=1)
    compute_s = expert_s[..., None] * segments.share[:, None, :]
    named = used if oracle != "none" else prompts.predicted
    fetches = np.array([place.prefetch != "off" for place in placement.layers])
    asked = named & fetches[:, None]
    # One frame stays for what nobody has guessed.
    ahead_s = ahead_seconds(
        placement,
        segments,
        everyone,
        asked,
        np.broadcast_to(held, (*asked.shape, parts)),
        placement.staging_experts - 1,
    )
    flat = (*used.shape[:2], used.shape[2] * parts)
    fetch_s = fetch_s.reshape(flat)
    compute_s = compute_s.reshape(flat)
    made = PromptPasses(compute_s, fetch_s, ahead_s)
    if segments.from_disk is None:
        return made
    from_disk = np.broadcast_to(segments.from_disk, (*used.shape, parts))
    return made._replace(
        read_s=read_seconds(segments, everyone, fetch_s, from_disk),
        ahead_read_s=read_seconds(segments, everyone, ahead_s, from_disk),
    )


@functools.lru_cache(maxsize=64)
def _first_seconds(curve: Curve, longest: int) -> tuple[float, ...]:
    """Seconds of an expert for 0, 1 ... tokens."""
    return (0.0, *(curve.at(count) for count in range(1, longest + 1)))


def _held_at_start(
    tables: RoutingTables, placement: Placement, segments: Segments, widest: int
) -> npt.NDArray[np.bool_]:
    """What is resident before the first token, bool [L, N, G]: the head of each hot ranking."""
    parts = segments.link_s.shape[1]
    held = np.zeros((len(tables.layers), widest, parts), dtype=np.bool_)
    for index, place in enumerate(placement.layers):
        slots = (place.top_slots, place.bottom_slots)
        if parts == 1:
            slots = (place.top_slots + place.bottom_slots,) * 2
        if placement.pool is not None:
            # Places are handed out over the layers in turn.
            each, rest = divmod(placement.pool.slots, len(tables.layers))
            slots = (each + (index < rest),) * 2
        cut = segments.mixed(index)
        for part in range(parts):
            first = place.hot[: slots[part]]
            if cut is not None:
                first = starting(cut, place, whole_part(cut))
            held[index, list(first), part] = True
    held |= (segments.stored_bytes == 0)[:, None, :]
    return held
