"""Where splitting gains over a good whole-expert engine, as links get faster.

An independent trial replayed recorded routing of Qwen1.5-MoE-A2.7B; its figures stand beside ours.
"""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moepack.errors import ProfileError
from moepack.model_spec import ModelSpec
from moepack.paper.rebuilt import Rebuilt
from moepack.paper.settings import qwen
from moepack.paper.table import Column, PaperTable, Row
from moepack.routing import RoutingProfile, make_profile
from moepack.trace import NO_PREDICTION, ROUTING_PARTS, LayerShape, Trace

#: Tokens that only warm the caches up.
WARM_TOKENS = 64

#: Share of the predictions that are right, where a recording has none.
RECALL = 0.85

#: What an independent trial found: on demand, prefetch only, whole experts with prefetching, splits
#: of 0.3, 0.5 and 0.8 (0.7 in the last two lines), by transfer time and whole experts a layer.
TRIAL_MS = {
    (1.72, 10): (143, 165, 113, 132, 127, 121),
    (1.72, 20): (112, 165, 86, 116, 97, 89),
    (1.0, 10): (97, 96, 70, 77, 76, 73),
    (0.8, 20): (72, 77, 58.7, 58.8, 58.4, 58.6),
    (0.45, 10): (64, 58.0, 57.9, 57.9, 57.9, 57.9),
}


def trial_table(recording: Path | None) -> PaperTable:
    """Where splitting gains over whole experts with prefetching, as links get faster."""
    routing = None
    if recording is not None:
        routing = read_recording(recording, qwen().spec)
    rows = []
    for (transfer_ms, experts_each), trial in TRIAL_MS.items():
        setting = qwen(transfer_ms / 1e3, "qwen1.5-moe-a2.7b")
        rebuilt = Rebuilt(setting, routing or _one_text(setting.request.routing))
        top_k = rebuilt.tables.layers[0].top_k
        last = 0.8 if transfer_ms > 1 else 0.7
        contenders = [
            rebuilt.even(1.0, experts_each, depth=0),
            rebuilt.even(1.0, experts_each, depth=top_k, slots=False),
            *(rebuilt.even(ratio, experts_each, depth=top_k) for ratio in (1.0, 0.3, 0.5, last)),
        ]
        values = [rebuilt.replay(each).tpot_s for each in contenders]
        name = f"{transfer_ms} ms, {experts_each} a layer"
        rows.append(Row(name, tuple(values)))
        rows.append(Row("  in a trial", tuple(value / 1e3 for value in trial)))
    heads = ("on demand", "prefetch only", "whole, prefetch", "theta 0.3", "0.5", "0.8 or 0.7")
    return PaperTable(
        "Splitting against whole experts with prefetching: time per token, Qwen1.5-MoE",
        tuple(Column(head, "ms") for head in heads),
        tuple(rows),
        (
            "routing: recorded, 85 % of the predictions right"
            if recording
            else "routing: drawn from the preset qwen1.5-moe-a2.7b; the trial's was recorded",
        ),
    )


def read_recording(path: Path, spec: ModelSpec) -> RoutingProfile:
    """The prose of a recorded trace, with predictions of which a share is right.

    Parameters
    ----------
    path
        An ``.npz`` whose array ``prose`` is [tokens, L, K], as github.com/pjordanandrsn/
        grouped-nf4-gemm records it.

    Raises
    ------
    ProfileError
        When it cannot be read or is of another shape.
    """
    layers = [LayerShape(n, spec.moe(n).num_experts, spec.moe(n).top_k) for n in spec.moe_layers]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids = arrays["prose"].astype(np.uint16)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as failure:
        raise ProfileError(f"{path}: not a recorded trace ({failure})") from None
    shape = layers[0]
    if ids.shape[1:] != (len(layers), shape.top_k) or ids.max() >= shape.num_experts:
        raise ProfileError(
            f"{path}: prose is {ids.shape}, expected [tokens, {len(layers)}, {shape.top_k}] of "
            f"{shape.num_experts} experts"
        )
    trace = Trace(
        ids=ids,
        weights=np.full(ids.shape, 1 / shape.top_k, dtype=np.float16),
        predicted=_predictions(ids, shape.num_experts),
        sequence=np.zeros(len(ids), dtype=np.uint32),
        part=_warmed(len(ids)),
    )
    return make_profile(
        trace,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="",
        how=f"recorded: {path.name}",
        sources=(),
        layers=tuple(layers),
    )


def _predictions(ids: npt.NDArray[np.uint16], experts: int) -> npt.NDArray[np.uint16]:
    """As many predicted experts as are activated, each right or wrong by itself."""
    rng = np.random.default_rng(0)
    tokens, layers, top_k = ids.shape
    # Those to be named come first: right ones by chance, and others to fill up.
    order = rng.random((tokens, layers, experts)) + 1.0
    right = rng.random(ids.shape) < RECALL
    np.put_along_axis(
        order, ids.astype(np.intp), np.where(right, rng.random(ids.shape) - 1.0, 3.0), axis=2
    )
    named = np.argsort(order, axis=2)[:, :, :top_k].astype(np.uint16)
    shuffled = rng.permuted(named, axis=2)
    predicted = np.full((tokens, layers, 2 * top_k), NO_PREDICTION, dtype=np.uint16)
    predicted[:, :, :top_k] = shuffled
    predicted[0, 0] = NO_PREDICTION
    return predicted


def _warmed(tokens: int) -> npt.NDArray[np.uint8]:
    """The first tokens are *fit*, all others *test*."""
    part = np.full(tokens, ROUTING_PARTS.index("test"), dtype=np.uint8)
    part[:WARM_TOKENS] = ROUTING_PARTS.index("fit")
    return part


def _one_text(drawn: RoutingProfile) -> RoutingProfile:
    """The first text of a drawn profile, after as short a warm-up."""
    trace = drawn.trace.take(np.flatnonzero(drawn.trace.sequence == 0))
    return replace(drawn, trace=replace(trace, part=_warmed(len(trace.ids))))
