from __future__ import annotations

import dataclasses
import importlib.resources
import shutil
from pathlib import Path

import pytest

import moepack
from moepack import presets
from moepack.errors import PresetNotFoundError, ProfileError
from moepack.hardware import HardwareProfile, find_hardware, load_hardware

NAMES = presets.preset_names()


def test_the_presets_that_the_documentation_names_are_there() -> None:
    assert {"rtx-4090", "rtx-3090", "a6000", "cpu-nvme4", "cpu-sata"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_profile_that_says_where_each_number_comes_from(name: str) -> None:
    profile = find_hardware(name)
    assert profile.name == name
    assert profile.source == "preset"
    numbers = {
        field.name
        for field in dataclasses.fields(HardwareProfile)
        if isinstance(getattr(profile, field.name), (int, float, tuple))
        or dataclasses.is_dataclass(getattr(profile, field.name))
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
