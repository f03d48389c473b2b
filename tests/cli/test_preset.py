"""``moepack preset``: listed, shown, copied, edited, checked, and planned with."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepack.hardware import find_hardware
from moepack.presets import KINDS, preset_path, presets
from tests.cli.conftest import Moepack
from tests.cli.test_errors import assert_named

PLAN = ("--vram", "4M", "--context", "256", "--json")


def test_every_preset_is_listed_with_what_it_is(moepack: Moepack) -> None:
    listed = moepack("preset", "list", "--json").document["presets"]
    assert [(entry["kind"], entry["name"]) for entry in listed] == [
        (preset.kind.name, preset.name) for preset in presets()
    ]
    shown = moepack("preset", "list").out
    assert all(preset.name in shown for preset in presets())
    assert "NVIDIA GeForce RTX 4090" in shown
    for kind in KINDS:
        some = moepack("preset", "list", kind, "--json").document["presets"]
        assert {entry["kind"] for entry in some} == {kind}


def test_a_preset_is_shown_with_its_sources(moepack: Moepack) -> None:
    assert moepack("preset", "show", "h100").out == preset_path("h100").read_text()
    document = moepack("preset", "show", "h100", "--json").document
    assert document["kind"] == "hardware"
    assert document["preset"]["vram_bytes"] == find_hardware("h100").vram_bytes
    assert "data sheet" in document["preset"]["sources"]["memory"]


def test_a_copy_is_the_preset_under_its_own_name(moepack: Moepack, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    copied = moepack("preset", "copy", "rtx-3090", mine, "--json")
    assert copied.document == {"kind": "hardware", "name": "rtx-3090", "file": str(mine)}
    original = preset_path("rtx-3090").read_text()
    assert mine.read_text() == original.replace("name: rtx-3090", "name: mine", 1)
    checked = moepack("preset", "check", mine, "--json")
    assert checked.document["valid"] is True
    assert checked.document["name"] == "mine"


def test_a_copy_overwrites_nothing_unasked(moepack: Moepack, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    refused = moepack("preset", "copy", "rtx-3090", mine)
    assert_named(refused, "OutputError", str(mine), "exists", "--force")
    assert mine.read_text() == "precious"
    assert moepack("preset", "copy", "rtx-3090", mine, "--force").code == 0
    assert moepack("preset", "check", mine).code == 0


def test_a_copied_and_edited_machine_is_planned_for(
    home: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    assert moepack("preset", "copy", "cpu-sata", mine).code == 0
    plain = moepack("plan", model, *PLAN, "--hardware", mine).document
    text = mine.read_text()
    mine.write_text(text.replace("memory: {bytes_per_s: 384", "memory: {bytes_per_s: 3.84e9 # 384"))
    refused = moepack("plan", model, *PLAN, "--hardware", mine)
    assert_named(refused, "ProfileError", str(mine), "not YAML")
    mine.write_text(
        text.replace("memory: {bytes_per_s: 38400000000.0", "memory: {bytes_per_s: 1e8")
    )
    assert moepack("preset", "check", mine).code == 0
    slow = moepack("plan", model, *PLAN, "--hardware", mine).document
    assert plain["provenance"]["hardware"] == "mine"
    assert slow["provenance"]["hardware"] == "mine"
    assert slow["prediction"]["tpot_s"] > 2 * plain["prediction"]["tpot_s"]


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("ram_bytes: 34359738368", "ram_bytes: 32G", ("ram_bytes", "'32G'", "34359738368")),
        ("cores: 6", "cores: -6", ("cores is -6", "more than 0")),
        ("cores: 6", "coers: 6", ("coers", "unknown key", "cores")),
        ("launch_s: 2.0e-06\n", "", ("launch_s", "missing")),
        ("size_bytes: 16384,", "size_bytes: 4096,", ("disk", "4096 comes after 4096", "ascending")),
    ],
)
def test_what_is_wrong_with_an_edited_preset_is_named(
    moepack: Moepack, tmp_path: Path, right: str, wrong: str, words: tuple[str, ...]
) -> None:
    mine = tmp_path / "mine.yaml"
    assert moepack("preset", "copy", "cpu-sata", mine).code == 0
    text = mine.read_text()
    assert right in text
    mine.write_text(text.replace(right, wrong, 1))
    outcome = moepack("preset", "check", mine)
    assert_named(outcome, "ProfileError", str(mine), *words)
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "colour: red", "version: 1\nname: mine"])
def test_a_file_that_is_no_preset_is_told_so(moepack: Moepack, tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert_named(moepack("preset", "check", path), "ProfileError", str(path))


def test_names_that_nothing_has(moepack: Moepack, tmp_path: Path) -> None:
    unknown = moepack("preset", "show", "rtx-9090")
    assert_named(unknown, "PresetNotFoundError", "rtx-9090", "did you mean rtx-")
    assert_named(moepack("preset", "copy", "abacus", tmp_path / "x"), "PresetNotFoundError")
    assert_named(moepack("preset", "check", tmp_path / "none"), "ProfileError", "No such file")
    assert moepack("preset", "list", "colours").code == 2


def test_a_link_by_name_prices_like_the_machine_that_has_it(
    home: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    slow = moepack("plan", model, *PLAN, "--hardware", "cpu-ddr5-sata").document
    named = moepack("plan", model, *PLAN, "--hardware", "cpu-ddr5-nvme5", "--link", "sata").document
    fast = moepack("plan", model, *PLAN, "--hardware", "cpu-ddr5-nvme5").document
    for metric in ("ttft_s", "tpot_s"):
        found, expected = named["prediction"][metric], slow["prediction"][metric]
        assert found == pytest.approx(expected, rel=0.02)  # a curve is interpolated
        assert found > fast["prediction"][metric]
    mine = tmp_path / "mine.yaml"
    assert moepack("preset", "copy", "sata", mine).code == 0
    same = moepack("plan", model, *PLAN, "--hardware", "cpu-ddr5-nvme5", "--link", mine).document
    assert same["prediction"] == named["prediction"]


def test_a_link_that_nobody_knows(home: Path, model: Path, moepack: Moepack) -> None:
    outcome = moepack("plan", model, *PLAN, "--hardware", "rtx-5090", "--link", "pcie3")
    assert outcome.code == 2
    assert "pcie3-x16" in outcome.err
    assert moepack("plan", model, *PLAN, "--link", "sata,5us").code == 2
    missing = moepack("plan", model, *PLAN, "--link", "/no/such/link.yaml")
    assert_named(missing, "ProfileError", "/no/such/link.yaml")


def test_a_copied_routing_is_planned_with(
    home: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    assert moepack("preset", "copy", "olmoe-1b-7b", mine).code == 0
    assert moepack("preset", "check", mine, "--json").document["kind"] == "routing"
    machine = (*PLAN, "--hardware", "cpu-sata", "--routing")
    skewed = moepack("plan", model, *machine, mine)
    assert skewed.code == 0, skewed.err
    blind = moepack("plan", model, *machine, "uniform").document
    assert skewed.document["prediction"]["hit_rate"] > blind["prediction"]["hit_rate"]
