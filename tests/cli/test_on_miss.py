"""``moepack plan --on-miss low``: from the plan to what a run and an evaluation say."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepack.checkpoint import Checkpoint
from moepack.damage import LayerDamage, MissDamage, MissTrial
from moepack.errors import MoepackError
from moepack.plan import OnMiss, load_plan
from tests.cli.conftest import Moepack
from tests.support.damages import damage_profile

PLAN = ("--vram", "4M", "--context", "256", "--prompt", "64", "--new", "64")


@pytest.mark.usefixtures("measured")
def test_a_plan_with_low_copies_is_packed_run_and_scored(
    moepack: Moepack, model: Path, tmp_path: Path
) -> None:
    exact = moepack("plan", model, *PLAN, "--json").document
    assert "low_copies" not in exact
    made = moepack("plan", model, *PLAN, "--on-miss", "low", "--miss-thresholds", "0.4,0.7")
    assert made.code == 0, made.err
    rows = " ".join(made.out.split())
    assert "misses exact up to 0.4 of a token's weights, up to 0.7 low copies in INT4_G32" in rows
    plan = moepack(
        "plan", model, *PLAN, "--on-miss", "low:int8", "--miss-thresholds", "0.4,0.7", "--json"
    ).document
    assert plan["low_copies"] == "INT8"
    assert plan["on_miss"] == {"exact_up_to": 0.4, "low_up_to": 0.7}
    assert plan["fast_used_bytes"] <= plan["fast_budget_bytes"]
    link_bytes = [each["prediction"]["link_bytes_per_token"] for each in (plan, exact)]
    assert link_bytes[0] < link_bytes[1]
    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    assert moepack("verify").code == 0
    ran = moepack("run", "Some text", "--max-new-tokens", "12", "--json").document
    assert ran["substituted_per_token"] > 0
    assert 0 < ran["skipped_rate"] < 1
    shown = moepack("run", "Some text", "--max-new-tokens", "12", "--stats")
    assert "experts a token by low copies" in shown.out + shown.err
    text = tmp_path / "text.txt"
    text.write_text("a text of few words, and a few more")
    scored = moepack("eval", "--text", text, "--json").document
    assert scored["decoded"]
    assert scored["kl"] > 0


def test_a_pack_without_low_copies_refuses_plans_that_want_them(
    packed: Path, model: Path, moepack: Moepack
) -> None:
    kept = moepack("plan", model, *PLAN, "--keep-layout", "--on-miss", "low")
    assert kept.code == 1
    assert "the pack whose layout is kept has low copies in no encoding" in kept.err
    assert moepack("plan", model, *PLAN, "--on-miss", "low").code == 0
    refused = moepack("run", "Some text", "--max-new-tokens", "2")
    assert refused.code == 1
    assert "low copies in INT4_G32, the folder has none; pack again" in refused.err
    assert packed.exists()
    assert moepack("pack").code == 0
    assert moepack("run", "Some text", "--max-new-tokens", "2").code == 0
    again = moepack("plan", model, *PLAN, "--keep-layout", "--on-miss", "low", "--json")
    assert again.document["on_miss"] == {"exact_up_to": 0.6, "low_up_to": 0.9}
    exact = moepack("plan", model, *PLAN, "--keep-layout", "--json").document
    assert exact["low_copies"] == "INT4_G32"
    assert "on_miss" not in exact
    ran = moepack("run", "Some text", "--max-new-tokens", "4", "--json").document
    assert "substituted_rate" not in ran


def test_thresholds_are_those_that_the_profile_has_fitted(
    packed: Path, measured: Path, model: Path, moepack: Moepack
) -> None:
    assert packed.exists()
    spec = Checkpoint.open(model, headers_only=True).spec
    errors = ((1e-4,) * 16, (1e-3,) * 16)
    layers = tuple(
        LayerDamage(number, ("INT8", "INT4_G32"), errors, 0.1, 1e-3, 1e-2)
        for number in spec.moe_layers
    )
    trials = (MissTrial(0.2, 0.95, 0.5, 1e-4), MissTrial(0.6, 0.9, 0.3, 1e-4))
    (folder,) = measured.glob("models/*")
    damage_profile(
        spec,
        layers,
        fine_divergence=1e-3,
        coarse_divergence=1e-2,
        misses=MissDamage("INT4_G32", trials),
    ).save(folder)
    fitted = moepack("plan", model, *PLAN, "--on-miss", "low", "--json").document
    assert fitted["on_miss"] == {"exact_up_to": 0.2, "low_up_to": 0.95}
    other = moepack("plan", model, *PLAN, "--on-miss", "low:int8", "--json").document
    assert other["on_miss"] == {"exact_up_to": 0.6, "low_up_to": 0.9}
    told = ("--miss-thresholds", "0.4,0.7")
    asked = moepack("plan", model, *PLAN, "--on-miss", "low", *told, "--json").document
    assert asked["on_miss"] == {"exact_up_to": 0.4, "low_up_to": 0.7}
    shown = moepack("plan", model, *PLAN, "--on-miss", "low", "--miss-thresholds", "0.5,1").out
    words = "exact up to 0.5 of a token's weights, low copies in INT4_G32 beyond"
    assert words in " ".join(shown.split())


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--on-miss", "high"), "expected low, or low:INT4_G32 and the like"),
        (("--on-miss", "low:"), "expected low, or low:INT4_G32 and the like"),
        (("--on-miss", "low:INT3"), "'INT3' is not an encoding of experts"),
        (("--on-miss", "low:F32"), "choose an encoding of fewer bits"),
        (("--on-miss", "low", "--quality", "int4"), "choose an encoding of fewer bits"),
        (("--on-miss", "low:INT4_G64"), "the width of experts is 96"),
        (("--miss-thresholds", "0.5,0.8"), "belongs to --on-miss"),
        (("--on-miss", "low", "--miss-thresholds", "0.8,0.5"), "0 <= T1 <= T2 <= 1"),
        (("--on-miss", "low", "--miss-thresholds", "0.8"), "expected two numbers T1,T2"),
        (("--on-miss", "low", "--miss-thresholds", "nan,1"), "0 <= T1 <= T2 <= 1"),
    ],
)
def test_what_cannot_be_planned_is_named(
    moepack: Moepack, model: Path, options: tuple[str, ...], message: str
) -> None:
    refused = moepack("plan", model, *PLAN, *options)
    assert refused.code in (1, 2)
    assert message in " ".join(refused.err.replace("│", " ").split())
    assert "Traceback" not in refused.err


def test_the_thresholds_of_a_plan_are_read_again(
    packed: Path, measured: Path, model: Path, moepack: Moepack
) -> None:
    assert packed.exists()
    assert moepack("plan", model, *PLAN, "--on-miss", "low").code == 0
    (path,) = measured.glob("models/*/plan.json")
    assert load_plan(path).placement.on_miss == OnMiss()
    path.write_text(path.read_text().replace('"low_up_to": 0.9', '"low_up_to": 0.3'))
    with pytest.raises(MoepackError, match="expected 0 <= T1 <= T2 <= 1"):
        load_plan(path)
