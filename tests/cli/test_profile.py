"""``moepack profile``: derived beside measured, and this profile beside the one before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moepack.calibration import load_calibration
from moepack.hardware import HardwareProfile, find_hardware
from moepack.rates import MemoryRate
from tests.cli.conftest import Moepack

MACHINE = dataclasses.replace(find_hardware("cpu-nvme4"), source="measured", sources={})


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch, measured_briefly: None) -> list[HardwareProfile]:
    """What measuring the machine finds, one after the other."""
    found: list[HardwareProfile] = []
    monkeypatch.setattr("moepack.probe.probe_hardware", lambda **_: found.pop(0))
    return found


def test_what_the_roofline_derives_stands_beside_what_was_measured(
    home: Path, model: Path, texts: list[Path], moepack: Moepack, finds: list[HardwareProfile]
) -> None:
    finds += [MACHINE, MACHINE]
    document = moepack("profile", model, "--json").document
    assert document.keys() == {"hardware", "compute", "roofline", "routing"}
    check = document["roofline"]
    assert {piece["piece"] for piece in check["pieces"]} == {
        *("attention", "attention INT8", "router", "fixed", "expert", "expert_split"),
        *("expert INT8", "expert_split INT8", "expert INT4_G32", "expert_split INT4_G32"),
    }
    (entry,) = document["compute"]["layers"]
    curves = {**entry, "attention INT8": entry["rounded"]["attention"]}
    for item in entry["quantised"]:
        curves[f"expert {item['encoding']}"] = item["whole"]
        curves[f"expert_split {item['encoding']}"] = item["split"]
    for piece in check["pieces"]:
        assert piece["token_s"] == curves[piece["piece"]]["seconds"][0]
        assert piece["block_s"] == pytest.approx(curves[piece["piece"]]["seconds"][-1])
        assert piece["derived_token_s"] > 0
    assert check["token_ratio"] == pytest.approx(check["derived_token_s"] / check["token_s"])
    assert check["block_ratio"] == pytest.approx(check["derived_block_s"] / check["block_s"])
    shown = moepack("profile", model).out
    assert "derived" in shown
    assert "the whole model" in shown
    assert "pass over experts" in shown
    assert "expert in two, INT8" in shown


def test_a_profile_tells_how_it_differs_from_the_one_before(
    home: Path, moepack: Moepack, finds: list[HardwareProfile]
) -> None:
    slower = dataclasses.replace(MACHINE, memory=MemoryRate(MACHINE.memory.bytes_per_s / 2, 0.1))
    finds += [MACHINE, MACHINE, slower, slower]
    assert moepack("profile", "--hardware-only", "--json").document.keys() == {"hardware"}
    same = moepack("profile", "--hardware-only", "--json").document["agreement"]
    assert same["within_spread"] == same["figures"] > 20
    assert same["outside"] == []
    other = moepack("profile", "--hardware-only", "--json").document["agreement"]
    assert other["within_spread"] == other["figures"] - 1
    (memory,) = other["outside"]
    assert memory["name"] == "memory"
    assert memory["ratio"] == pytest.approx(0.5)
    assert "of the profile before" in moepack("profile", "--hardware-only").out


@pytest.mark.parametrize("before", ["preset", "garbage", "another"])
def test_another_machine_is_not_compared(
    home: Path, moepack: Moepack, finds: list[HardwareProfile], before: str
) -> None:
    home.mkdir()
    path = home / "hardware.yaml"
    if before == "preset":
        find_hardware("cpu-nvme4").save(path)
    elif before == "another":
        dataclasses.replace(MACHINE, name="another").save(path)
    else:
        path.write_text("garbage")
    finds.append(MACHINE)
    assert moepack("profile", "--hardware-only", "--json").document.keys() == {"hardware"}


def test_what_rounding_does_is_measured_shown_and_kept(
    home: Path, model: Path, texts: list[Path], moepack: Moepack, finds: list[HardwareProfile]
) -> None:
    finds += [MACHINE, MACHINE]
    document = moepack("profile", model, "--bits", "--json").document
    layer = document["damage"]["layers"][0]
    assert layer["encodings"] == ["INT8", "INT4_G32"]
    fine, coarse = map(sum, layer["errors"])
    assert 0 < fine < coarse < 1
    (kept,) = home.glob("models/*/damage.json")
    assert json.loads(kept.read_text()) == document["damage"]
    calibration = load_calibration(kept.parent)
    assert calibration.digest == document["damage"]["calibration"]
    assert document["second_moments"]["bytes"] == calibration.second_bytes > 0
    every = {"by_expert": True, "hidden": 64, "neurons": 96}
    assert document["second_moments"]["layers"] == dict.fromkeys("012", every)
    shown = moepack("profile", model, "--bits").out
    assert "worst 1/8" in shown
    assert "chosen by expert" in shown
    assert "nats a token" in shown
    assert "best replaced by T1,T2 of" in shown
    assert "of each expert's neurons, for down, 96 together" in " ".join(shown.split())


def test_nothing_is_rounded_where_only_the_machine_is_measured(
    home: Path, moepack: Moepack
) -> None:
    refused = moepack("profile", "--hardware-only", "--bits")
    assert refused.code == 2
    assert "leave out one of the two" in refused.err
