"""Routing recorded from real models, where it is at hand: other people's, not in the repository."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from moepack.trace import NO_PREDICTION, LayerShape, Trace, part_of_tokens

ROOT = Path(__file__).resolve().parents[2]

#: Shorter texts say little of caches, which are empty at the beginning of each.
SHORTEST_TEXT = 64


class Recording(NamedTuple):
    """A recorded trace: its layers, and the ids [tokens, L, K] of each text that can be used."""

    layers: tuple[LayerShape, ...]
    texts: list[npt.NDArray[np.uint16]]


def recordings_folder() -> Path:
    """Where the recordings are; else the test is skipped."""
    told = os.environ.get("MOEPACK_ROUTING_DATA")
    folder = Path(told) if told else ROOT.parent / "shared" / "data" / "routing"
    if not folder.is_dir():
        pytest.skip("the recordings are not here; MOEPACK_ROUTING_DATA says where they are")
    return folder


def load_recording(model: str, shortest: int = SHORTEST_TEXT) -> Recording:
    """A trace (``olmoe``, ``qwen``, ``switch_base_8``), each text before it repeats itself."""
    with np.load(recordings_folder() / f"trace_{model}.npz") as arrays:
        experts, top_k = int(arrays["num_experts"]), int(arrays["top_k"])
        if "clean_prefix" in arrays:
            prefixes = zip(arrays["prompts"].tolist(), arrays["clean_prefix"].tolist(), strict=True)
            found = [arrays[name][:tokens] for name, tokens in prefixes if tokens >= shortest]
        else:
            found = [arrays["trace"]]
    texts = [text.astype(np.uint16) for text in found]
    layers = tuple(LayerShape(layer, experts, top_k) for layer in range(texts[0].shape[1]))
    return Recording(layers, texts)


def trace_of(texts: Sequence[npt.NDArray[Any]]) -> Trace:
    """Texts one after the other, each in its parts, without predictions."""
    ids = np.concatenate(texts).astype(np.uint16)
    tokens, layers, top_k = ids.shape
    lengths = [len(text) for text in texts]
    return Trace(
        ids,
        np.full(ids.shape, 1 / top_k, dtype=np.float16),
        np.full((tokens, layers, 2 * top_k), NO_PREDICTION, dtype=np.uint16),
        np.repeat(np.arange(len(texts), dtype=np.uint32), lengths),
        np.concatenate([part_of_tokens(length) for length in lengths]),
    )
