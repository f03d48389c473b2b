"""How a synthetic checkpoint routes, beside how the model that it stands for was recorded.

The checkpoint runs three kinds of texts: random tokens and tokens that it draws itself at
temperature 1, in texts as long as the recorded ones; and the beginnings of the texts that ship with
moepack, which it is profiled on. Every cache is empty before each text, as it is for the recorded
ones. Figures are averages over the depth of the model, so that models cut to fewer layers compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from moepack_runtime.engine import Engine
from moepack_runtime.loading import open_checkpoint
from moepack_runtime.sampling import Sampler, SamplingParams
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.synthetic_folder import RECIPE_FILE
from moepack import machine
from moepack.belady import belady_ranks
from moepack.budget import memory_breakdown, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.cli.progress import TerminalProgress
from moepack.errors import ProfileError
from moepack.layout import Layout
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Placement
from moepack.presets import resolve
from moepack.profiling import SEQUENCE_TOKENS, record_routing
from moepack.progress import Progress
from moepack.routing_figures import FIGURES, RoutedTexts
from moepack.routing_fit import band_average
from moepack.routing_model import FitSample, RoutingModel, load_routing_model
from moepack.shipped import shipped_texts
from moepack.trace import NO_PREDICTION, LayerShape, Trace

Ids = npt.NDArray[np.uint16]
Figure = npt.NDArray[np.float64]
Tokens = Sequence[Sequence[int]]

#: Parts of the depth that are averaged by themselves first, and their share of the whole.
BANDS = {(0.0, 0.25): 0.25, (0.25, 0.75): 0.5, (0.75, 1.0): 0.25}

_SHARES = (0.25, 0.5)
_PROMPT_TOKENS = 16
_SHIPPED_TEXTS = 4
_RAM_SHARE = 0.8


class Run(NamedTuple):
    """What one kind of texts gave: their ids [tokens, L, K], and recall by layer (k, 2 k)."""

    texts: list[Ids]
    recall: tuple[Figure, Figure] | None


def check(
    folder: Path, recording: Path | None, *, draws: int, generate: bool = True
) -> dict[str, dict[str, float]]:
    """Run a checkpoint and print the table; the last line is one JSON object.

    Returns
    -------
    dict
        Figures by name, of each column.

    Raises
    ------
    ProfileError
        When the folder does not say which routing it was made for, or the recording cannot be read.
    """
    checkpoint = Checkpoint.open(str(folder))
    model = load_routing_model(resolve(_recipe(folder)["routing"], "routing"))
    spec = checkpoint.spec
    moe = spec.moe(spec.moe_layers[0])
    recorded = None if recording is None else load_recording(recording)
    lengths = _lengths(model, recorded)
    runs = run_checkpoint(checkpoint, lengths, draws, generate, TerminalProgress(sys.stderr))
    columns: dict[str, dict[str, float]] = {}
    if recorded is not None:
        columns["recorded"] = figures(Run(recorded, None), moe.num_experts)
    columns |= {"preset": preset_figures(model)}
    columns |= {name: figures(run, moe.num_experts) for name, run in runs.items()}
    print(f"{folder.name}: {len(spec.layers)} layers of {moe.num_experts} experts, {moe.top_k} for")
    print(f"a token; texts of {', '.join(map(str, lengths))} tokens; routing {model.name}\n")
    names = list(figures(next(iter(runs.values())), moe.num_experts))
    _print_table(columns, names)
    document = {"model": checkpoint.name, "layers": len(spec.layers), "routing": model.name}
    print(json.dumps({**document, "text_tokens": lengths, "figures": columns}))
    return columns


def figures(run: Run, experts: int) -> dict[str, float]:
    """Averages over the depth."""
    routed = RoutedTexts(run.texts, experts)
    found: dict[str, Figure] = {}
    for share in _SHARES:
        for policy in ("lru", "lfu", "lcp"):
            name = f"{policy} {share:.0%}".replace("%", " %")
            found[name] = FIGURES[name](routed)
        found[f"belady {share:.0%}".replace("%", " %")] = cold_belady(run.texts, experts, share)
    for name in ("reuse by the next token", "reuse after 8 to 16 tokens", "usage entropy"):
        found[name] = FIGURES[name](routed)
    found["text entropy"] = routed.text_entropy()
    found["busiest quarter of a text"] = busiest(run.texts, experts, 0.25)
    if len(run.texts) > 1:
        found["reuse in another text"] = routed.other_texts()
    if run.recall is not None:
        found["recall at k"], found["recall at 2 k"] = run.recall
        # The first layer's prediction is another: of the token before, from the last layer.
        found["recall at k, from the second on"] = run.recall[0][1:]
    return {name: round(over_depth(values), 4) for name, values in found.items()}


def over_depth(values: Figure) -> float:
    """The average over the depth of one number for each layer."""
    if len(values) < 4:
        return float(values.mean())
    return sum(share * band_average(values, band) for band, share in BANDS.items())


def cold_belady(texts: Sequence[Ids], experts: int, share: float) -> Figure:
    """Hit rate of the clairvoyant cache that is empty before each text, by layer."""
    hits = []
    for ids in texts:
        tokens, count, top_k = ids.shape
        layers = [LayerShape(layer, experts, top_k) for layer in range(count)]
        none = np.full((tokens, count, 1), NO_PREDICTION, dtype=np.uint16)
        zeros = np.zeros(tokens, dtype=np.uint8)
        trace = Trace(ids, np.zeros(ids.shape, np.float16), none, zeros.astype("u4"), zeros)
        ranks = belady_ranks(trace, layers, [range(experts)] * count)
        hits.append((ranks < round(share * experts)) & ~first_uses(ids, experts))
    return np.asarray(np.concatenate(hits).mean(axis=(0, 2)))


def first_uses(ids: Ids, experts: int) -> npt.NDArray[np.bool_]:
    """Where a layer uses an expert for the first time, bool [tokens, L, K]."""
    tokens, count, _ = ids.shape
    first = np.full((count, experts), tokens)
    layer = np.broadcast_to(np.arange(count)[:, None], ids.shape)
    token = np.broadcast_to(np.arange(tokens)[:, None, None], ids.shape)
    np.minimum.at(first, (layer, ids), token)
    return np.asarray(first[layer, ids] == token)


def busiest(texts: Sequence[Ids], experts: int, share: float) -> Figure:
    """Share of a text's activations that its most used experts take, by layer."""
    found = []
    for ids in texts:
        tokens, count, top_k = ids.shape
        used = [np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(count)]
        best = np.sort(np.array(used), axis=1)[:, ::-1][:, : round(share * experts)]
        found.append(best.sum(axis=1) / (tokens * top_k))
    return np.average(found, axis=0, weights=[len(ids) for ids in texts])


def preset_figures(model: RoutingModel) -> dict[str, float]:
    """What the preset was fitted to, as far as it covers the depth."""
    found: dict[str, dict[tuple[float, float], float]] = {}
    for line in model.fit:
        found.setdefault(line.name, {})[line.depths] = line.recorded
    return {
        name: round(sum(share * values[band] for band, share in BANDS.items()), 4)
        for name, values in found.items()
        if values.keys() >= BANDS.keys()
    } | {"recall at k, from the second on": model.recall}


def load_recording(path: Path) -> list[Ids]:
    """The texts of a recorded trace, each before it repeats itself.

    An npz with, for each name in ``prompts``, ids [tokens, L, K], and ``clean_prefix``.

    Raises
    ------
    ProfileError
        When it is none.
    """
    try:
        with np.load(path) as arrays:
            pairs = zip(arrays["prompts"].tolist(), arrays["clean_prefix"].tolist(), strict=True)
            return [arrays[name][:tokens].astype(np.uint16) for name, tokens in pairs if tokens]
    except (OSError, ValueError, KeyError) as failure:
        raise ProfileError(
            f"recording {path}: {failure}; expected an npz of routed texts"
        ) from None


def run_checkpoint(
    checkpoint: Checkpoint,
    lengths: Sequence[int],
    draws: int,
    generate: bool,
    progress: Progress,
) -> dict[str, Run]:
    """Run the three kinds of texts; none are generated where the experts exceed memory."""
    assert checkpoint.folder is not None
    spec = checkpoint.spec
    generator = np.random.Generator(np.random.PCG64(0))

    def random_tokens(count: int) -> list[int]:
        drawn: list[int] = generator.integers(1, spec.vocab_size, count).tolist()
        return drawn

    kinds: dict[str, tuple[Tokens, int]] = {
        "random tokens": ([random_tokens(n) for _ in range(draws) for n in lengths], 0)
    }
    tokenizer = Tokenizer.load(checkpoint.folder)
    texts = [path.read_text("utf-8")[: 8 * SEQUENCE_TOKENS] for path in shipped_texts()]
    kinds["shipped texts"] = (
        [tokenizer.encode(text)[:SEQUENCE_TOKENS] for text in texts[::2][:_SHIPPED_TEXTS]],
        0,
    )
    context = max(SEQUENCE_TOKENS, *lengths) + _PROMPT_TOKENS
    experts_bytes = sum(stored_bytes(spec, cut, "top") for cut in uniform_layout(spec, 1.0).layers)
    whole_bytes = experts_bytes * spec.moe(spec.moe_layers[0]).num_experts
    resident = generate and whole_bytes < _RAM_SHARE * machine.ram_bytes()
    if generate and not resident:
        print("the experts exceed this machine's memory: nothing is generated", file=sys.stderr)
    with _open(checkpoint, context, resident) as engine:
        if resident:
            prompts = [random_tokens(_PROMPT_TOKENS) for _ in lengths]
            drawn = _drawn(engine, prompts, lengths, progress)
            kinds["drawn tokens"] = (drawn, _PROMPT_TOKENS)
        return {
            name: _record(engine, sequences, skipped, progress)
            for name, (sequences, skipped) in kinds.items()
        }


def _drawn(
    engine: Engine, prompts: Tokens, lengths: Sequence[int], progress: Progress
) -> list[list[int]]:
    """Prompts, and behind each what the model draws at temperature 1."""
    found = []
    progress.start("draw tokens", sum(lengths), "items")
    try:
        for prompt, count in zip(prompts, lengths, strict=True):
            tokens = [*prompt]
            sampler = Sampler(SamplingParams(temperature=1.0))
            for token in engine.generate(prompt, max_new_tokens=count, sampler=sampler):
                tokens.append(token)
                progress.advance(1)
            found.append(tokens)
    finally:
        progress.done()
    return found


def _record(engine: Engine, sequences: Tokens, skipped: int, progress: Progress) -> Run:
    """Routing of some sequences, without that of the first tokens of each."""
    texts = [(str(number), b"", ids) for number, ids in enumerate(sequences)]
    room = len(sequences) * max(map(len, sequences))
    profile = record_routing(engine, texts, how="", tokens=room, progress=progress)
    trace, layers = profile.trace, profile.layers
    place = np.concatenate([np.arange(len(ids)) for ids in sequences])
    number = np.repeat(np.arange(len(sequences)), [len(ids) for ids in sequences])
    kept = place >= max(1, skipped)
    recalls = tuple(
        np.array([_recall(trace, row, depth, kept) for row in range(len(layers))])
        for depth in (layers[0].top_k, 2 * layers[0].top_k)
    )
    ids = [trace.ids[(number == text) & (place >= skipped)] for text in range(len(sequences))]
    return Run(ids, (recalls[0], recalls[1]))


def _recall(trace: Trace, row: int, depth: int, kept: npt.NDArray[np.bool_]) -> float:
    used, guessed = trace.ids[kept, row], trace.predicted[kept, row, :depth]
    return float((used[:, :, None] == guessed[:, None, :]).any(axis=2).mean())


def _open(checkpoint: Checkpoint, context: int, resident: bool) -> Engine:
    """An engine with all experts in memory, or none."""
    spec = checkpoint.spec
    layout = uniform_layout(spec, 1.0)
    return open_checkpoint(checkpoint, spec, layout, _placement(spec, layout, context, resident))


def _placement(spec: ModelSpec, layout: Layout, context: int, resident: bool) -> Placement:
    layers = tuple(
        LayerPlacement(
            layer=cut.layer,
            budget_bytes=slots * stored_bytes(spec, cut, "top"),
            top_slots=slots,
            bottom_slots=0,
            policy="lru",
            hot=tuple(range(spec.moe(cut.layer).num_experts)),
        )
        for cut in layout.layers
        for slots in [spec.moe(cut.layer).num_experts if resident else 0]
    )
    staging, threads = 2 * max(spec.moe(n).top_k for n in spec.moe_layers), torch.get_num_threads()
    memory = memory_breakdown(
        spec, layout, layers, staging_experts=staging, context_tokens=context, threads=threads
    )
    return Placement(
        device="cpu",
        fast_budget_bytes=memory.total_bytes,
        staging_experts=staging,
        context_tokens=context,
        prompt_tokens=context - 1,
        new_tokens=1,
        memory=memory,
        layers=layers,
        threads=threads,
    )


def _lengths(model: RoutingModel, recorded: Sequence[Ids] | None) -> list[int]:
    if recorded is not None:
        return [len(ids) for ids in recorded]
    sample: FitSample | None = model.sample
    return [min(n, SEQUENCE_TOKENS) for n in sample.text_tokens[:8]] if sample else [256] * 4


def _recipe(folder: Path) -> Mapping[str, str]:
    try:
        recipe: Mapping[str, str] = json.loads((folder / RECIPE_FILE).read_text("utf-8"))
    except (OSError, ValueError) as failure:
        raise ProfileError(
            f"{folder}: {failure}; expected the {RECIPE_FILE} of a synthetic checkpoint"
        ) from None
    return recipe


def _print_table(columns: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    show: Callable[[float | None], str] = lambda x: "" if x is None else f"{x:.3f}"  # noqa: E731
    print(f"| | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for name in names:
        cells = (show(column.get(name)) for column in columns.values())
        print(f"| {name} | {' | '.join(cells)} |")
