"""The benchmark of policies runs, and compares like with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.policies import main
from tests.conftest import TinyFolder


def test_policies_are_measured_at_one_budget(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder("qwen3_moe", "plain")
    short = ("--prompt", "12", "--new", "6", "--rounds", "2", "--calibration", "300")
    where = ("--model", str(model), "--scratch", str(tmp_path))
    assert main([*where, *short, "--cached", "0.2", "0.5", "--link", "1G,10us", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["options"]["link"] == pytest.approx([1 << 30, 1e-5])
    smaller, larger = document["budgets"]
    assert smaller["fast_budget_bytes"] < larger["fast_budget_bytes"]
    for budget in (smaller, larger):
        rows = {row["name"]: row for row in budget["contenders"]}
        assert list(rows) == ["on_demand", "lru", "lfu", "lcp", "pooled"]
        assert rows["on_demand"]["hit_rate"] == 0
        assert rows["on_demand"]["speedup"] == 1
        # All draw the same tokens, so whoever hits more fetches less.
        ranking = sorted(rows.values(), key=lambda row: row["hit_rate"])
        fetched = [row["link_bytes_per_token"] for row in ranking]
        assert fetched == sorted(fetched, reverse=True)
    assert list(tmp_path.iterdir()) == [], "the packs are gone"


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.startswith("ModelNotFoundError: ")
