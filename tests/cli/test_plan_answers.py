"""``moepack plan --explain``, ``--sweep`` and ``--html``, on a small random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Moepack

OPTIONS = ("--context", "256", "--link", "20M,1ms")


def test_an_explanation_comes_with_the_plan(measured: Path, model: Path, moepack: Moepack) -> None:
    answer = moepack("plan", model, "--vram", "4M", *OPTIONS, "--explain", "--json")
    assert answer.code == 0, answer.err
    found = answer.document["explanation"]
    token = found["token"]
    assert token["tpot_s"] == pytest.approx(answer.document["prediction"]["tpot_s"])
    assert token["compute_s"] + token["wait_s"] == pytest.approx(token["tpot_s"])
    assert {finding["about"] for finding in found["findings"]} >= {"link", "compute", "capacity"}
    assert {row["change"] for row in found["what_if"]} == {"memory", "link", "compute"}
    shown = moepack("plan", model, "--vram", "4M", *OPTIONS, "--explain")
    assert "of a token; of the changes below" in shown.out
    assert "link 2x: " in shown.out
    assert moepack("pack").code == 0


def test_a_budget_far_beyond_the_model_holds_all_of_it(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    answer = moepack("plan", model, "--vram", "1000T", *OPTIONS, "--json")
    assert answer.code == 0, answer.err
    assert answer.document["fast_budget_bytes"] == 1000 << 40
    assert answer.document["fast_used_bytes"] < 64 << 20
    assert answer.document["prediction"]["hit_rate"] == 1.0


def test_a_sweep_tells_every_budget_and_leaves_the_workspace_alone(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    answer = moepack("plan", model, "--sweep", "4M:8M", *OPTIONS, "--json")
    assert answer.code == 0, answer.err
    assert answer.document["model"] == model.name
    points = answer.document["sweep"]
    budgets = [point["budget_bytes"] for point in points]
    assert budgets == sorted(budgets)
    assert (budgets[0], budgets[-1]) == (4 << 20, 8 << 20)
    assert 6 << 20 in budgets
    for point in points:
        assert point.keys() == {
            "budget_bytes",
            "fast_used_bytes",
            "ttft_s",
            "tpot_s",
            "hit_rate",
            "chosen",
            "baselines",
        }
        assert point["fast_used_bytes"] <= point["budget_bytes"]
        assert point["baselines"].keys() >= {"on_demand", "lru", "belady", "resident"}
    assert points[-1]["tpot_s"] < points[0]["tpot_s"]
    assert moepack("pack", model).err.startswith("WorkspaceError: ")


def test_a_plan_beside_a_sweep_is_marked_and_becomes_current(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    page = tmp_path / "new" / "page.html"
    answer = moepack("plan", model, "--sweep", "4M:8M", "--vram", "5M", *OPTIONS, "--html", page)
    assert answer.code == 0, answer.err
    assert "◆ the plan for 5M" in answer.out
    assert "time per token over the budget of fast memory" in answer.out
    assert f"page written to {page}" in answer.err
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "The plan for 5M" in text
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]
    assert moepack("pack").code == 0


def test_a_page_of_one_plan_needs_no_sweep(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    answer = moepack("plan", model, "--vram", "4M", *OPTIONS, "--html", page, "--json")
    assert answer.code == 0, answer.err
    assert "explanation" in answer.document
    assert "The plan for 4M" in page.read_text("utf-8")


def test_a_page_that_cannot_be_written_is_a_named_error(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    answer = moepack("plan", model, "--vram", "64M", "--html", tmp_path / "file" / "page.html")
    assert answer.code == 1
    assert "OutputError: " in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--sweep", "4G"),
        ("--sweep", "24G:4G"),
        ("--sweep", "0:4G"),
        ("--sweep", "4G:lots"),
        ("--sweep", "4G:8G", "--out", "plan.json"),
    ],
)
def test_what_cannot_be_asked_for_is_wrong_usage(
    measured: Path, model: Path, moepack: Moepack, arguments: tuple[str, ...]
) -> None:
    assert moepack("plan", model, *arguments).code == 2
