"""How a model routes: popularity, the recorded trace, and what a cache makes of it.

A profile is two files: ``routing.yaml``, a summary that a person can read, and ``routing.npz``,
the trace. Each text is split in its order into three parts: *fit* (what rankings are learnt from),
*select* (what decides between candidates) and *test* (what is reported).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.records import record
from moepack.residency import ExpertCache

ROUTING_VERSION = 1

#: Stands in the predicted ranking where no prediction exists (the first token of a sequence).
NO_PREDICTION = np.iinfo(np.uint16).max

RoutingPart = Literal["fit", "select", "test"]
ROUTING_PARTS: tuple[RoutingPart, ...] = ("fit", "select", "test")

#: Share of each text that goes to *fit* and to *select*; the rest is *test*.
PART_SHARES = (0.6, 0.2)

Ids = npt.NDArray[np.uint16]


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
    """What was recorded, from what, and when."""

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


@dataclass(frozen=True, eq=False)
class Trace:
    """The recorded routing. ``L`` counts the layers that have experts, in the decoder's order.

    Attributes
    ----------
    ids : uint16 [tokens, L, K]
        Experts of each token, in descending weight.
    weights : float16 [tokens, L, K]
        Their routing weights.
    predicted : uint16 [tokens, L, 2K]
        The ranking that the layer's router gave one layer earlier (for the first layer: on the
        previous token's last layer); :data:`NO_PREDICTION` where there is none.
    sequence : uint32 [tokens]
        Number of the sequence that a token belongs to.
    part : uint8 [tokens]
        Index into :data:`ROUTING_PARTS`.
    """

    ids: Ids
    weights: npt.NDArray[np.float16]
    predicted: Ids
    sequence: npt.NDArray[np.uint32]
    part: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """Summary and trace together.

    Attributes
    ----------
    hits : float32 [parts, L, experts + 1]
        Hit rate of an LRU cache of 0, 1 ... N experts, scored on each part; see
        :func:`lru_hit_curves`.
    """

    summary: RoutingSummary
    trace: Trace
    hits: npt.NDArray[np.float32]

    def layer_index(self, layer: int) -> int:
        """Where a decoder layer stands on the trace's layer axis."""
        return [entry.layer for entry in self.summary.layers].index(layer)

    def counts(self, layer: int, part: RoutingPart = "fit") -> npt.NDArray[np.int64]:
        """Activations of every expert of a layer in one part of the trace, int64 [experts]."""
        index = self.layer_index(layer)
        entry = self.summary.layers[index]
        return _counts(self.trace, index, entry.num_experts, entry.top_k, part)

    def hot_ranking(self, layer: int) -> tuple[int, ...]:
        """Every expert of a layer, most used in *fit* first; ties to the lower id."""
        return _by_count(self.counts(layer))

    def hit_curve(self, layer: int, part: RoutingPart = "test") -> npt.NDArray[np.float32]:
        """Hit rate of an LRU cache of 0, 1 ... N experts on one part, float32 [N + 1]."""
        index = self.layer_index(layer)
        experts = self.summary.layers[index].num_experts
        return self.hits[ROUTING_PARTS.index(part), index, : experts + 1]

    def save(self, folder: Path) -> None:
        """Write ``routing.npz`` and then ``routing.yaml``, each atomically."""
        write_atomically(folder / "routing.npz", _to_bytes(self.trace, self.hits))
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
    summary_path = path / "routing.yaml" if path.is_dir() else path
    trace_path = summary_path.with_suffix(".npz")
    what, remedy = "routing profile", "make one with moepack profile"
    summary = records.load_yaml(
        RoutingSummary, summary_path, what=what, error=ProfileError, remedy=remedy
    )
    if summary.version != ROUTING_VERSION:
        raise ProfileError(
            f"{what} {summary_path}: version {summary.version}, this moepack reads "
            f"{ROUTING_VERSION}; profile again"
        )
    try:
        blob = trace_path.read_bytes()
    except OSError as failure:
        raise ProfileError(f"{what} {trace_path}: {failure.strerror}; {remedy}") from None
    found = hashlib.sha256(blob).hexdigest()
    if found != summary.trace_sha256:
        raise ProfileError(
            f"{trace_path}: SHA-256 {found[:12]}, {summary_path.name} says "
            f"{summary.trace_sha256[:12]}; the two do not belong together: profile again"
        )
    return _read_trace(trace_path, blob, summary)


def _to_bytes(trace: Trace, hits: npt.NDArray[np.float32]) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(
        out,
        ids=trace.ids,
        weights=trace.weights,
        predicted=trace.predicted,
        sequence=trace.sequence,
        part=trace.part,
        hits=hits,
    )
    return out.getvalue()


def _read_trace(path: Path, blob: bytes, summary: RoutingSummary) -> RoutingProfile:
    top_k = max((layer.top_k for layer in summary.layers), default=0)
    experts = max((layer.num_experts for layer in summary.layers), default=0)
    shape = (summary.tokens, len(summary.layers))
    expected: dict[str, tuple[type[Any], tuple[int, ...]]] = {
        "ids": (np.uint16, (*shape, top_k)),
        "weights": (np.float16, (*shape, top_k)),
        "predicted": (np.uint16, (*shape, 2 * top_k)),
        "sequence": (np.uint32, (summary.tokens,)),
        "part": (np.uint8, (summary.tokens,)),
        "hits": (np.float32, (len(ROUTING_PARTS), len(summary.layers), experts + 1)),
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
    for index, layer in enumerate(summary.layers):
        ids = found["ids"][:, index, : layer.top_k]
        if ids.size and int(ids.max()) >= layer.num_experts:
            raise ProfileError(
                f"{path}: layer {layer.layer} names expert {int(ids.max())} of "
                f"{layer.num_experts}; profile again"
            )
    hits = found.pop("hits")
    if not ((hits >= 0) & (hits <= 1)).all():
        raise ProfileError(f"{path}: a hit rate is not between 0 and 1; profile again")
    return RoutingProfile(summary, Trace(**found), hits)


def make_profile(
    trace: Trace,
    *,
    model_name: str,
    model_digest: str,
    recorded_utc: str,
    how: str,
    sources: tuple[TextSource, ...],
    layers: tuple[tuple[int, int, int], ...],
) -> RoutingProfile:
    """Summarise a trace.

    Parameters
    ----------
    layers
        (decoder layer, experts, top-k) for every layer of the trace.
    """
    hits = lru_hit_curves(trace, layers)
    summary = RoutingSummary(
        version=ROUTING_VERSION,
        model_name=model_name,
        model_digest=model_digest,
        recorded_utc=recorded_utc,
        how=how,
        tokens=len(trace.ids),
        sequences=len(np.unique(trace.sequence)),
        trace_sha256=hashlib.sha256(_to_bytes(trace, hits)).hexdigest(),
        sources=sources,
        layers=tuple(
            _summarise_layer(trace, index, layer, experts, top_k)
            for index, (layer, experts, top_k) in enumerate(layers)
        ),
    )
    return RoutingProfile(summary, trace, hits)


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


def part_of_tokens(count: int) -> npt.NDArray[np.uint8]:
    """Which part each of ``count`` consecutive tokens of one text belongs to, uint8 [count]."""
    fit = round(count * PART_SHARES[0])
    select = round(count * PART_SHARES[1])
    return np.repeat(
        np.arange(3, dtype=np.uint8), [fit, min(select, count - fit), max(0, count - fit - select)]
    )


def _counts(
    trace: Trace, index: int, num_experts: int, top_k: int, part: RoutingPart
) -> npt.NDArray[np.int64]:
    ids = trace.ids[trace.part == ROUTING_PARTS.index(part), index, :top_k]
    return np.bincount(ids.ravel(), minlength=num_experts)


def _by_count(counts: npt.NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(np.argsort(-counts, kind="stable").tolist())


def lru_hit_curves(
    trace: Trace, layers: tuple[tuple[int, int, int], ...]
) -> npt.NDArray[np.float32]:
    """Hit rate of every LRU cache size, for every part and layer.

    A cache starts from the hot ranking of *fit* and sees every token in order. From K slots on,
    LRU with whole-token admission is a stack algorithm (Mattson et al. 1970): a cache of n holds
    the n best keys, so one pass over the ranks serves all sizes. Below K slots the runtime's own
    cache is replayed over each part.

    Parameters
    ----------
    layers
        (decoder layer, experts, top-k) for every layer of the trace.

    Returns
    -------
    float32 [parts, L, experts + 1]
        Past a layer's own number of experts, 1.
    """
    widest = max((experts for _, experts, _ in layers), default=0)
    curves = np.ones((len(ROUTING_PARTS), len(layers), widest + 1), dtype=np.float32)
    for index, (_, experts, top_k) in enumerate(layers):
        hot = _by_count(_counts(trace, index, experts, top_k, "fit"))
        ids = trace.ids[:, index, :top_k]
        at_rank = _hits_by_rank(ids, trace.part, hot)
        for part in range(len(ROUTING_PARTS)):
            total = int((trace.part == part).sum()) * top_k
            if total:
                curves[part, index, 1 : experts + 1] = np.cumsum(at_rank[part]) / total
            curves[part, index, 0] = 0.0
            for capacity in range(1, min(top_k, experts)):
                tokens = ids[trace.part == part].tolist()
                curves[part, index, capacity] = _replayed_hit_rate(tokens, hot, capacity)
    return curves


def _hits_by_rank(
    ids: Ids, part: npt.NDArray[np.uint8], hot: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """How often an activated expert stood at each rank of the LRU order, int64 [parts, N].

    The order is the cache's own: last use, then the lower id.
    """
    order = list(hot)  # most recently used first
    counts = [[0] * len(hot) for _ in ROUTING_PARTS]
    for row, of_part in zip(ids.tolist(), part.tolist(), strict=True):
        tally = counts[of_part]
        ranks = sorted(map(order.index, row))
        for rank in ranks:
            tally[rank] += 1
        for rank in reversed(ranks):
            del order[rank]
        order[:0] = sorted(row)
    return np.array(counts)


def _replayed_hit_rate(tokens: list[list[int]], hot: tuple[int, ...], capacity: int) -> float:
    if not tokens:
        return 0.0
    cache = ExpertCache(capacity, hot)
    hits = sum(len(cache.step([row]).resident) for row in tokens)
    return hits / (len(tokens) * len(tokens[0]))
