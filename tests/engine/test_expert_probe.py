"""What one more expert adds, what a pass costs without any, and what fetching disturbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moepack_runtime import ffn
from moepack_runtime.transfer import HostTransfer, Priority, Ticket

from moepack import compute_probe
from moepack.checkpoint import Checkpoint
from moepack.compute import ComputeProfile, Curve
from moepack.compute_probe import measure_compute, probe_context_tokens
from moepack.expert_probe import Probe, walked
from moepack.hardware import find_hardware
from moepack.segments import SegmentId
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement


class Counted:
    """A stopwatch of pretended seconds, by what was done since the last lap.

    Every piece takes 5 s, each segment that is computed 3 s, each that is demanded 7 s, and having
    to demand anything 11 s; each that is asked for ahead 2 s, and asking for any 4 s.
    """

    products = 0
    demanded = 0
    asked = 0
    slowness = 1.0

    def __init__(self, synchronize: object = None) -> None:
        del synchronize

    def lap(self) -> float:
        seconds = 5.0 + 3.0 * Counted.products
        seconds += 7.0 * Counted.demanded + 11.0 * (Counted.demanded > 0)
        seconds += 2.0 * Counted.asked + 4.0 * (Counted.asked > 0)
        Counted.products = Counted.demanded = Counted.asked = 0
        return seconds * Counted.slowness


class Clock:
    """A yardstick that takes a second where the processor is not slow."""

    def read_s(self) -> float:
        return Counted.slowness


@pytest.fixture(name="counting")
def _counting(monkeypatch: pytest.MonkeyPatch) -> None:
    product, start = ffn.gated_ffn, HostTransfer.start

    def counted(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        Counted.products += 1
        return product(x, *arguments)  # type: ignore[arg-type]

    def counted_start(
        self: HostTransfer,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        Counted.demanded += priority is Priority.DEMAND
        Counted.asked += priority is Priority.PREFETCH
        ticket = start(self, segment, destination, priority)
        if priority is Priority.PREFETCH:
            self.wait(ticket)  # beside such seconds it is there at once
        return ticket

    monkeypatch.setattr("moepack_runtime.moe.gated_ffn", counted)
    monkeypatch.setattr("moepack_runtime.grouped.gated_ffn", counted)
    monkeypatch.setattr(HostTransfer, "start", counted_start)
    monkeypatch.setattr(compute_probe, "Stopwatch", Counted)
    monkeypatch.setattr(compute_probe, "MixedYardstick", Clock)
    monkeypatch.setattr(compute_probe, "_WALKS", 2)


def measured(checkpoint: Checkpoint, scratch: Path) -> ComputeProfile:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,), block_tokens=8)
    context = probe_context_tokens(spec)
    place = placement(spec, layout, tops=0, bottoms=0, staging=4, context=context)
    with open_engine(checkpoint, layout, place) as engine:
        return measure_compute(checkpoint, engine, find_hardware("cpu-sata"), scratch=scratch)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_pieces_of_a_layer_are_told_apart(
    tiny_folder: TinyFolder, tmp_path: Path, architecture: str
) -> None:
    checkpoint = Checkpoint.open(tiny_folder(architecture, "plain"))
    profile = measured(checkpoint, tmp_path)
    (layer,) = profile.layers
    tokens = layer.attention.tokens

    def always(seconds: float) -> Curve:
        return Curve(tokens, (seconds,) * len(tokens))

    assert layer.layers == checkpoint.spec.moe_layers
    assert layer.attention == always(5.0)
    assert layer.router == always(5.0)
    assert layer.fixed == always(5.0)
    assert layer.expert == always(3.0)
    assert layer.expert_split == always(6.0), "two segments"
    assert [item.encoding for item in layer.quantised] == ["INT8", "INT4_G32"]
    for item in layer.quantised:
        assert (item.whole, item.split) == (always(3.0), always(6.0))
    assert profile.head_s == 5.0
    # But for the link's own time, which is no disturbance.
    assert layer.transfer_s == pytest.approx(7.0, rel=1e-3)
    assert layer.burst_s == pytest.approx(11.0, rel=1e-3)
    assert layer.of_prompt == pytest.approx((7.0, 11.0), rel=1e-3)
    assert layer.of_ahead == pytest.approx((2.0, 4.0), rel=1e-3), "of those asked for ahead"
    assert profile.yardstick_s == 1.0


@pytest.mark.usefixtures("counting")
def test_a_processor_that_slows_down_meanwhile_changes_nothing_but_the_speed(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns = compute_probe._take_turns

    def at_changing_speed(*arguments: Any, **options: Any) -> Any:
        # With one token, as with many; three is no multiple of how many kinds of turns there are.
        monkeypatch.setattr(Counted, "slowness", Counted.slowness % 3 + 1)
        return take_turns(*arguments, **options)

    monkeypatch.setattr(compute_probe, "_take_turns", at_changing_speed)
    profile = measured(Checkpoint.open(tiny_folder("qwen3_moe", "plain")), tmp_path)
    (layer,) = profile.layers
    mean_s = profile.yardstick_s
    assert 1.0 < mean_s < 3.0
    assert layer.attention.seconds == pytest.approx([5.0 * mean_s] * len(layer.attention.tokens))
    assert layer.expert is not None
    assert layer.expert.seconds == pytest.approx([3.0 * mean_s] * len(layer.expert.tokens))
    assert profile.head_s == pytest.approx(5.0 * mean_s)
    assert layer.transfer_s == pytest.approx(7.0 * mean_s, rel=1e-3)
    assert layer.burst_s == pytest.approx(11.0 * mean_s, rel=1e-3)
    assert layer.of_prompt == pytest.approx((7.0 * mean_s, 11.0 * mean_s), rel=1e-3)
    assert layer.of_ahead == pytest.approx((2.0 * mean_s, 4.0 * mean_s), rel=1e-3)


def test_layers_are_walked_until_no_cache_holds_them(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,), block_tokens=8)
    place = placement(spec, layout, tops=0, bottoms=0, staging=4, context=64)
    numbers, moe = spec.moe_layers, spec.moe(spec.moe_layers[0])
    with open_engine(checkpoint, layout, place) as engine:
        probe = Probe(checkpoint, engine, find_hardware("cpu-sata"), tmp_path)
        assert walked(probe, numbers) == (numbers, moe.num_experts), "all of a small model"
        each = spec.expert_bytes(numbers[0])
        for fitting in range(1, 3 * moe.num_experts):
            monkeypatch.setattr("moepack.expert_probe._WALKED_BYTES", fitting * each)
            those = walked(probe, numbers)
            assert those.experts >= moe.top_k
            one_token = max(2, moe.top_k)
            assert len(those.numbers) * those.experts <= max(fitting, one_token)
