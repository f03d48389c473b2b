"""``moepack plan --quality``, and every command after it on a plan whose experts are rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Moepack
from tests.cli.test_commands import no_nulls

#: Experts of 3 x 96 x 64 weights, in float32: with scales, without padding.
CASES = [("int8", "INT8", 8.2), ("int4", "INT4_G32", 5.0)]

BUDGET = ("--vram", "4M", "--context", "256")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was said, and it was said again, that a text has to be long enough. " * 12)
    return path


@pytest.mark.parametrize(("quality", "encoding", "bits"), CASES)
def test_every_command_works_on_rounded_experts(
    measured: Path,
    model: Path,
    texts: list[Path],
    text: Path,
    moepack: Moepack,
    quality: str,
    encoding: str,
    bits: float,
) -> None:
    plan = moepack("plan", model, *BUDGET, "--quality", quality, "--json").document
    assert plan["quality"] == quality
    assert plan["mean_bits"] == pytest.approx(bits, abs=0.1)
    assert {layer["encoding"] for layer in plan["layers"]} == {encoding}
    assert plan["baselines"]["resident"].keys() >= {"ttft_s", "tpot_s", "eligible"}
    assert no_nulls(plan)

    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    folder = Path(done.document["folder"])
    assert moepack("verify", "--json").document["damages"] == []
    shards = moepack("inspect", folder, "--json").document["layers"]
    assert {layer["encoding"] for layer in shards} == {encoding}
    packed_bytes = sum(path.stat().st_size for path in (folder / "experts").iterdir())
    slow_bytes = plan["prediction"]["slow_bytes"]
    assert slow_bytes <= packed_bytes <= 1.1 * slow_bytes, "but for the shards' headers"

    run = moepack("run", "abc", "--max-new-tokens", "6", "--json")
    assert run.code == 0, run.err
    assert len(run.document["tokens"]) == 6
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--json")
    assert bench.code == 0, bench.err
    for document in (run.document, bench.document):
        # What runs takes what was planned, to the byte.
        assert document["peak_fast_bytes"] <= plan["fast_used_bytes"] <= 4 * 2**20
        assert document["prediction"]["slow_bytes"] == slow_bytes
    found = moepack("eval", "--text", text, "--json")
    assert found.code == 0, found.err
    assert set(found.document["encodings"]) == {encoding}
    assert 0 < found.document["kl"] < 1

    kept = moepack("plan", "--vram", "5M", "--context", "256", "--keep-layout", "--json").document
    assert (kept["quality"], kept["mean_bits"]) == (quality, plan["mean_bits"])
    assert kept["layout_digest"] == plan["layout_digest"]
    assert moepack("run", "abc", "--max-new-tokens", "2").code == 0


def test_the_link_carries_the_fewer_bytes(measured: Path, model: Path, moepack: Moepack) -> None:
    found: dict[str, dict[str, Any]] = {
        quality: moepack(
            "plan", model, *BUDGET, "--quality", quality, "--out", measured / "p", "--json"
        ).document
        for quality in ("exact", "int8", "int4")
    }
    assert found["exact"]["mean_bits"] == 32.0
    fetched = {
        quality: plan["baselines"]["on_demand"]["link_bytes_per_token"]
        for quality, plan in found.items()
    }
    assert fetched["exact"] / fetched["int8"] == pytest.approx(4, rel=0.2)
    assert fetched["exact"] / fetched["int4"] == pytest.approx(32 / 5, rel=0.2)
    # Nothing else is planned for than the exact model, if nothing is said.
    plain = moepack("plan", model, *BUDGET, "--json").document
    assert plain["layout_digest"] == found["exact"]["layout_digest"]
    assert (plain["quality"], plain["mean_bits"]) == ("exact", 32.0)


def test_people_are_told_the_quality(measured: Path, model: Path, moepack: Moepack) -> None:
    options = (*BUDGET, "--quality", "int4", "--explain", "--sweep", "4M:5M")
    shown = moepack("plan", model, *options)
    assert shown.code == 0, shown.err
    assert shown.out.count("int4, 5 bits a weight") == 2, "of the plan, and of the sweep"
    alone = ("--context", "256", "--sweep", "4M:5M", "--quality", "int8", "--json")
    swept = moepack("plan", model, *alone).document
    assert swept["quality"] == "int8"
    assert swept["mean_bits"] == pytest.approx(8.2, abs=0.1)


@pytest.mark.parametrize("quality", ["int2", "95", "INT8"])
def test_another_quality_is_refused_naming_those_that_exist(
    measured: Path, model: Path, moepack: Moepack, quality: str
) -> None:
    refused = moepack("plan", model, *BUDGET, "--quality", quality)
    assert refused.code == 2
    for name in ("exact", "int8", "int4"):
        assert name in refused.err


def test_a_pack_of_another_quality_cannot_be_kept(packed: Path, moepack: Moepack) -> None:
    refused = moepack("plan", *BUDGET, "--keep-layout", "--quality", "int8")
    assert refused.code == 2
    assert "the pack whose layout is kept is exact" in refused.err
    assert moepack("plan", *BUDGET, "--keep-layout", "--quality", "exact").code == 0
