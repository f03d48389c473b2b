"""Presets of models that were recorded, and where every number of them comes from."""

from __future__ import annotations

from pathlib import Path

from routing_targets import (
    ALL_LAYERS,
    DEPTHS,
    EACH,
    OWN_FIRST,
    SEGMENTS,
    Recipe,
    Stage,
    at,
    clean_texts,
    layer_entropies,
    start,
    thirds,
    trace_targets,
)

from moepack.routing_fit import Freedom, Spread, Target
from moepack.routing_model import FitSample


def olmoe(recordings: Path) -> Recipe:
    """Popularity from counts over a million tokens, the rest from the traces."""
    texts, experts = clean_texts(recordings / "trace_olmoe.npz")
    lengths = tuple(len(text) for text in texts)
    traced = FitSample(texts[0].shape[1], experts, texts[0].shape[2], lengths, 8)
    pooled = layer_entropies(recordings / "counts_olmoe_allenai_L0_7_15.json", "counts")
    counted = FitSample(3, experts, traced.top_k, (64,) * 64, 8)
    by_depth = [
        Target("usage entropy", (depth, depth + 0.01 if depth < 1 else 1.0), value)
        for depth, value in zip(DEPTHS, pooled, strict=True)
    ]
    locality: dict[Spread, Freedom] = {"text": "each", "context": "each"}
    targets = trace_targets(texts, experts)
    return Recipe(
        start(
            "olmoe-1b-7b",
            f"fitted to recorded greedy decoding of OLMoE-1B-7B-0924, {len(texts)} texts of "
            f"{sum(lengths)} tokens in all before any repeats itself, and to counts over 1.25 M "
            "tokens",
            sources={
                "popularity": "usage entropy of layers 0, 7 and 15 over six corpora (0.989, 0.973 "
                "and 0.968): allenai/OLMoE, commit 357454f4 (Apache-2.0)",
                "text": _TRACED,
                "context": _TRACED,
                "context_tokens": _TRACED,
                "first_recall": f"{OWN_FIRST} (0.39), and 0.47 of a probe on early layers "
                "(github.com/JustVugg/colibri, issue 866)",
                "recall": "0.82: linear probes two layers ahead on OLMoE, as measured in "
                "github.com/JustVugg/colibri, issue 866; a router one layer early is assumed to "
                "do as well",
            },
            first_recall=(0.39, 0.47),
            recall=0.82,
        ),
        (
            Stage(traced, targets, EACH, free_tokens=True),
            Stage(counted, by_depth, {"popularity": "each"}),
            Stage(traced, targets, locality, free_tokens=True),
        ),
    )


def qwen(recordings: Path) -> Recipe:
    """Everything from the traces."""
    texts, experts = clean_texts(recordings / "trace_qwen.npz")
    lengths = tuple(len(text) for text in texts)
    return Recipe(
        start(
            "qwen1.5-moe-a2.7b",
            f"fitted to recorded greedy decoding of Qwen1.5-MoE-A2.7B, {len(texts)} texts of "
            f"{sum(lengths)} tokens in all before any repeats itself",
            sources={
                **dict.fromkeys(("popularity", "text", "context", "context_tokens"), _TRACED),
                "first_recall": f"{OWN_FIRST} (0.39, 0.59)",
                "recall": "assumption: 0.8; arXiv 2509.08342 says above 80 % in the middle of "
                "models, this one among them; arXiv 2502.12224 has 78.8 % (cited after "
                "github.com/Helldez/BigMoeOnEdge, docs/expert-prediction.md)",
            },
            first_recall=(0.39, 0.59),
            recall=0.8,
        ),
        (
            Stage(
                FitSample(texts[0].shape[1], experts, texts[0].shape[2], lengths, 8),
                trace_targets(texts, experts),
                EACH,
                free_tokens=True,
            ),
        ),
    )


def switch(recordings: Path) -> Recipe:
    """One short text of an encoder, so that text and popularity cannot be told apart."""
    texts, experts = clean_texts(recordings / "trace_switch_base_8.npz")
    figures = (
        *("reuse by the next token", "reuse after 2 to 4 tokens", "segment F1", "usage entropy"),
        *("lru 25 %", "lru 50 %", "lfu 25 %", "lfu 50 %"),
    )
    source = "recorded by Labeeb2339/stratamoe-lab, commit 08bfd806 (Apache-2.0)"
    return Recipe(
        start(
            "switch-base-8",
            f"fitted to {len(texts[0])} recorded tokens of the encoder of switch-base-8",
            sources={
                "popularity": "assumption: half of what the one text prefers",
                "text": source,
                "context": source,
                "context_tokens": source,
                "first_recall": f"{OWN_FIRST} (0.39)",
                "recall": "assumption: 0.7; nothing is published",
            },
            depths=(0.0,),
            spreads=(0.2, 0.2, 0.5),
            first_recall=(0.39,),
            recall=0.7,
        ),
        (
            Stage(
                FitSample(texts[0].shape[1], experts, 1, (len(texts[0]),), 64),
                trace_targets(texts, experts, figures, (ALL_LAYERS,)),
                {"text": "each", "context": "each"},
                free_tokens=True,
                trial_draws=16,
            ),
        ),
    )


def mixtral(recordings: Path) -> Recipe:
    """Popularity from counts, locality from published repetitions."""
    path = recordings / "counts_mixtral8x7b_original_mmlu7.json"
    sample = FitSample(32, 8, 2, (1024,) * 7, 8)
    points = ((0.0, 0.02), (0.48, 0.49), (1.0, 1.0))
    # Averages over the eight corpora of the table.
    some, first = (0.48, 0.63825, 0.509125), (0.140875, 0.264, 0.226625)
    return Recipe(
        start(
            "mixtral-8x7b",
            "fitted to counts over 106 k tokens of seven MMLU subjects and to published shares of "
            "repeated experts",
            sources={
                "popularity": f"usage entropy of all subjects together: {_FIDDLER}",
                "text": f"usage entropy within a subject: {_FIDDLER}; assumption: one text prefers "
                "experts as much as one subject does",
                "context": "repetitions by the next token in layers 0, 15 and 31: arXiv "
                "2401.04088, table 5, averages over its eight corpora",
                "context_tokens": f"the same, and {SEGMENTS}",
                "first_recall": f"{OWN_FIRST} (0.39, 0.59)",
                "recall": "assumption: 0.85; arXiv 2509.08342 says above 80 % in the middle of "
                "models, this one among them",
            },
            spreads=(0.1, 0.2, 0.7),
            first_recall=(0.39, 0.59),
            recall=0.85,
        ),
        (
            Stage(
                sample,
                [
                    *thirds("usage entropy", layer_entropies(path, "counts"), 4.0),
                    *thirds("text entropy", layer_entropies(path, "domains"), 1.0),
                    *at(points, "some expert repeated", some, 2.0),
                    *at(points, "first choice repeated", first, 0.25),
                    Target("segment F1", ALL_LAYERS, 0.4936, 2.0),
                ],
                EACH,
                free_tokens=True,
                trial_draws=1,
            ),
        ),
    )


def glm(recordings: Path) -> Recipe:
    """Popularity and preference of texts from counts; locality from a kindred model."""
    path = recordings / "counts_glm5.2_10domains.json"
    # 25.7 % of 4 out of 64 is so much above chance; so much above that of 8 out of 256.
    excess = (0.257 - 4 / 64) / (1 - 4 / 64)
    reuse = excess + (1 - excess) * 8 / 256
    return Recipe(
        start(
            "glm-5.2",
            "fitted to counts over 1.93 M tokens of ten domains; token-to-token reuse is assumed "
            "to be that of a smaller model of the family. Drawn for 5 depths of its 75 layers",
            sources={
                "popularity": f"usage entropy of all domains together: {_GLM_COUNTS}",
                "text": f"usage entropy within a domain: {_GLM_COUNTS}; assumption: one text "
                "prefers experts as much as one domain does, which is the least",
                "context": "assumption: reuse by the next token is as far above chance as in "
                "GLM-4.7-Flash (25.7 % of 4 of 64 experts, github.com/ml-explore/mlx-lm, pull "
                "request 1485)",
                "context_tokens": "assumption: as fitted to OLMoE and Qwen1.5-MoE",
                "first_recall": f"{OWN_FIRST} (0.39, 0.59)",
                "recall": "0.736: the next router on the state after attention, measured on "
                "GLM-5.2 in github.com/JustVugg/colibri, pull request 204",
            },
            spreads=(0.3, 0.6, 0.6),
            first_recall=(0.39, 0.59),
            recall=0.736,
        ),
        (
            Stage(
                FitSample(5, 256, 8, (1024,) * 10, 4),
                [
                    *thirds("usage entropy", layer_entropies(path, "counts")),
                    *thirds("text entropy", layer_entropies(path, "domains")),
                    Target("reuse by the next token", ALL_LAYERS, reuse, 2.0),
                ],
                {"popularity": "each", "text": "each", "context": "together"},
                trial_draws=1,
            ),
        ),
    )


_TRACED = "recorded by pjordanandrsn/grouped-nf4-gemm, commit 36b8cca4 (MIT)"
_FIDDLER = "efeslab/fiddler, branch popularity, commit 5e5ed673 (Apache-2.0)"
_GLM_COUNTS = "Dorijan10/glm-expert-pruning, commit 6cb44696 (MIT)"
