"""``moepack replay`` on a small random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepack import records
from moepack.paper.table import Column, PaperTable, Row
from moepack.replayed_strategies import STRATEGIES
from tests.cli.conftest import Moepack

CONDITIONS = ("--context", "256", "--link", "20M,1ms")


def test_every_strategy_and_the_plan_are_replayed_as_the_plan_was(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    planned = moepack("plan", model, "--vram", "4M", *CONDITIONS, "--json")
    assert planned.code == 0, planned.err
    replayed = moepack("replay", "--json")
    assert replayed.code == 0, replayed.err
    document = replayed.document
    assert document["fast_budget_bytes"] == 4 << 20
    assert document["context"] == 256
    assert set(document["strategies"]) == {*STRATEGIES, "plan"}
    plan = document["strategies"]["plan"]
    prediction = planned.document["prediction"]
    parts = ("demand_bytes", "ahead_used_bytes", "ahead_wasted_bytes")
    assert sum(plan[part] for part in parts) == pytest.approx(prediction["link_bytes_per_token"])
    for name in ("ttft_s", "tpot_s", "hit_rate", "ready_rate"):
        assert plan[name] == pytest.approx(prediction[name])
    for name, baseline in planned.document["baselines"].items():
        found = document["strategies"][name]
        assert found["eligible"] == baseline["eligible"]
        assert found["why_not"] == baseline["why_not"]
        for figure in ("ttft_s", "tpot_s", "hit_rate") if baseline["eligible"] else ():
            assert found[figure] == pytest.approx(baseline[figure]), (name, figure)
        assert found["events"] > 0


def test_strategies_are_chosen_by_name_for_any_machine(
    home: Path, model: Path, moepack: Moepack
) -> None:
    asked = ("replay", model, "--hardware", "rtx-4090", "--vram", "4M", "--context", "256")
    names = ("--policy", "lcp_prefetch", "--policy", "lru")
    there = moepack(*asked, *names, "--json")
    assert there.code == 0, there.err
    found = there.document["strategies"]
    assert list(found) == ["lcp_prefetch", "lru"]
    assert found["lcp_prefetch"]["eligible"]
    here = moepack(*asked, "--policy", "pregated", "--part", "select")
    assert here.code == 0, here.err
    assert "not to be run: pregated: the model would have to be trained for it" in here.out
    assert "its select part" in here.out


def test_what_cannot_be_replayed_is_refused_by_name(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    unknown = moepack("replay", model, "--policy", "fifo", "--vram", "4M")
    assert unknown.code == 2
    assert "fifo is none of on_demand, lru" in unknown.err
    without = moepack("replay", model)
    assert without.code == 1
    assert "say how much fast memory there is with --vram" in without.err
    small = moepack("replay", model, "--vram", "1K")
    assert small.code == 1
    assert small.err.startswith("BudgetTooSmallError: ")


def test_the_papers_settings_take_no_other_condition(
    home: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = PaperTable("Speed", (Column("here", "ms"),), (Row("lru", (0.0125,)),), ("a note",))
    monkeypatch.setattr("moepack.paper.figures.paper_tables", lambda _: iter([table]))
    shown = moepack("replay", "--paper")
    assert shown.code == 0, shown.err
    assert "lru      12.5" in shown.out
    assert moepack("replay", "--paper", "--json").document["tables"] == [records.to_data(table)]
    assert moepack("replay", "default", "--paper").code == 2
    assert moepack("replay", "--paper", "--prompt", "64").code == 2
    assert moepack("replay", "--recording", "trace.npz").code == 2
