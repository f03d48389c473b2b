"""The benchmarks of strategies and of the link run, and compare like with like."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import link, policies, scale
from benchmarks.link_pace import open_disk_pace
from benchmarks.policies import STRATEGIES
from moepack.cli.models import open_source
from moepack.hardware import load_hardware
from moepack.roofline import derive_compute
from moepack.routing_presets import find_routing
from moepack.workspace import Workspace

SHORT = ("--context", "128", "--prompt", "24", "--new", "8", "--rounds", "1")


@pytest.fixture
def profiled(measured: Path, model: Path, texts: list[Path]) -> Path:
    """A workspace in which the model counts as profiled: derived and drawn, not measured."""
    workspace = Workspace.locate()
    source = open_source(workspace, str(model), headers_only=False)
    folder = workspace.remember(source.record)
    hardware = load_hardware(workspace.hardware_path)
    derive_compute(source.spec, hardware).save(folder.compute_path)
    find_routing("olmoe-1b-7b", source.spec).save(folder.folder)
    assert texts
    return model


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(document, dict)
    return document


def test_strategies_are_raced_at_one_budget(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", str(profiled), "--scratch", str(tmp_path))
    assert policies.main([*where, *SHORT, "--vram", "5M", "--link", "none", "--window", "0.5"]) == 0
    disk, throttled = last_line(capsys)["cells"]
    assert disk["link"] is None
    assert throttled["window"] == pytest.approx(0.5)
    for cell in (disk, throttled):
        lines = {line["name"]: line for line in cell["lines"]}
        assert list(lines) == ["plan", *STRATEGIES]
        assert lines["plan"]["plan_speed"] == [1, 1, 1]
        assert lines["on_demand"]["hit_rate"] == lines["prefetch_only"]["hit_rate"] == 0
        assert lines["lru"]["used_bytes"] == lines["lru"]["wasted_bytes"] == 0
        # Both keep nothing; what is fetched ahead need not be demanded.
        assert lines["prefetch_only"]["demand_bytes"] < lines["on_demand"]["demand_bytes"]
        for line in lines.values():
            assert line["replayed_tpot_s"] > 0
            # One disk for all of them; a throttle is as fast as ever.
            assert line["disk_slowness"] == lines["plan"]["disk_slowness"] > 0
    assert all(line["disk_slowness"] == 1.0 for line in throttled["lines"])
    assert not list(tmp_path.glob("policies.*")), "the packs are gone"


def test_the_link_is_compared_with_its_rate(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", str(profiled), "--scratch", str(tmp_path))
    assert link.main([*where, *SHORT, "--share", "0.9", "0.95", "--link", "100M,20us"]) == 0
    smaller, larger = last_line(capsys)["lines"]
    assert smaller["fast_budget_bytes"] < larger["fast_budget_bytes"]
    for line in (smaller, larger):
        assert 0 < line["efficiency"] <= 1.05, "a throttled link gives no more than its rate"
        assert line["used_of_link"] <= line["efficiency"] * 1.05
        assert line["over_replay"] > 0
        assert line["over_replay_now"] > 0
        assert line["used_of_link_now"] == line["used_of_link"], "a throttle is as fast as ever"


def test_a_disk_is_as_slow_as_it_takes_longer_than_profiled(packed: Path) -> None:
    hardware = load_hardware(Workspace.locate().hardware_path)
    points = tuple(
        dataclasses.replace(point, bytes_per_s=point.bytes_per_s * 50)
        for point in hardware.disk.points
    )
    faster = dataclasses.replace(hardware, disk=dataclasses.replace(hardware.disk, points=points))
    with (
        open_disk_pace(packed, hardware, None) as disk,
        open_disk_pace(packed, faster, None) as other,
    ):
        assert disk is not None
        assert other is not None
        assert other.slowness() > 5 * disk.slowness() > 0
    with open_disk_pace(packed, hardware, (1e9, 0.0)) as throttled:
        assert throttled is None


@pytest.mark.parametrize(
    ("benchmark", "option", "given", "expected"),
    [
        (policies, "--new", "1", "2 or more, since times are taken between tokens"),
        (link, "--new", "1", "2 or more, since times are taken between tokens"),
        (scale, "--new", "0", "2 or more, since times are taken between tokens"),
        (link, "--rounds", "0", "1 or more"),
        (policies, "--prompt", "many", "a whole number, 1 or more"),
        (link, "--share", "0", "a number above 0"),
        (policies, "--window", "nan", "a number above 0"),
    ],
)
def test_what_makes_no_measurement_is_refused_before_anything_runs(
    benchmark: ModuleType,
    option: str,
    given: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main([option, given])
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message
    assert given in message
    assert message.endswith(f"expected {expected}")


def test_a_strategy_that_there_is_not_is_named(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", str(profiled), "--scratch", str(tmp_path))
    assert policies.main([*where, *SHORT, "--vram", "5M", "--strategies", "lru", "mru"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("PlanError: --strategies mru: ")
    assert "lru_prefetch" in message


def test_an_error_is_one_line(
    measured: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert policies.main(["--model", str(model), "--vram", "4M"]) == 1
    assert capsys.readouterr().err.startswith("WorkspaceError: ")
