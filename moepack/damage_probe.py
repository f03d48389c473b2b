"""Measuring what rounding does: every expert at every precision, on what a text gives it.

A number of sequences go through the model together, layer by layer:

- *calibration* text, whose tokens tell what each expert's inputs are like
  (:mod:`moepack.calibration`); on a sample of them its errors are measured;
- *reference* text, shorter, of the same texts; second moments are not taken from it, where there is
  enough beside it;
- two copies of that, to which in every layer is added what rounding all its experts changes; to the
  one in the finest encoding that they fit, to the other in the coarsest;
- a copy for every rule for missing experts that is tried (:mod:`moepack.miss_thresholds`), to which
  is added what that changes if all experts are missing;
- two copies for every layer, to which is added what rounding all its experts changes, in that layer
  alone.

The logits of each copy beside those of the reference are its divergence. So one pass over the model
measures them all. What a trunk in 8 bits does (:mod:`moepack.trunk`) takes a second pass, over the
reference text alone.

Memory: two experts in the model's dtype and two in float32, what rounding one takes
(:mod:`moepack.quantise`), and the hidden states of the sequences four times. Experts are read
twice, once here and once by the engine, and once more for the trunk; rounding takes far longer than
that. The second pass takes the head once more, and the hidden states of the reference.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moepack.calibration import Calibration
from moepack.comparing import rows_within, score_rows
from moepack.damage import (
    DAMAGE_VERSION,
    DamageProfile,
    LayerDamage,
    MissDamage,
    MissTrial,
)
from moepack.damage_inputs import SAMPLED
from moepack.damage_recorder import DamageRecorder, Misses, Sequences
from moepack.encodings import fitting
from moepack.errors import ProfileError
from moepack.layouts import PREFILL_BLOCK_TOKENS, uniform_layout
from moepack.miss_thresholds import RULES, low_encoding
from moepack.profiling import (
    CHUNK_TOKENS,
    DEFAULT_TOKENS,
    SEQUENCE_TOKENS,
    require_downloaded,
)
from moepack.progress import NO_PROGRESS, Progress
from moepack.routing import TextSource
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import read_texts
from moepack.trace import ROUTING_PARTS, part_of_tokens
from moepack.trunk import ROUNDED
from moepack.units import MIB

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.layer_loop import Hidden

    from moepack.checkpoint import Checkpoint
    from moepack.factor_file import FactorFile
    from moepack.layout import Layout
    from moepack.model_spec import ModelSpec
    from moepack.plan import DeviceKind, Placement

#: The reference text: as many tokens as let its copies be about a chunk, within these.
_REFERENCE_TOKENS = (256, 2048)

#: Sequences of the reference text are no shorter, unless the texts are.
_LEAST_REFERENCE = 64

#: Logits that are compared at once take about so much.
_LOGIT_BYTES = 256 * MIB


class Measured(NamedTuple):
    """What rounding does, and what it was weighed by, whose second moments are in a file."""

    damage: DamageProfile
    calibration: Calibration


def measure_damage(
    checkpoint: Checkpoint,
    *,
    device: DeviceKind,
    texts: Sequence[Path],
    factors: FactorFile,
    progress: Progress = NO_PROGRESS,
) -> Measured:
    """Measure every expert of a model at every precision that it fits.

    Reads the whole model twice and rounds it once for each precision. Of each text only tokens are
    used that a routing profile would fit to, so that what :mod:`moepack.held_out` scores stays
    unseen.

    Parameters
    ----------
    factors
        Where the second moments go, and from which the calibration reads them.

    Raises
    ------
    TextError
        When a text cannot be read.
    ProfileError
        When the texts are too short, or no precision fits the model.
    NonFiniteWeightError
        When a weight is NaN or infinite.
    RunError
        When the model has no tokenizer, or cannot be run here.
    """
    import torch
    from moepack_runtime.loading import open_checkpoint
    from moepack_runtime.tokenizer import Tokenizer

    spec = checkpoint.spec
    folder = require_downloaded(checkpoint)
    _require_precisions(spec)
    tokenizer = Tokenizer.load(folder)
    read = read_texts(texts)
    learnt = [_learnt(tokenizer.encode(text.text), len(read)) for text in read]
    calibration = [piece for ids in learnt for piece in _pieces(ids)]
    begun = _reference(learnt, len(spec.moe_layers))
    reference = list(begun.values())
    total = sum(map(len, calibration))
    if not reference:
        raise ProfileError(
            f"the calibration texts hold {total} tokens; expected some hundreds at least: "
            "name longer ones with --text"
        )
    copies = reference * (2 + len(RULES) + 2 * len(spec.moe_layers))
    low = low_encoding(spec)
    layout = uniform_layout(spec, 1.0)
    placement = streaming_placement(
        spec,
        layout,
        device,
        torch.get_num_threads(),
        context_tokens=min(SEQUENCE_TOKENS, spec.context_length),
        staging_experts=2 * most_experts_of_a_token(spec),
    )
    with (
        open_checkpoint(checkpoint, spec, layout, placement, progress=progress) as engine,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        recorder = DamageRecorder(
            engine,
            checkpoint,
            Sequences(len(calibration), len(reference), _shared(learnt, begun)),
            Misses(low, RULES),
            progress,
            pool,
            factors,
        )
        engine.observe(recorder)
        experts = sum(spec.moe(number).num_experts for number in spec.moe_layers)
        progress.start("round every expert (experts)", experts, "items")
        try:
            stream = engine.survey([*calibration, *reference, *copies])
        finally:
            progress.done()
            engine.observe(None)
        fine, coarse, *others = _divergences(engine, stream[len(calibration) :], reference)
        exact = [block.hidden for block in stream[len(calibration) :][: len(reference)]]
        del stream
    trunk_divergence = _trunk_divergence(checkpoint, layout, placement, reference, exact, progress)
    of_rules, of_layers = others[: len(RULES)], others[len(RULES) :]
    found = recorder.calibration()
    damage = DamageProfile(
        version=DAMAGE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        weights_digest=checkpoint.weights_digest,
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        tokens=total,
        sampled=SAMPLED,
        divergence_tokens=sum(map(len, reference)),
        fine_divergence=fine,
        coarse_divergence=coarse,
        sources=tuple(
            TextSource(text.name, hashlib.sha256(text.content).hexdigest(), len(ids))
            for text, ids in zip(read, learnt, strict=True)
        ),
        layers=tuple(
            LayerDamage(*errors, *pair)
            for errors, pair in zip(
                recorder.found(), zip(of_layers[::2], of_layers[1::2], strict=True), strict=True
            )
        ),
        calibration=found.digest,
        trunk_divergence=trunk_divergence,
        misses=MissDamage(
            low,
            tuple(
                MissTrial(rule.exact_up_to, rule.low_up_to, saved, divergence)
                for rule, saved, divergence in zip(RULES, recorder.saved(), of_rules, strict=True)
            ),
        ),
    )
    return Measured(damage, found)


def _require_precisions(spec: ModelSpec) -> None:
    for number in spec.moe_layers:
        width = spec.moe(number).intermediate_size
        if not fitting(spec.hidden_size, width):
            raise ProfileError(
                f"{spec.name}: experts of {width} neurons and a hidden size of {spec.hidden_size} "
                "fit no precision below the model's own, expected multiples of 4; leave out --bits"
            )


def _learnt(ids: Sequence[int], texts: int) -> Sequence[int]:
    """What is used of a text: what *fit* has of it, and no more than a share of a chunk."""
    parts = part_of_tokens(min(len(ids), DEFAULT_TOKENS // texts))
    return ids[: min(int((parts == ROUTING_PARTS.index("fit")).sum()), CHUNK_TOKENS // texts)]


def _pieces(ids: Sequence[int]) -> list[Sequence[int]]:
    length = min(SEQUENCE_TOKENS, PREFILL_BLOCK_TOKENS)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def _reference(learnt: Sequence[Sequence[int]], layers: int) -> dict[int, Sequence[int]]:
    """The beginnings of as many texts as leave each a sequence of some length, by their number."""
    least, most = _REFERENCE_TOKENS
    wanted = min(max(CHUNK_TOKENS // (2 * layers + 3), least), most)
    count = max(1, min(len(learnt), wanted // _LEAST_REFERENCE))
    length = min(wanted // count, SEQUENCE_TOKENS, PREFILL_BLOCK_TOKENS)
    texts = (number * len(learnt) // count for number in range(count))
    taken = {number: learnt[number][:length] for number in texts}
    return {number: piece for number, piece in taken.items() if len(piece) > 1}


def _shared(learnt: Sequence[Sequence[int]], begun: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """How many tokens at the beginning of each piece are of the reference."""
    return tuple(
        len(begun.get(number, ())) if place == 0 else 0
        for number, ids in enumerate(learnt)
        for place, _ in enumerate(_pieces(ids))
    )


def _divergences(
    engine: Engine, stream: Sequence[Hidden], reference: Sequence[Sequence[int]]
) -> list[float]:
    """KL of each copy of the reference text, whose own states come first."""
    import torch

    rows = rows_within(_LOGIT_BYTES, engine.spec.vocab_size)
    exact, copies = stream[: len(reference)], stream[len(reference) :]
    found = []
    for begin in range(0, len(copies), len(reference)):
        total, tokens = 0.0, 0
        for block, base in zip(copies[begin : begin + len(reference)], exact, strict=True):
            for part, of_base in _row_pairs(block.hidden, base.hidden, rows):
                ids = torch.zeros(len(part), dtype=torch.int64, device=part.device)
                kl = score_rows(engine.logits, part, ids, of_base).kl
                assert kl is not None
                total, tokens = total + float(kl.sum()), tokens + len(part)
        found.append(total / tokens)
    return found


def _trunk_divergence(
    checkpoint: Checkpoint,
    layout: Layout,
    placement: Placement,
    reference: Sequence[Sequence[int]],
    exact: Sequence[torch.Tensor],
    progress: Progress,
) -> float:
    """KL of the model with its trunk in 8 bits, and exact experts, on the reference text.

    Parameters
    ----------
    exact
        The last states of the exact model there, [tokens, hidden] of each sequence.
    """
    import torch
    from moepack_runtime.exact_head import load_head
    from moepack_runtime.loading import open_checkpoint

    spec = checkpoint.spec
    layout = replace(layout, trunk=ROUNDED)
    placement = streaming_placement(
        spec,
        layout,
        placement.device,
        placement.threads,
        context_tokens=placement.context_tokens,
        staging_experts=placement.staging_experts,
    )
    rows = rows_within(_LOGIT_BYTES, spec.vocab_size)
    total, tokens = 0.0, 0
    with open_checkpoint(checkpoint, spec, layout, placement, progress=progress) as engine:
        head = load_head(checkpoint, spec, engine.device)
        for block, base in zip(engine.survey(reference), exact, strict=True):
            for part, of_base in _row_pairs(block.hidden, base, rows):
                ids = torch.zeros(len(part), dtype=torch.int64, device=part.device)
                kl = score_rows(engine.logits, part, ids, of_base, head).kl
                assert kl is not None
                total, tokens = total + float(kl.sum()), tokens + len(part)
    return total / tokens


def _row_pairs(
    one: torch.Tensor, other: torch.Tensor, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for begin in range(0, len(one), rows):
        yield one[begin : begin + rows], other[begin : begin + rows]
