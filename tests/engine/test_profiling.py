"""What is recorded of the routing is what transformers' routers decide, predictions included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moepack import compute_probe
from moepack.checkpoint import Checkpoint
from moepack.compute import ComputeProfile
from moepack.errors import TextError
from moepack.hardware import find_hardware
from moepack.profiling import profile_model, record_routing
from moepack.routing import RoutingProfile
from moepack.texts import read_texts
from moepack.trace import NO_PREDICTION
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement

TEXTS = [[(5 * place + 9) % 250 + 3 for place in range(700)], list(range(40, 75))]


def routed_by_transformers(folder: Path, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Chosen ids, and each next layer's ranking of this layer's residual.

    [tokens, layers, experts]: experts by descending logit; second, the logits of layer l + 1's
    router on layer l's post-attention residual, ranked likewise (the last layer's go to the first
    layer).
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.model.layers
    residuals: list[torch.Tensor] = []

    def keep(module: object, args: tuple[torch.Tensor, ...]) -> None:
        residuals.append(args[0][0])

    for layer in layers:
        layer.post_attention_layernorm.register_forward_pre_hook(keep)
    with torch.inference_mode():
        model(torch.tensor([tokens]))
        taken = residuals[: len(layers)]

        def rank(layer: Callable[..., torch.Tensor], residual: torch.Tensor) -> torch.Tensor:
            normed = layer.post_attention_layernorm(residual)  # type: ignore[attr-defined]
            logits: torch.Tensor = normed @ layer.mlp.gate.weight.T  # type: ignore[attr-defined]
            return logits.argsort(dim=-1, descending=True)

        own = torch.stack([rank(layer, x) for layer, x in zip(layers, taken, strict=True)], 1)
        following = [*layers[1:], layers[0]]
        ahead = torch.stack([rank(layer, x) for layer, x in zip(following, taken, strict=True)], 1)
    return own.numpy(), ahead.numpy()


@pytest.fixture(scope="module")
def recorded(tiny_folder: TinyFolder) -> RoutingProfile:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    layout = mixed_layout(checkpoint.spec, (1.0,), block_tokens=64)
    place = placement(checkpoint.spec, layout, tops=0, bottoms=0, staging=4, context=512)
    texts = [(f"text {number}", b"", ids) for number, ids in enumerate(TEXTS)]
    with open_engine(checkpoint, layout, place) as engine:
        return record_routing(engine, texts, how="a test")


def test_the_trace_is_what_transformers_routes(
    recorded: RoutingProfile, tiny_folder: TinyFolder
) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    trace = recorded.trace
    top_k = recorded.summary.layers[0].top_k
    sequences = [TEXTS[0][:512], TEXTS[0][512:], TEXTS[1]]
    assert len(trace.ids) == sum(map(len, TEXTS))
    begin = 0
    for number, tokens in enumerate(sequences):
        rows = slice(begin, begin + len(tokens))
        begin += len(tokens)
        own, ahead = routed_by_transformers(folder, tokens)
        assert (trace.sequence[rows] == number).all()
        assert np.array_equal(trace.ids[rows], own[:, :, :top_k])
        depth = trace.predicted.shape[2]
        # Layers after the first: predicted by the layer before, on the same token.
        assert np.array_equal(trace.predicted[rows][:, 1:], ahead[:, :-1, :depth])
        # The first: by the last layer, on the token before.
        assert np.array_equal(trace.predicted[rows][1:, 0], ahead[:-1, -1, :depth])
        assert (trace.predicted[rows][0, 0] == NO_PREDICTION).all()


def test_each_text_is_split_in_its_own_order(recorded: RoutingProfile) -> None:
    part = recorded.trace.part
    for rows in (part[:700], part[700:]):
        assert (np.diff(rows.astype(int)) >= 0).all()
        assert set(rows.tolist()) == {0, 1, 2}
    assert [source.tokens for source in recorded.summary.sources] == [700, 35]


def test_recall_and_reuse_are_counted_as_said(recorded: RoutingProfile) -> None:
    trace, entry = recorded.trace, recorded.summary.layers[1]
    found = [
        expert in guess[: entry.top_k]
        for ids, guess in zip(trace.ids[:, 1].tolist(), trace.predicted[:, 1].tolist(), strict=True)
        for expert in ids
    ]
    assert entry.recall_at_k == pytest.approx(np.mean(found), abs=1e-4)
    pairs = [
        (before, after)
        for before, after, a, b in zip(
            trace.ids[:-1, 1].tolist(),
            trace.ids[1:, 1].tolist(),
            trace.sequence[:-1],
            trace.sequence[1:],
            strict=True,
        )
        if a == b
    ]
    again = [expert in before for before, after in pairs for expert in after]
    assert entry.reuse == pytest.approx(np.mean(again), abs=1e-4)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_whole_profile_of_a_model_with_texts(
    tiny_folder: TinyFolder, tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_with: list[int] = []

    def watch(*arguments: Any) -> ComputeProfile:
        measured_with.append(torch.get_num_threads())
        return measure(*arguments)

    measure = compute_probe._measure
    monkeypatch.setattr(compute_probe, "_measure", watch)
    monkeypatch.setattr(compute_probe, "_LIMIT_S", 0.0)  # one walk of each counts
    monkeypatch.setattr(compute_probe, "TOKENS", (1, 16))
    folder = tiny_folder("qwen3_moe", "plain")
    text = tmp_path / "words.txt"
    text.write_text("One word after another, and then some more of them. " * 20)
    checkpoint = Checkpoint.open(folder)
    compute, routing = profile_model(
        checkpoint, hardware=find_hardware("cpu-nvme4"), texts=[text], scratch=tmp_path
    )
    assert measured_with == [1, 2] * 3, "with one thread, and with all, in three rounds"
    assert compute.source == "measured"
    assert compute.model_digest == routing.summary.model_digest == checkpoint.spec.digest
    assert sorted(n for entry in compute.layers for n in entry.layers) == list(
        range(len(checkpoint.spec.layers))
    )
    assert all(entry.attention.at(1) > 0 for entry in compute.layers)
    assert list(tmp_path.iterdir()) == [text], "the scratch file is gone"


def test_texts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match=r"binary: not UTF-8"):
        read_texts([binary])
    with pytest.raises(TextError, match="No such file"):
        read_texts([tmp_path / "absent"])
