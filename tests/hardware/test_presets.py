from __future__ import annotations

import dataclasses
import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moepack
from moepack import presets
from moepack.errors import PresetNotFoundError, ProfileError
from moepack.hardware import HardwareProfile, find_hardware, load_hardware
from moepack.links import find_link

ROOT = Path(__file__).resolve().parents[2]
NAMES = presets.preset_names()


def test_the_presets_that_the_documentation_names_are_there() -> None:
    cards = {"rtx-3060-12g", "rtx-3090", "rtx-4070-laptop", "rtx-4090", "rtx-5090"}
    cards |= {"a6000", "a100-40g", "a100-80g", "h100"}
    machines = {"cpu-nvme4", "cpu-sata", "cpu-ddr4-nvme3", "cpu-ddr5-nvme5"}
    assert cards | machines <= set(NAMES)


def test_the_files_are_what_the_table_of_facts_makes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_presets.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.yaml")}
    for folder in {path.parent for path in made}:
        shipped = presets.presets_folder() / folder
        assert {path.name for path in shipped.iterdir()} == {
            path.name for path in made if path.parent == folder
        }
    for path, content in made.items():
        edited = (presets.presets_folder() / path).read_bytes() != content
        assert not edited, f"{path}: change scripts/preset_facts.py and run make_presets.py"


#: Bytes of VRAM, and bytes per second of its memory and over the bus, as their makers state them.
STATED = {
    "rtx-3060-12g": (12e9, 360e9, 31.5e9),
    "rtx-3090": (24e9, 936e9, 31.5e9),
    "rtx-4070-laptop": (8e9, 256e9, 15.75e9),
    "rtx-4090": (24e9, 1008e9, 31.5e9),
    "rtx-5090": (32e9, 1792e9, 63e9),
    "a6000": (48e9, 768e9, 31.5e9),
    "a100-40g": (40e9, 1555e9, 31.5e9),
    "a100-80g": (80e9, 1935e9, 31.5e9),
    "h100": (80e9, 3350e9, 63e9),
}


@pytest.mark.parametrize("name", STATED)
def test_a_card_stays_a_little_below_what_its_maker_states(name: str) -> None:
    vram_bytes, memory_bytes_per_s, bus_bytes_per_s = STATED[name]
    profile = find_hardware(name)
    assert profile.vram_bytes is not None
    assert profile.bus is not None
    assert 1.0 <= profile.vram_bytes / vram_bytes <= 1.08  # "24 GB" are 24 GiB, less what ECC takes
    assert 0.85 <= profile.memory.bytes_per_s / memory_bytes_per_s <= 0.95
    assert 0.7 <= profile.bus.points[-1].bytes_per_s / bus_bytes_per_s <= 0.9


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_profile_that_says_where_each_number_comes_from(name: str) -> None:
    profile = find_hardware(name)
    assert profile.name == name
    assert profile.source == "preset"
    numbers = {
        field.name
        for field in dataclasses.fields(HardwareProfile)
        if (value := getattr(profile, field.name)) != field.default
        and (isinstance(value, (int, float, tuple)) or dataclasses.is_dataclass(value))
    }
    assert set(profile.sources) == numbers - {"version"}


@pytest.mark.parametrize("name", NAMES)
def test_the_curves_of_a_preset_follow_its_stated_formula(name: str) -> None:
    """Two unknowns each, many points: latency and bandwidth; peak, in the memory-bound rest."""
    profile = find_hardware(name)
    for link in (profile.disk, profile.bus):
        if link is None:
            continue
        large = link.points[-1]
        bandwidth = large.size_bytes / (large.duration_s - link.latency_s / link.readers)
        for point in link.points:
            expected_s = link.latency_s / link.readers + point.size_bytes / bandwidth
            assert point.duration_s == pytest.approx(expected_s, rel=2e-3)
    for curve in profile.matmul:
        item_bytes = 4 if curve.dtype == "F32" else 2
        weights = curve.rows * curve.columns
        last = curve.points[-1]
        seconds = 2 * weights * last.tokens / last.flop_per_s - profile.launch_s
        peak = 2 * weights * last.tokens / seconds
        for matmul in curve.points:
            flop = 2 * weights * matmul.tokens
            bound_s = max(weights * item_bytes / profile.memory.bytes_per_s, flop / peak)
            expected = flop / (bound_s + profile.launch_s)
            assert matmul.flop_per_s == pytest.approx(expected, rel=5e-3)


def test_a_name_means_one_preset_whatever_its_kind() -> None:
    names = [preset.name for preset in presets.presets()]
    assert len(names) == len(set(names))
    assert {preset.kind.name for preset in presets.presets()} == set(presets.KINDS)


@pytest.mark.parametrize("preset", presets.presets(), ids=lambda preset: str(preset.name))
def test_every_preset_is_of_the_kind_that_its_keys_say(preset: presets.Preset) -> None:
    assert presets.kind_of(preset.path) == preset.kind
    assert preset.load().name == preset.name


@pytest.mark.parametrize(
    ("link", "machine"),
    [("sata", "cpu-ddr5-sata"), ("nvme4", "cpu-nvme4"), ("pcie4-x16", "rtx-4090")],
)
def test_a_link_preset_is_the_link_of_the_machine_that_has_it(link: str, machine: str) -> None:
    preset, curve = find_link(link), find_hardware(machine).link
    for point in curve.points:
        expected_s = preset.latency_s + point.size_bytes / preset.rate_bytes_per_s
        assert point.duration_s == pytest.approx(expected_s, rel=1e-3)


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("latency_s: 1.2e-05", "latency_s: 12us", "got '12us'; write 1.2e-05"),
        ("latency_s: 1.2e-05", "latency_s: 12", "latency_s is 12.0, expected seconds, 0 to 1"),
        ("\nrate_bytes_per_s", "\nrate", "rate: unknown key"),
        ("version: 1", "version: 3", "version 3, this moepack reads 1"),
    ],
)
def test_what_is_wrong_with_a_link_is_named(
    right: str, wrong: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(presets.preset_path("pcie3-x16", "link").read_text().replace(right, wrong, 1))
    with pytest.raises(ProfileError, match=re.escape(named)):
        find_link(str(path))


def test_an_unknown_preset_names_the_known_and_the_closest() -> None:
    with pytest.raises(PresetNotFoundError, match=r"rtx-4080.*cpu-sata.*did you mean rtx-4090\?"):
        find_hardware("rtx-4080")
    with pytest.raises(PresetNotFoundError, match="or give the path of a file"):
        find_hardware("quantum")


def test_a_profile_can_be_given_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    shutil.copy(presets.preset_path("cpu-sata"), path)
    assert find_hardware(str(path)) == find_hardware("cpu-sata")
    with pytest.raises(ProfileError, match=r"gone\.yaml: No such file or directory"):
        find_hardware(str(tmp_path / "gone.yaml"))


def test_presets_are_found_inside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "moepack"
    installed = package / "profiles" / "hardware"
    installed.mkdir(parents=True)
    shutil.copy(presets.preset_path("a6000"), installed)
    monkeypatch.setattr(importlib.resources, "files", lambda _: package)
    assert presets.presets_folder() == package / "profiles"
    assert presets.preset_names() == ["a6000"]
    assert load_hardware(presets.preset_path("a6000")).name == "a6000"


def test_presets_are_found_beside_the_package_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    (repository / "profiles").mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda _: repository / "moepack")
    monkeypatch.setattr(moepack, "__file__", str(repository / "moepack" / "__init__.py"))
    assert presets.presets_folder() == repository / "profiles"


def test_presets_in_neither_place_are_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path / "a")
    monkeypatch.setattr(moepack, "__file__", str(tmp_path / "b" / "moepack" / "__init__.py"))
    with pytest.raises(ProfileError, match="install it anew"):
        presets.presets_folder()
