"""Experts rounded by what their inputs are like: from the profile to the pack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moepack.calibration import CALIBRATION_FILE, Calibration, LayerMoments
from moepack.checkpoint import Checkpoint
from moepack.formats import PackedModel
from tests.cli.conftest import Moepack

PLAN = ("--vram", "4M", "--context", "256", "--quality", "int4")


def calibrate(home: Path, model: Path, seed: int) -> Calibration:
    """As ``moepack profile --bits`` would."""
    spec = Checkpoint.open(model, headers_only=True).spec
    random = np.random.default_rng(seed)
    moments = {}
    for number in spec.moe_layers:
        moe = spec.moe(number)
        shapes = [(moe.num_experts, n) for n in (spec.hidden_size, moe.intermediate_size)]
        moments[number] = LayerMoments(*(random.random(s, np.float32) for s in shapes))
    found = Calibration.of(moments)
    (folder,) = home.glob("models/*")
    found.save(folder)
    return found


def test_what_the_profile_has_seen_decides_how_experts_are_rounded(
    packed: Path, measured: Path, model: Path, moepack: Moepack
) -> None:
    calibration = calibrate(measured, model, 0)
    assert "calibration" not in moepack("plan", model, *PLAN[:4], "--json").document
    plain = moepack("plan", model, *PLAN, "--no-calibration", "--json").document
    assert "calibration" not in plain
    assert moepack("pack").code == 0
    codes = (packed / "experts" / "layer-000.top.safetensors").read_bytes()
    made = moepack("plan", model, *PLAN)
    assert "rounded by calibration" in made.out
    assert "the calibration has no second moments" in made.err
    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    assert PackedModel.open(packed).layout.calibration == calibration.digest
    assert (packed / "experts" / "layer-000.top.safetensors").read_bytes() != codes
    assert moepack("verify").code == 0
    assert moepack("run", "Some text", "--max-new-tokens", "2").code == 0
    low = moepack("plan", model, *PLAN[:4], "--on-miss", "low", "--json").document
    assert low["calibration"] == calibration.digest
    kept = moepack("plan", model, *PLAN[:4], "--keep-layout", "--json").document
    assert kept["calibration"] == calibration.digest


def test_a_profile_made_anew_asks_for_a_plan_made_anew(
    packed: Path, measured: Path, model: Path, moepack: Moepack
) -> None:
    assert packed.exists()
    calibrate(measured, model, 0)
    assert moepack("plan", model, *PLAN).code == 0
    calibrate(measured, model, 1)
    refused = moepack("pack")
    assert refused.code == 1
    assert "the plan rounds experts by calibration" in refused.err
    assert moepack("plan", model, *PLAN).code == 0
    assert moepack("pack").code == 0
    both = moepack("plan", model, *PLAN[:4], "--keep-layout", "--no-calibration")
    assert both.code == 2
    assert "is rounded as it is" in " ".join(both.err.replace("│", " ").split())


@pytest.mark.usefixtures("packed")
def test_a_damaged_calibration_is_named(measured: Path, model: Path, moepack: Moepack) -> None:
    (folder,) = measured.glob("models/*")
    (folder / CALIBRATION_FILE).write_bytes(b"nothing")
    refused = moepack("plan", model, *PLAN)
    assert refused.code == 1
    assert "measure it again with moepack profile --bits" in refused.err
    assert moepack("plan", model, *PLAN[:4]).code == 0  # nothing is rounded
