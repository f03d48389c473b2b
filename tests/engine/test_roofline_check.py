"""The roofline against a model that was measured: the one that ships."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from time import process_time

import pytest
import torch
from moepack_runtime.loading import open_checkpoint

from moepack import compute_probe, timing
from moepack.checkpoint import Checkpoint
from moepack.compute_probe import measure_compute, probe_context_tokens
from moepack.hardware import HardwareProfile, find_hardware
from moepack.layouts import uniform_layout
from moepack.probe_torch import TorchProbe
from moepack.roofline import derive_compute
from moepack.roofline_check import TOLERANCE, RooflineCheck, check_roofline
from moepack.shipped import shipped_model
from tests.support.plans import placement


def this_machine(rounds: int) -> HardwareProfile:
    """What torch makes of this machine; nothing of it depends on the link."""
    probe = TorchProbe(torch.device("cpu"))
    for _ in range(rounds):
        probe.round()
    return dataclasses.replace(
        find_hardware("cpu-sata"),
        source="measured",
        memory=probe.memory(),
        launch_s=probe.launch().median_s,
        matmul=probe.matmul(),
        attention=probe.attention(),
    )


def within(check: RooflineCheck) -> bool:
    ratios = (check.token_ratio, check.block_ratio)
    return all(1 / TOLERANCE <= ratio <= TOLERANCE for ratio in ratios)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_roofline_is_within_its_tolerance_of_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the processor's time for this process: waiting slows short and long calls unequally.

    And up to three times, since other work also takes caches and memory away.
    """
    monkeypatch.setattr(timing, "perf_counter", process_time)
    monkeypatch.setattr(compute_probe, "TOKENS", (1, 2, 16, 128, 512))
    checkpoint = Checkpoint.open(str(shipped_model()))
    spec = checkpoint.spec
    layout = uniform_layout(spec, 1.0)
    context = probe_context_tokens(spec)
    place = placement(
        spec, layout, tops=0, bottoms=0, staging=4, context=context, threads=torch.get_num_threads()
    )
    ratios = []
    for _ in range(3):
        hardware = this_machine(rounds=2)
        with open_checkpoint(checkpoint, spec, layout, place) as engine:
            measured = measure_compute(checkpoint, engine, hardware, scratch=tmp_path)
        check = check_roofline(spec, hardware, measured)
        ratios.append((round(check.token_ratio, 2), round(check.block_ratio, 2)))
        if within(check):
            return
    pytest.fail(f"derived over measured, for a token and a block: {ratios}")


def test_what_is_derived_from_the_same_rates_is_no_different() -> None:
    hardware = find_hardware("cpu-nvme4")
    spec = Checkpoint.open(str(shipped_model())).spec
    check = check_roofline(spec, hardware, derive_compute(spec, hardware))
    assert check.token_ratio == check.block_ratio == 1.0
    assert within(check)
    assert {piece.piece for piece in check.pieces} == {
        *("attention", "attention INT8", "router", "fixed", "expert", "expert_split"),
        # Of groups only 32 divides its hidden size, 128, and its experts' width, 96.
        *("expert INT8", "expert_split INT8", "expert INT4_G32", "expert_split INT4_G32"),
    }
    assert all(piece.token_s == piece.derived_token_s for piece in check.pieces)
    slower = dataclasses.replace(hardware, launch_s=100 * hardware.launch_s)
    assert not within(check_roofline(spec, slower, derive_compute(spec, hardware)))
