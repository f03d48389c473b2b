"""``moepack plan --bits`` and ``--quality PCT%``, and every command after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Moepack
from tests.cli.test_commands import no_nulls

BUDGET = ("--vram", "4M", "--context", "256", "--prompt", "64", "--new", "64")


def test_every_command_works_on_experts_of_several_precisions(
    profiled: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    plan = moepack("plan", model, *BUDGET, "--bits", "6", "--json").document
    assert plan["quality"] == "mixed"
    assert 5 < plan["mean_bits"] <= 6
    assert no_nulls(plan)
    found = plan["predicted_quality"]
    assert found["mean_bits"] == pytest.approx(plan["mean_bits"])
    assert 0 < found["divergence"] <= found["at_random_divergence"]
    assert [each["encoding"] for each in found["uniform"]] == ["INT4_G32", "INT8", "F32"]
    mixed = [layer for layer in plan["layers"] if "class_slots" in layer]
    assert mixed
    for layer in mixed:
        experts, slots = layer["experts_by_encoding"], layer["class_slots"]
        assert experts.keys() == slots.keys()
        assert all(0 <= slots[name] <= count for name, count in experts.items())
        assert sum(slots.values()) == layer["cached_tops"] + layer["cached_bottoms"]

    replayed = moepack("replay", "--json").document["strategies"]
    assert replayed["plan"]["tpot_s"] == pytest.approx(plan["prediction"]["tpot_s"])
    for name in ("on_demand", "lru"):  # in the same precision
        expected = plan["baselines"][name]["link_bytes_per_token"]
        assert replayed[name]["demand_bytes"] == pytest.approx(expected)
    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    assert moepack("verify", "--json").document["damages"] == []
    run = moepack("run", "abc", "--max-new-tokens", "6", "--json")
    assert run.code == 0, run.err
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--json")
    assert bench.code == 0, bench.err
    for document in (run.document, bench.document):
        assert document["peak_fast_bytes"] <= plan["fast_used_bytes"] <= 4 * 2**20
    text = tmp_path / "text.txt"
    text.write_text("It was said, and it was said again, that a text has to be long enough. " * 12)
    scored = moepack("eval", "--text", text, "--json")
    assert scored.code == 0, scored.err
    assert len(scored.document["encodings"]) > 1
    assert 0 < scored.document["kl"] < 1

    kept = moepack("plan", *BUDGET, "--vram", "4300K", "--keep-layout", "--json").document
    assert kept["layout_digest"] == plan["layout_digest"]
    assert kept["predicted_quality"] == found
    assert moepack("run", "abc", "--max-new-tokens", "2").code == 0


def test_people_see_who_is_stored_in_what_and_what_that_will_do(
    profiled: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    shown = moepack("plan", model, *BUDGET, "--bits", "6", "--explain", "--html", page)
    assert shown.code == 0, shown.err
    words = " ".join(shown.out.split())
    assert "experts mixed, 5.9" in words
    assert "predicted perplexity +" in words
    assert "if as many bytes went to any experts" in words
    assert "uniform INT4_G32 5 bits, perplexity +" in words
    assert "slots of experts in INT8 INT4_G32" in words
    assert "what limits" in words or "link" in words
    assert page.stat().st_size > 10_000
    swept = moepack("plan", model, "--context", "256", "--bits", "6", "--sweep", "4M:4M")
    assert swept.code == 0, swept.err
    alike = " ".join(moepack("plan", model, *BUDGET, "--quality", "int4").out.split())
    assert "predicted perplexity +" in alike
    assert "any experts" not in alike


def test_a_bound_on_perplexity_takes_as_few_bits_as_it_allows(
    profiled: Path, model: Path, moepack: Moepack
) -> None:
    """The looser the fewer, and never more growth than was allowed."""
    out = ("--out", profiled / "p", "--json")
    loose = moepack("plan", model, *BUDGET, "--quality", "50%", *out).document
    growth = 100 * (loose["predicted_quality"]["uniform"][0]["perplexity_ratio"] - 1)
    bits = []
    for percent in (growth / 4, growth / 2, growth * 1.01):
        plan = moepack("plan", model, *BUDGET, "--quality", f"{percent}%", *out).document
        predicted = plan["predicted_quality"]
        assert predicted["perplexity_ratio"] - 1 <= percent / 100 * (1 + 1e-9)
        bits.append(plan["mean_bits"])
    assert bits == sorted(bits, reverse=True)
    assert len({*bits}) == 3
    assert bits[-1] == loose["mean_bits"] == pytest.approx(5.0)
    nothing = moepack("plan", model, *BUDGET, "--quality", "0%", *out)
    assert "within 0% no expert can be rounded: the plan is of the exact model" in nothing.err
    assert nothing.document["quality"] == "exact"
    assert "predicted_quality" not in nothing.document


def test_what_was_measured_of_other_rounding_bounds_nothing(
    profiled: Path, model: Path, moepack: Moepack
) -> None:
    out = ("--out", profiled / "p", "--no-calibration")
    refused = moepack("plan", model, *BUDGET, "--quality", "50%", *out)
    assert refused.code == 2
    words = " ".join(refused.err.replace("│", " ").split())
    assert "a bound of 50% holds for experts that are rounded as they were" in words
    shown = moepack("plan", model, *BUDGET, "--bits", "6", *out)
    assert "rounded by another calibration than these" in " ".join(shown.out.split())
    plan = moepack("plan", model, *BUDGET, "--bits", "6", *out, "--json").document
    assert plan["predicted_quality"]["as_measured"] is False
    alike = ("--out", profiled / "q", "--json")
    plan = moepack("plan", model, *BUDGET, "--bits", "6", *alike).document
    assert plan["predicted_quality"]["as_measured"] is True


def test_without_damage_measured_it_says_how_to_measure_it(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    for option in (("--bits", "6"), ("--quality", "1%")):
        refused = moepack("plan", model, *BUDGET, *option)
        assert refused.code == 1
        assert refused.err.startswith("ProfileError: what rounding does to the experts of")
        assert "run moepack profile --bits" in refused.err


def test_fewer_bits_than_any_encoding_has_are_refused_naming_the_fewest(
    profiled: Path, model: Path, moepack: Moepack
) -> None:
    refused = moepack("plan", model, *BUDGET, "--bits", "4.5")
    assert refused.code == 1
    assert "4.5 bits for each expert weight are too few" in refused.err
    assert "ask for 5 or more" in refused.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bits", "3.9"), "expected a number from 4 to 16"),
        (("--bits", "16.5"), "expected a number from 4 to 16"),
        (("--bits", "nan"), "expected a number from 4 to 16"),
        (("--bits", "many"), "expected a number from 4 to 16"),
        (("--quality", "0.5"), "a bound on the growth of perplexity as in 0.5%"),
        (("--quality", "-1%"), "a bound on the growth of perplexity as in 0.5%"),
        (("--quality", "inf%"), "a bound on the growth of perplexity as in 0.5%"),
        (("--quality", "1%%"), "a bound on the growth of perplexity as in 0.5%"),
        (("--bits", "6", "--quality", "int8"), "leave out --bits or --quality"),
        (("--bits", "6", "--quality", "1%"), "leave out --bits or --quality"),
        (("--bits", "6", "--on-miss", "low"), "leave out --on-miss"),
        (("--quality", "1%", "--on-miss", "low"), "leave out --on-miss"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    measured: Path, model: Path, moepack: Moepack, options: tuple[str, ...], said: str
) -> None:
    refused = moepack("plan", model, *BUDGET, *options)
    assert refused.code == 2
    assert said in " ".join(refused.err.split())
    assert "Value error" not in refused.err


def test_the_precision_of_a_pack_that_is_kept_is_not_chosen_again(
    packed: Path, moepack: Moepack
) -> None:
    for options in (("--bits", "6"), ("--quality", "1%")):
        refused = moepack("plan", *BUDGET, "--keep-layout", *options)
        assert refused.code == 2
        assert "the pack whose layout is kept has its precision" in refused.err


def test_a_plan_that_replaces_what_is_missing_is_not_called_exact(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    shown = moepack("plan", model, *BUDGET, "--on-miss", "low")
    assert shown.code == 0, shown.err
    words = " ".join(shown.out.split())
    assert "experts 32 bits a weight, of missing ones fewer or none" in words
    assert "experts exact" not in words
    assert "experts exact, 32 bits a weight" in " ".join(
        moepack("plan", model, *BUDGET).out.split()
    )
