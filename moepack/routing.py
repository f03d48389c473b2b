"""How a model routes: popularity, and the recorded trace.

A profile is two files: ``routing.yaml``, a summary that a person can read, and ``routing.npz``,
the trace. Each text is split in its order into three parts: *fit* (what rankings are learnt from),
*select* (what decides between candidates) and *test* (what is reported).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.hit_rates import LayerHitRates, layer_curves, layer_hit_rates
from moepack.records import record
from moepack.trace import (
    NO_PREDICTION,
    ROUTING_PARTS,
    LayerShape,
    RoutingPart,
    Trace,
    activation_counts,
    hot_ranking,
)

ROUTING_VERSION = 2

_WHAT, _REMEDY = "routing profile", "make one with moepack profile"


@record
class TextSource:
    """One calibration text: its name, SHA-256, and how many of its tokens were run."""

    name: str
    sha256: str
    tokens: int


@record
class LayerRouting:
    """One layer at a glance.

    Attributes
    ----------
    usage_entropy : float
        Entropy of expert usage over its maximum: 1 is even use.
    reuse : float
        Probability that an expert is used again by the next token.
    recall_at_k, recall_at_2k : float
        Share of the true experts among the first k (2k) that were predicted.
    """

    layer: int
    num_experts: int
    top_k: int
    usage_entropy: float
    reuse: float
    recall_at_k: float
    recall_at_2k: float


@record
class RoutingSummary:
    """What was recorded, from what, and when.

    Attributes
    ----------
    hit_rates : tuple of LayerHitRates
        What caches would hit; empty where nobody asked.
    """

    version: int
    model_name: str
    model_digest: str
    recorded_utc: str
    how: str
    tokens: int
    sequences: int
    trace_sha256: str
    sources: tuple[TextSource, ...]
    layers: tuple[LayerRouting, ...]
    hit_rates: tuple[LayerHitRates, ...] = ()


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Summary and trace together. Whatever caches make of the trace is derived from it."""

    summary: RoutingSummary
    trace: Trace

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The layers on the trace's layer axis."""
        return tuple(
            LayerShape(entry.layer, entry.num_experts, entry.top_k) for entry in self.summary.layers
        )

    def layer_index(self, layer: int) -> int:
        """Where a decoder layer stands on the trace's layer axis."""
        return [entry.layer for entry in self.summary.layers].index(layer)

    def counts(self, layer: int, part: RoutingPart = "fit") -> npt.NDArray[np.int64]:
        """Activations of every expert of a layer in one part of the trace, int64 [experts]."""
        index = self.layer_index(layer)
        entry = self.summary.layers[index]
        return activation_counts(self.trace, index, entry.num_experts, entry.top_k, part)

    def hot_ranking(self, layer: int) -> tuple[int, ...]:
        """Every expert of a layer, most used in *fit* first; ties to the lower id."""
        return hot_ranking(self.counts(layer))

    def save(self, folder: Path) -> None:
        """Write ``routing.npz`` and then ``routing.yaml``, each atomically."""
        write_atomically(folder / "routing.npz", _to_bytes(self.trace))
        header = "How this model routes on the texts below: made by moepack profile."
        write_atomically(folder / "routing.yaml", records.to_yaml(self.summary, header=header))


def load_routing(path: Path) -> RoutingProfile:
    """Read a routing profile.

    Parameters
    ----------
    path
        A ``routing.yaml`` (its ``.npz`` lies beside it), or the folder that holds one.

    Raises
    ------
    ProfileError
        When a file is missing or is not what it should be, or the two do not belong together.
    """
    try:
        summary_path = path / "routing.yaml" if path.is_dir() else path
    except OSError as failure:
        raise ProfileError(f"{_WHAT} {path}: {failure.strerror}; {_REMEDY}") from None
    trace_path = summary_path.with_suffix(".npz")
    summary = load_summary(summary_path)
    try:
        blob = trace_path.read_bytes()
    except OSError as failure:
        raise ProfileError(f"{_WHAT} {trace_path}: {failure.strerror}; {_REMEDY}") from None
    found = hashlib.sha256(blob).hexdigest()
    if found != summary.trace_sha256:
        raise ProfileError(
            f"{trace_path}: SHA-256 {found[:12]}, {summary_path.name} says "
            f"{summary.trace_sha256[:12]}; the two do not belong together: profile again"
        )
    return _read_trace(trace_path, blob, summary)


def load_summary(path: Path) -> RoutingSummary:
    """Read a ``routing.yaml`` alone. Raises as :func:`load_routing` does."""
    return records.load_yaml(
        RoutingSummary,
        path,
        what=_WHAT,
        error=ProfileError,
        remedy=_REMEDY,
        version=ROUTING_VERSION,
    )


def _to_bytes(trace: Trace) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(
        out,
        ids=trace.ids,
        weights=trace.weights,
        predicted=trace.predicted,
        sequence=trace.sequence,
        part=trace.part,
    )
    return out.getvalue()


def _read_trace(path: Path, blob: bytes, summary: RoutingSummary) -> RoutingProfile:
    top_k = max((layer.top_k for layer in summary.layers), default=0)
    shape = (summary.tokens, len(summary.layers))
    expected: dict[str, tuple[type[Any], tuple[int, ...]]] = {
        "ids": (np.uint16, (*shape, top_k)),
        "weights": (np.float16, (*shape, top_k)),
        "predicted": (np.uint16, (*shape, 2 * top_k)),
        "sequence": (np.uint32, (summary.tokens,)),
        "part": (np.uint8, (summary.tokens,)),
    }
    try:
        with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in expected}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as failure:
        raise ProfileError(f"{path}: not a routing trace ({failure}); profile again") from None
    for name, (dtype, wanted) in expected.items():
        array = found[name]
        if array.dtype != dtype or array.shape != wanted:
            raise ProfileError(
                f"{path}: {name} is {array.dtype} {array.shape}, expected "
                f"{np.dtype(dtype)} {wanted}; profile again"
            )
    trace = Trace(**found)
    for index, layer in enumerate(summary.layers):
        if complaint := _complaint(trace, index, layer):
            raise ProfileError(f"{path}: layer {layer.layer} {complaint}; profile again")
    if trace.part.size and int(trace.part.max()) >= len(ROUTING_PARTS):
        raise ProfileError(
            f"{path}: a part numbered {int(trace.part.max())}, expected at most "
            f"{len(ROUTING_PARTS) - 1}; profile again"
        )
    return RoutingProfile(summary, trace)


def _complaint(trace: Trace, index: int, layer: LayerRouting) -> str | None:
    """What is wrong with one layer of a trace, if anything."""
    ids = np.sort(trace.ids[:, index, : layer.top_k], axis=1)
    guesses = trace.predicted[:, index]
    for named in (ids, guesses[guesses != NO_PREDICTION]):
        if named.size and int(named.max()) >= layer.num_experts:
            return f"names expert {int(named.max())} of {layer.num_experts}"
    if (ids[:, 1:] == ids[:, :-1]).any():
        return "names an expert twice for one token"
    return None


def make_profile(
    trace: Trace,
    *,
    model_name: str,
    model_digest: str,
    recorded_utc: str,
    how: str,
    sources: tuple[TextSource, ...],
    layers: Sequence[tuple[int, int, int]],
    with_hit_rates: bool = False,
) -> RoutingProfile:
    """Summarise a trace.

    Parameters
    ----------
    layers
        (decoder layer, experts, top-k) for every layer of the trace.
    with_hit_rates
        Tell what caches would hit, which takes some seconds for a long trace.
    """
    shapes = tuple(LayerShape(*layer) for layer in layers)
    summary = RoutingSummary(
        version=ROUTING_VERSION,
        model_name=model_name,
        model_digest=model_digest,
        recorded_utc=recorded_utc,
        how=how,
        tokens=len(trace.ids),
        sequences=len(np.unique(trace.sequence)),
        trace_sha256=hashlib.sha256(_to_bytes(trace)).hexdigest(),
        sources=sources,
        layers=tuple(
            _summarise_layer(trace, index, layer, experts, top_k)
            for index, (layer, experts, top_k) in enumerate(shapes)
        ),
        hit_rates=layer_hit_rates(layer_curves(trace, shapes)) if with_hit_rates else (),
    )
    return RoutingProfile(summary, trace)


def _summarise_layer(
    trace: Trace, index: int, layer: int, num_experts: int, top_k: int
) -> LayerRouting:
    ids = trace.ids[:, index, :top_k]
    counts = np.bincount(ids.ravel(), minlength=num_experts)
    shares = counts[counts > 0] / max(1, counts.sum())
    entropy = (
        float(-(shares * np.log(shares)).sum() / np.log(num_experts)) if num_experts > 1 else 1.0
    )
    same = trace.sequence[1:] == trace.sequence[:-1]
    again = (ids[1:, :, None] == ids[:-1, None, :]).any(axis=2)[same]
    predicted = trace.predicted[:, index]
    known = predicted[:, 0] != NO_PREDICTION

    def recall(depth: int) -> float:
        found = (ids[known][:, :, None] == predicted[known][:, None, :depth]).any(axis=2)
        return float(found.mean()) if found.size else 0.0

    return LayerRouting(
        layer=layer,
        num_experts=num_experts,
        top_k=top_k,
        usage_entropy=round(entropy, 4),
        reuse=round(float(again.mean()) if again.size else 0.0, 4),
        recall_at_k=round(recall(top_k), 4),
        recall_at_2k=round(recall(2 * top_k), 4),
    )
