"""What one more expert adds, and what the pass costs without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moepack_runtime import ffn

from moepack.checkpoint import Checkpoint
from moepack.compute import Curve
from moepack.expert_probe import Probe, measure_experts
from moepack.hardware import find_hardware
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement

TOKENS = (1, 4)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_the_pass_is_told_from_its_experts(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    products: list[int] = []
    real = ffn.gated_ffn

    def counted(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        products.append(x.shape[0])
        return real(x, *arguments)  # type: ignore[arg-type]

    def curve(call: Callable[[torch.Tensor], object]) -> Curve:
        """As if a pass took 5 s, and 3 s for each segment that is computed in it."""
        seconds = []
        for tokens in TOKENS:
            products.clear()
            call(hidden[:tokens])
            seconds.append(5.0 + 3.0 * len(products))
        return Curve(TOKENS, tuple(seconds))

    monkeypatch.setattr("moepack_runtime.moe.gated_ffn", counted)
    monkeypatch.setattr("moepack_runtime.grouped.gated_ffn", counted)
    checkpoint = Checkpoint.open(tiny_folder(architecture, "plain"))
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,), block_tokens=8)
    place = placement(spec, layout, tops=0, bottoms=0, staging=4, context=64)
    with open_engine(checkpoint, layout, place) as engine, torch.inference_mode():
        hidden = engine.decoder.embed(torch.arange(max(TOKENS)))
        probe = Probe(checkpoint, engine, find_hardware("cpu-sata"), tmp_path)
        curves = measure_experts(probe, spec.moe_layers[0], curve)
    assert curves.fixed == Curve(TOKENS, (5.0, 5.0))
    assert curves.whole == Curve(TOKENS, (3.0, 3.0))
    assert curves.split == Curve(TOKENS, (6.0, 6.0)), "two segments"
