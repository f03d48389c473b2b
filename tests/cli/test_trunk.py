"""``moepack plan --trunk int8``, and every command after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moepack.compute import load_compute
from moepack.roofline import derive_compute
from moepack.workspace import Workspace
from tests.cli.conftest import Moepack
from tests.cli.test_commands import no_nulls

BUDGET = ("--vram", "4M", "--context", "256", "--prompt", "64", "--new", "64")


def test_every_command_works_on_a_rounded_trunk(
    measured: Path, model: Path, texts: list[Path], moepack: Moepack, tmp_path: Path
) -> None:
    exact = moepack("plan", model, *BUDGET, "--json").document
    assert "trunk" not in exact
    plan = moepack("plan", model, *BUDGET, "--trunk", "int8", "--json").document
    assert plan["trunk"] == "int8"
    assert plan["quality"] == "exact", "of the experts"
    assert no_nulls(plan)
    assert plan["layout_digest"] != exact["layout_digest"]
    freed_bytes = exact["memory"]["trunk_bytes"] - plan["memory"]["trunk_bytes"]
    assert freed_bytes > 0.5 * exact["memory"]["trunk_bytes"]
    taken_bytes = plan["memory"]["workspace_bytes"] - exact["memory"]["workspace_bytes"]
    more_bytes = plan["memory"]["slots_bytes"] + plan["memory"]["staging_bytes"]
    more_bytes -= exact["memory"]["slots_bytes"] + exact["memory"]["staging_bytes"]
    spare_bytes = exact["fast_budget_bytes"] - exact["fast_used_bytes"]
    assert more_bytes <= freed_bytes - taken_bytes + spare_bytes

    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    folder = Path(done.document["folder"])
    assert moepack("verify", "--json").document["damages"] == []
    inspected = moepack("inspect", folder, "--json").document
    assert inspected["trunk"] == "int8"
    assert inspected["trunk_bytes"] < inspected["model"]["trunk_bytes"] / 2
    assert "int8" in moepack("inspect", folder).out

    run = moepack("run", "abc", "--max-new-tokens", "6", "--json")
    assert run.code == 0, run.err
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--json")
    assert bench.code == 0, bench.err
    for document in (run.document, bench.document):
        assert document["peak_fast_bytes"] <= plan["fast_used_bytes"] <= 4 * 2**20
    replayed = moepack("replay", "--json").document["strategies"]
    assert replayed["plan"]["tpot_s"] == pytest.approx(plan["prediction"]["tpot_s"])
    text = tmp_path / "text.txt"
    text.write_text("It was said, and it was said again, that a text has to be long enough. " * 12)
    scored = moepack("eval", "--text", text, "--json")
    assert scored.code == 0, scored.err
    assert scored.document["trunk"] == "int8"
    assert 1e-7 < scored.document["kl"] < 0.1

    kept = moepack("plan", *BUDGET, "--keep-layout", "--json").document
    assert (kept["layout_digest"], kept["trunk"]) == (plan["layout_digest"], "int8")
    refused = moepack("plan", *BUDGET, "--keep-layout", "--trunk", "exact")
    assert refused.code == 2
    assert "the trunk of the pack whose layout is kept is int8" in refused.err


def test_eval_runs_the_exact_head_beside_a_rounded_one(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    """What the exact model makes of a text does not depend on what it is compared with."""
    text = tmp_path / "text.txt"
    text.write_text("It was said, and it was said again, that a text has to be long enough. " * 6)
    found = {}
    for trunk in ("exact", "int8"):
        assert moepack("plan", model, *BUDGET, "--trunk", trunk).code == 0
        assert moepack("pack").code == 0
        found[trunk] = moepack("eval", "--text", text, "--json").document
    assert found["int8"]["exact_perplexity"] == found["exact"]["exact_perplexity"]
    assert found["exact"]["kl"] == pytest.approx(0, abs=1e-9)
    assert found["int8"]["perplexity"] != found["exact"]["perplexity"]


def test_people_are_told_that_the_trunk_is_rounded(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    shown = moepack("plan", model, *BUDGET, "--trunk", "int8", "--sweep", "4M:5M", "--html", page)
    assert shown.code == 0, shown.err
    assert shown.out.count("int8: rounded, but for routers, norms") == 2, "the plan, and the sweep"
    assert "int8: rounded, but for routers, norms" in page.read_text()
    plain = moepack("plan", model, *BUDGET)
    assert "rounded" not in plain.out


@pytest.mark.parametrize("name", ["int4", "INT8", ""])
def test_another_trunk_is_refused_naming_those_that_exist(
    measured: Path, model: Path, moepack: Moepack, name: str
) -> None:
    refused = moepack("plan", model, *BUDGET, "--trunk", name)
    assert refused.code == 2
    assert "expected exact or int8" in refused.err


def test_a_profile_of_before_asks_for_another(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    """It plans an exact trunk as ever, and has no times of a rounded one."""
    from moepack.checkpoint import Checkpoint
    from moepack.hardware import load_hardware

    assert moepack("plan", model, *BUDGET).code == 0
    folder = Workspace.locate().current()
    assert folder is not None
    hardware = load_hardware(measured / "hardware.yaml")
    found = derive_compute(Checkpoint.open(model).spec, hardware)
    layers = tuple(dataclasses.replace(entry, rounded=None) for entry in found.layers)
    dataclasses.replace(found, layers=layers, rounded_head_s=None).save(folder.compute_path)
    assert "rounded" not in folder.compute_path.read_text()
    assert load_compute(folder.compute_path).rounded_head_s is None
    assert moepack("plan", *BUDGET).code == 0
    refused = moepack("plan", *BUDGET, "--trunk", "int8")
    assert refused.code == 1
    last = refused.err.splitlines()[-1]
    assert last.startswith("ProfileError: ")
    assert last.endswith("run moepack profile")


def test_the_prediction_counts_the_trunk(profiled: Path, model: Path, moepack: Moepack) -> None:
    def predicted(*options: str) -> dict[str, float]:
        done = moepack("plan", *BUDGET, *options, "--out", profiled / "p", "--json")
        assert done.code == 0, done.err
        found = done.document["predicted_quality"]
        assert isinstance(found, dict)
        return found

    alone = predicted("--trunk", "int8")
    assert alone["divergence"] == alone["trunk_divergence"] > 0
    experts, both = (
        predicted("--quality", "int8"),
        predicted("--quality", "int8", "--trunk", "int8"),
    )
    assert both["divergence"] >= max(experts["divergence"], alone["divergence"])
    assert both["perplexity_ratio"] >= experts["perplexity_ratio"]
    assert "trunk_divergence" not in experts


def test_a_bound_on_perplexity_holds_for_experts_and_trunk(
    profiled: Path,
    model: Path,
    moepack: Moepack,
) -> None:
    options = ("--quality", "3%", "--trunk", "int8", "--out", profiled / "p", "--json")
    bounded = moepack("plan", *BUDGET, *options)
    assert bounded.code == 0, bounded.err
    assert 1 < bounded.document["predicted_quality"]["perplexity_ratio"] <= 1.03
    folder = Workspace.locate().current()
    assert folder is not None
    from moepack.damage import load_damage

    damage = load_damage(folder.folder)
    dataclasses.replace(damage, trunk_divergence=None).save(folder.folder)
    refused = moepack("plan", *BUDGET, *options)
    assert refused.code == 1
    last = refused.err.splitlines()[-1]
    assert last.startswith("ProfileError: what rounding the trunk of")
    assert "3% cannot be kept" in last
    shown = moepack("plan", *BUDGET, "--trunk", "int8", "--out", profiled / "p")
    assert "what that does is not in the prediction" in " ".join(shown.out.split())
    large = damage.floor + 0.5
    dataclasses.replace(damage, trunk_divergence=large).save(folder.folder)
    refused = moepack("plan", *BUDGET, *options)
    assert refused.err.splitlines()[-1].startswith("PlanError: perplexity may grow by 3%")
