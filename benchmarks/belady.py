"""How far each policy of a cache gets towards one that knows the future (Belady, 1966).

    python -m benchmarks.belady --recording trace_olmoe.npz trace_qwen.npz

For the routing of the shipped model (or that of ``--model``) on the shipped texts, and for each
recording: the hit rates of caches of an eighth, a quarter and half of each layer's experts, mean
over the layers. Caches are as the engine's: they start from the ranking of *fit*, go on from text
to text, and are scored on *test*, which nothing was learnt from. The half-lives of ``lfu_decay``
are each layer's own, fitted as the planner does. *Closed* is the share of what lies between LRU
and Belady. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from moepack_runtime.loading import open_checkpoint
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.options import at_least
from benchmarks.setting import named
from benchmarks.synthetic_check import load_recording
from moepack.belady import belady_ranks
from moepack.cache_curves import Curves, hit_curves, rank_curves
from moepack.checkpoint import Checkpoint
from moepack.half_lives import fitted_half_lives
from moepack.layouts import uniform_layout
from moepack.plan import Policy
from moepack.profiling import SEQUENCE_TOKENS, record_routing
from moepack.shipped import shipped_model, shipped_texts
from moepack.stack_ranks import stack_ranks
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import read_texts
from moepack.trace import (
    NO_PREDICTION,
    ROUTING_PARTS,
    LayerShape,
    Trace,
    hot_rankings,
    part_of_tokens,
)

SHARES = (0.125, 0.25, 0.5)
ONLINE: tuple[Policy, ...] = ("lru", "lfu", "lcp", "lfu_decay")
BELADY = "belady"

#: Shorter texts of a recording are left out: they say little of caches.
SHORTEST_TEXT = 64


class Routing(NamedTuple):
    """How a model was seen to route."""

    name: str
    trace: Trace
    layers: tuple[LayerShape, ...]


class Row(NamedTuple):
    """Hit rates at one size, and what of the gap between LRU and Belady each policy closes."""

    share: float
    hit_rates: dict[str, float]
    closed: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for every routing, then one JSON object."""
    return named(_run, _parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    found = {}
    for routing in _routings(options):
        half_lives = fitted_half_lives(routing.trace, routing.layers)
        rows = compare(routing, half_lives)
        _print_table(routing, half_lives, rows)
        found[routing.name] = {
            "tokens": len(routing.trace.ids),
            "half_lives": half_lives,
            "rows": [row._asdict() for row in rows],
        }
    print(json.dumps(found))
    return 0


def compare(routing: Routing, half_lives: Sequence[float]) -> list[Row]:
    """Every policy at every size, scored on *test*."""
    trace, layers = routing.trace, routing.layers
    hot = hot_rankings(trace, layers)
    curves: dict[str, Curves] = {}
    for policy in ONLINE:
        each = half_lives if policy == "lfu_decay" else ()
        ranks = stack_ranks(trace, layers, hot, policy, each)
        curves[policy] = hit_curves(ranks, trace, layers, "test")
    test = trace.part == ROUTING_PARTS.index("test")
    curves[BELADY] = rank_curves(belady_ranks(trace, layers, hot)[test], layers)
    return [_row(curves, layers, share) for share in SHARES]


def _row(curves: dict[str, Curves], layers: Sequence[LayerShape], share: float) -> Row:
    slots = [round(share * layer.num_experts) for layer in layers]
    hits = {
        name: float(curve[np.arange(len(layers)), slots].mean()) for name, curve in curves.items()
    }
    gap = hits[BELADY] - hits["lru"]
    return Row(share, hits, {name: (hits[name] - hits["lru"]) / gap for name in ONLINE[1:]})


def _routings(options: argparse.Namespace) -> Iterator[Routing]:
    if not options.recordings_only:
        name = options.model.name if options.model else "shipped"
        yield run_texts(name, str(options.model or shipped_model()), options.tokens)
    for path in options.recording:
        yield recorded(path)


def run_texts(name: str, model: str, tokens: int) -> Routing:
    """Run the shipped texts through a model, and see how it routes."""
    checkpoint = Checkpoint.open(model)
    assert checkpoint.folder is not None
    spec, layout = checkpoint.spec, uniform_layout(checkpoint.spec, 1.0)
    tokenizer = Tokenizer.load(checkpoint.folder)
    texts = [
        (text, raw, tokenizer.encode(words)) for text, raw, words in read_texts(shipped_texts())
    ]
    placement = streaming_placement(
        spec,
        layout,
        "cpu",
        threads=1,
        context_tokens=min(SEQUENCE_TOKENS, spec.context_length),
        staging_experts=2 * most_experts_of_a_token(spec),
    )
    with open_checkpoint(checkpoint, spec, layout, placement) as engine:
        profile = record_routing(engine, texts, how="for a benchmark", tokens=tokens)
    layers = [(number, spec.moe(number)) for number in spec.moe_layers]
    return Routing(
        name,
        profile.trace,
        tuple(LayerShape(number, moe.num_experts, moe.top_k) for number, moe in layers),
    )


def recorded(path: Path) -> Routing:
    """A recording's texts, one after the other."""
    texts = [text for text in load_recording(path) if len(text) >= SHORTEST_TEXT]
    with np.load(path) as arrays:
        experts = int(arrays["num_experts"])
    trace = trace_of(texts)
    _, layers, top_k = trace.ids.shape
    return Routing(path.stem, trace, tuple(LayerShape(n, experts, top_k) for n in range(layers)))


def trace_of(texts: Sequence[npt.NDArray[np.uint16]]) -> Trace:
    """Texts [tokens, L, K] as one trace without predictions, each in its own parts."""
    ids = np.concatenate(texts)
    lengths = [len(text) for text in texts]
    return Trace(
        ids,
        np.zeros(ids.shape, dtype=np.float16),
        np.full((*ids.shape[:2], 1), NO_PREDICTION, dtype=np.uint16),
        np.repeat(np.arange(len(texts), dtype=np.uint32), lengths),
        np.concatenate([part_of_tokens(length) for length in lengths]),
    )


def _print_table(routing: Routing, half_lives: Sequence[float], rows: Sequence[Row]) -> None:
    layer = routing.layers[0]
    counted = sorted(Counter(half_lives).items())
    told = ", ".join(f"{count} of {half_life:g}" for half_life, count in counted)
    print(
        f"\n{routing.name}: {len(routing.trace.ids)} tokens, {len(routing.layers)} layers, "
        f"{layer.top_k} of {layer.num_experts} experts; half-lives: {told} tokens\n"
    )
    print("| cached | LRU | LFU | LCP | LFU with decay | Belady | closed by LFU | LCP | decay |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        rates = " | ".join(f"{row.hit_rates[name]:.3f}" for name in (*ONLINE, BELADY))
        closed = " | ".join(f"{100 * row.closed[name]:z.0f}%" for name in ONLINE[1:])
        print(f"| 1/{1 / row.share:.0f} | {rates} | {closed} |")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recording", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the shipped model")
    parser.add_argument("--tokens", type=at_least(1), default=8192, help="of the shipped texts")
    parser.add_argument("--recordings-only", action="store_true", help="run no model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
