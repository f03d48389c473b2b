"""Presets made from published figures, or from none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from routing_recipes import mixtral
from routing_targets import ALL_LAYERS, OWN_FIRST, SEGMENTS, Recipe, Stage, start, thirds

from moepack.routing_fit import Target
from moepack.routing_model import FitSample


def uniform(_: Path) -> Recipe:
    """Nothing is known."""
    return Recipe(
        start(
            "uniform",
            "an assumption: every expert equally likely whatever came before, and no prediction",
            sources={
                "popularity": "assumption: none",
                "text": "assumption: none",
                "context": "assumption: none",
                "context_tokens": "of no effect without context",
                "first_recall": "assumption: blind",
                "recall": "assumption: blind",
            },
            depths=(0.0,),
            spreads=(0.0, 0.0, 0.0),
            first_recall=(),
            recall=0.0,
        )
    )


def qwen3(_: Path) -> Recipe:
    """From published figures alone."""
    # Of 6 experts a token, one text: their shape over the depth, at the level of 8 experts.
    shape = np.array([0.341, 0.421, 0.335])
    reuse = 0.433 * shape / np.average(shape, weights=(12, 24, 12))
    return Recipe(
        start(
            "qwen3-30b-a3b",
            "fitted to published figures; no recording of this model is at hand. Not fitted to: an "
            "LRU cache of 40 % hits 93 % of texts of 512 tokens drawn from it; 90 to 95 % were "
            "measured (github.com/kekzl/imp, pull request 1359)",
            sources={
                "popularity": "spread of the usage of experts: arXiv 2505.16056, table 2 (3.19 %)",
                "text": f"{SEGMENTS} (0.5414)",
                "context": "reuse by the next token, 43.3 %: github.com/Helldez/BigMoeOnEdge, "
                "docs/expert-prediction.md, commit 2d4f2b11; its course over the depth from the "
                "trace of 128 tokens in docs/bench-data/2026-07-15-route-trace (Apache-2.0)",
                "context_tokens": "assumption: as fitted to OLMoE",
                "first_recall": f"{OWN_FIRST} (0.39, 0.59)",
                "recall": "0.886: the next router on the state of the layer before, measured in "
                "github.com/Helldez/BigMoeOnEdge, docs/expert-prediction.md",
            },
            spreads=(0.4, 1.0, 1.0),
            first_recall=(0.39, 0.59),
            recall=0.886,
        ),
        (
            Stage(
                FitSample(12, 128, 8, (128,) * 24, 4),
                [
                    *thirds("reuse by the next token", reuse),
                    Target("segment F1", ALL_LAYERS, 0.5414),
                    Target("usage spread", ALL_LAYERS, 0.0319),
                ],
                {"popularity": "together", "text": "each", "context": "together"},
                trial_draws=1,
            ),
        ),
    )


def qwen_paper(_: Path) -> Recipe:
    """For reproducing MoEpic: its own hit rates, which differ from the recording's."""
    published = {"lru 33 %": 0.33, "lfu 33 %": 0.437, "lru 50 %": 0.5638, "lfu 50 %": 0.6068}
    published["lcp 50 %"] = 0.6221
    source = "hit rates at 20 and 30 of 60 experts: arXiv 2509.08342, section 6"
    return Recipe(
        start(
            "qwen1.5-moe-paper",
            "fitted to the hit rates that arXiv 2509.08342 (MoEpic) publishes for "
            "Qwen1.5-MoE-A2.7B on MMLU; one set of numbers for all layers. Its caches see many "
            "short prompts, so what lasts counts as popularity. At 20 experts the paper gives a "
            "range, 33.0 to 43.7 %: taken for LRU and LFU. No routing of this form has an LRU so "
            "far below LFU there and so near to it at 30",
            sources={
                "popularity": source,
                "text": "assumption: none, since prompts are short",
                "context": source,
                "context_tokens": source,
                "first_recall": f"{OWN_FIRST} (0.39, 0.59); the paper says poor",
                "recall": "0.85: the paper says above 80 % in the middle of the model",
            },
            depths=(0.0,),
            spreads=(0.4, 0.0, 0.4),
            first_recall=(0.39, 0.59),
            recall=0.85,
        ),
        (
            Stage(
                FitSample(4, 60, 4, (2048,), 8),
                [Target(name, ALL_LAYERS, value) for name, value in published.items()],
                {"popularity": "each", "context": "each"},
                free_tokens=True,
                trial_draws=2,
            ),
        ),
    )


def mixtral_paper(recordings: Path) -> Recipe:
    """For reproducing MoEpic: it publishes no hit rates of this model."""
    fitted = mixtral(recordings).make()
    note = "assumption: as in the preset mixtral-8x7b; arXiv 2509.08342 publishes no hit rates"
    parameters = ("popularity", "text", "context", "context_tokens")
    return Recipe(
        replace(
            fitted,
            name="mixtral-paper",
            how="for the settings of arXiv 2509.08342 (MoEpic), which publishes no hit rate of "
            "Mixtral: the routing of the preset mixtral-8x7b is assumed",
            sources={
                **dict.fromkeys(parameters, note),
                "first_recall": f"{OWN_FIRST} (0.39, 0.59); the paper says poor",
                "recall": "0.85: the paper says above 80 % in the middle of the model",
            },
            sample=None,
            fit=(),
        )
    )
