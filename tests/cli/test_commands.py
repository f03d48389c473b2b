"""Each command on a small random model: what it answers, and where the answer goes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from moepack.hardware import load_hardware
from tests.cli.conftest import Moepack


def test_plan_pack_run_find_what_the_step_before_left(
    packed: Path, moepack: Moepack, home: Path
) -> None:
    assert packed.is_relative_to(home)
    run = moepack("run", "abc", "--max-new-tokens", "5", "--json")
    assert run.code == 0, run.err
    assert len(run.document["tokens"]) == 5


def test_profile_measures_what_the_plan_is_made_from(
    measured: Path,
    model: Path,
    texts: list[Path],
    moepack: Moepack,
    monkeypatch: pytest.MonkeyPatch,
    measured_briefly: None,
) -> None:
    machine = load_hardware(measured / "hardware.yaml")
    monkeypatch.setattr("moepack.probe.probe_hardware", lambda **_: machine)
    profile = moepack("profile", model, "--json")
    assert profile.code == 0, profile.err
    assert profile.document.keys() >= {"hardware", "compute", "routing"}
    assert profile.document["compute"]["source"] == "measured"
    routing = profile.document["routing"]
    for key in ("layers", "hit_rates", "curves"):
        assert [layer["layer"] for layer in routing[key]] == [0, 1, 2]
    curve = routing["curves"][0]["lcp"]
    assert curve[0] == 0
    assert curve[-1] == 1
    assert len(curve) == routing["layers"][0]["num_experts"] + 1
    plan = moepack("plan", "--vram", "4M", "--context", "256", "--json").document
    assert plan["provenance"]["compute"].startswith("measured")
    assert plan["provenance"]["assumptions"] == []
    uniform = ("plan", "--vram", "4M", "--context", "256", "--routing", "uniform", "--json")
    assert "preset uniform" in moepack(*uniform).document["provenance"]["assumptions"][0]
    shown = moepack("profile", model)
    assert shown.code == 0
    assert "recall at k" in shown.out
    assert "25%, 50%, 75% of the experts cached" in shown.out
    alone = moepack("profile", "--hardware-only", "--json").document
    assert alone["hardware"] == profile.document["hardware"]
    assert "compute" not in alone


def test_run_writes_the_tokens_that_transformers_writes(
    packed: Path, model: Path, moepack: Moepack
) -> None:
    import torch
    import transformers

    found = moepack("run", "Once upon", "--max-new-tokens", "24", "--json").document
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    alphabet = sorted(bytes_to_characters().values())
    prompt = [alphabet.index(bytes_to_characters()[byte]) for byte in b"Once upon"]
    expected = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, use_cache=True
    )[0, len(prompt) :].tolist()
    assert found["tokens"] == expected


def bytes_to_characters() -> dict[int, str]:
    """The characters that stand in for bytes in a byte-level BPE (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def test_run_streams_the_text_that_json_holds(packed: Path, moepack: Moepack) -> None:
    plain = moepack("run", "abc", "--max-new-tokens", "12")
    document = moepack("run", "abc", "--max-new-tokens", "12", "--json").document
    assert plain.out == document["text"] + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(
    packed: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = moepack("run", "abc", "--max-new-tokens", "6", "--json").document["tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert moepack("run", "-", "--max-new-tokens", "6", "--json").document["tokens"] == expected


def test_equal_seeds_draw_equal_texts(packed: Path, moepack: Moepack) -> None:
    def drawn(seed: int) -> list[int]:
        options = ("--max-new-tokens", "8", "--temperature", "2", "--seed", str(seed), "--json")
        tokens: list[int] = moepack("run", "abc", *options).document["tokens"]
        return tokens

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_plan_answers_with_the_documented_keys(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    plan = moepack("plan", model, "--vram", "4M", "--context", "256", "--json").document
    assert plan["fast_budget_bytes"] == 4 * 2**20
    assert plan["fast_used_bytes"] == sum(plan["memory"].values()) <= plan["fast_budget_bytes"]
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1, 2]
    assert plan["layers"][0].keys() >= {
        "layer",
        "budget_bytes",
        "split_ratio",
        "cached_tops",
        "policy",
        "prefetch",
    }
    assert plan["prediction"].keys() >= {
        "ttft_s",
        "tpot_s",
        "tokens_per_s",
        "hit_rate",
        "ready_rate",
        "link_bytes_per_token",
        "band",
    }
    assert plan["planner"]["seconds"] > 0
    assert plan["max_context"] >= 256
    for baseline in plan["baselines"].values():
        assert baseline.keys() >= {"ttft_s", "tpot_s", "hit_rate", "eligible"}
    assert no_nulls(plan)


def test_run_and_bench_answer_with_the_documented_keys(
    packed: Path, texts: list[Path], moepack: Moepack
) -> None:
    run = moepack("run", "abc", "--max-new-tokens", "4", "--json").document
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--json").document
    for document in (run, bench):
        assert document.keys() >= {
            "tokens",
            "text",
            "ttft_s",
            "tpot_s",
            "tokens_per_s",
            "prefill_tokens_per_s",
            "hit_rate",
            "ready_rate",
            "link_bytes_per_token",
            "demand",
            "link_busy_fraction",
            "link_efficiency",
            "wait_s",
            "layers",
            "peak_process_bytes",
            "peak_fast_bytes",
            "process_base_bytes",
            "prediction",
            "drift",
        }
        assert document["peak_fast_bytes"] <= 4 * 2**20
        assert document["drift"].keys() >= {"tpot_s", "hit_rate"}
        assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2]
        waits_s = sum(layer["wait_s_per_token"] for layer in document["layers"])
        assert waits_s == pytest.approx(document["wait_s"] / 3)
        parts = ("demand", "prefetch_used", "prefetch_wasted")
        assert document["link_bytes_per_token"] == pytest.approx(
            sum(document.get(part, 0) for part in parts)
        )
        for drift in document["drift"].values():
            assert drift.keys() >= {"predicted", "expected", "measured", "in_band"}
        assert no_nulls(document)
    assert len(bench["tokens"]) == 3 * 4
    assert "slowness" not in bench, "nobody measured how fast this processor is"
    plan = packed.parent / "plan.json"
    text = plan.read_text()
    assert "yardstick_s" not in text
    plan.write_text(text.replace('"tpot_s":', '"yardstick_s": 1e-05, "tpot_s":', 1))
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--json").document
    slow = bench["slowness"]["token"]
    assert slow > 1, "no processor does in ten microseconds what the yardstick is"
    tpot, prediction = bench["drift"]["tpot_s"], bench["prediction"]
    wait_s = prediction.get("tpot_wait_s", 0.0)
    assert tpot["expected"] == pytest.approx(wait_s + (prediction["tpot_s"] - wait_s) * slow)
    assert tpot["ratio"] == pytest.approx(tpot["measured"] / tpot["expected"])


def no_nulls(value: Any) -> bool:
    """A key whose thing does not exist is absent; provenance may hold what it likes."""
    if isinstance(value, dict):
        return all(no_nulls(item) for key, item in value.items() if key != "provenance")
    if isinstance(value, list):
        return all(map(no_nulls, value))
    return value is not None


def test_the_first_token_is_compared_only_at_the_planned_length(
    packed: Path, texts: list[Path], moepack: Moepack
) -> None:
    other = moepack("bench", "--prompt", "16", "--new", "2", "--json").document
    planned = moepack("bench", "--new", "2", "--json").document
    assert "ttft_s" not in other["drift"]
    assert "ttft_s" in planned["drift"]


def test_strict_bench_fails_outside_the_band(
    packed: Path, texts: list[Path], moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepack.planner.DERIVED_BAND", 1.000001)
    assert moepack("plan", "--vram", "4M", "--context", "256", "--keep-layout").code == 0
    relaxed = moepack("bench", "--prompt", "16", "--new", "3", "--json")
    strict = moepack("bench", "--prompt", "16", "--new", "3", "--json", "--strict")
    assert relaxed.code == 0
    assert strict.code == 1
    assert strict.document.keys() == relaxed.document.keys()
    assert strict.err.splitlines()[-1].startswith("DriftError: outside the band")


def test_verify_finds_nothing_in_a_whole_pack(packed: Path, moepack: Moepack) -> None:
    document = moepack("verify", "--json").document
    assert document["damages"] == []
    assert document == document | {"folder": str(packed), "extra_files": []}


def test_inspect_tells_models_from_packs(packed: Path, model: Path, moepack: Moepack) -> None:
    of_model = moepack("inspect", model, "--json").document
    of_pack = moepack("inspect", packed, "--json").document
    assert (of_model["kind"], of_pack["kind"]) == ("model", "pack")
    assert of_model["digest"] == of_pack["model"]["digest"]
    assert of_model["experts_bytes"] == 3 * 16 * 3 * 96 * 64 * 4
    assert 0 < of_model["needs"]["least_bytes"] < of_model["needs"]["resident_bytes"]


def test_reports_for_people_state_sizes_with_units(
    packed: Path, texts: list[Path], moepack: Moepack
) -> None:
    plan = moepack("plan", "--vram", "4M", "--context", "256")
    assert "4.00 MiB" in plan.out
    bench = moepack("bench", "--prompt", "16", "--new", "2")
    assert "predicted" in bench.out
    assert "measured" in bench.out
    for answer in (plan, bench, moepack("verify"), moepack("inspect"), moepack("inspect", packed)):
        assert answer.code == 0
        assert all(line == line.rstrip() for line in answer.out.splitlines())
        assert "\x1b" not in answer.out


def test_stats_go_beside_the_text(packed: Path, moepack: Moepack) -> None:
    bare = moepack("run", "abc", "--max-new-tokens", "4")
    with_stats = moepack("run", "abc", "--max-new-tokens", "4", "--stats")
    assert with_stats.out == bare.out
    for word in ("predicted", "each token", "ready rate", "on demand", "busy", "waited", "layers"):
        assert word in with_stats.err


def test_what_a_single_token_does_not_have_is_absent(packed: Path, moepack: Moepack) -> None:
    document = moepack("run", "abc", "--max-new-tokens", "1", "--stats", "--json").document
    assert document.keys() >= {"ttft_s", "prefill_tokens_per_s", "peak_fast_bytes"}
    assert document.keys().isdisjoint(
        {"tpot_s", "tokens_per_s", "hit_rate", "demand", "wait_s", "layers", "recall"}
    )
    assert no_nulls(document)


def test_loading_and_a_prompt_show_progress_beside_the_result(
    packed: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepack.cli.progress.QUIET_S", 0.0)
    run = moepack("run", "abc " * 40, "--max-new-tokens", "2", "--json")
    assert run.document["prompt_tokens"] == 160
    for work in ("load the trunk: ", "run the prompt (layers): 1 of 3"):
        assert work in run.err


def test_a_trace_is_written_beside_the_text(
    packed: Path, texts: list[Path], moepack: Moepack, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "trace.json"
    bare = moepack("run", "abc", "--max-new-tokens", "4")
    traced = moepack("run", "abc", "--max-new-tokens", "4", "--trace", path)
    assert traced.out == bare.out
    assert f"trace written to {path}" in traced.err
    names = [event["name"] for event in json.loads(path.read_bytes())["traceEvents"]]
    assert [name for name in names if name.startswith("pass ")] == [f"pass {n}" for n in range(4)]
    assert sum(name.startswith("layer ") for name in names) == 4 * 3
    bench = moepack("bench", "--prompt", "16", "--new", "2", "--trace", path, "--json")
    assert bench.document["tokens"]
    assert json.loads(path.read_bytes())["traceEvents"]


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_loads(
    packed: Path, moepack: Moepack, tmp_path: Path
) -> None:
    refused = moepack("run", "abc", "--trace", tmp_path)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == (
        f"OutputError: {tmp_path}: Is a directory; expected a place that can be written\n"
    )


def test_a_plan_written_out_is_not_current(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    assert moepack("plan", model, "--vram", "4M", "--context", "256", "--out", out).code == 0
    assert out.exists()
    assert moepack("pack", model).err.startswith("WorkspaceError: ")


def test_a_plan_for_another_machine_is_shown_and_never_current(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    options = ("--vram", "4M", "--context", "256", "--hardware", "cpu-sata")
    shown = moepack("plan", model, *options, "--json")
    assert shown.code == 0
    assert shown.document["provenance"]["hardware_is_this_machine"] is False
    assert moepack("pack", model).err.startswith("WorkspaceError: ")


def test_a_slower_link_is_planned_and_run_as_such(
    measured: Path, model: Path, texts: list[Path], moepack: Moepack
) -> None:
    options = ("--vram", "4M", "--context", "256")
    full = moepack("plan", model, *options, "--json").document["prediction"]
    slow = moepack("plan", model, *options, "--link", "8M,1ms", "--json").document["prediction"]
    assert slow["tpot_s"] > full["tpot_s"]
    assert moepack("pack").code == 0
    bench = moepack("bench", "--prompt", "16", "--new", "4", "--link", "8M,1ms", "--json")
    assert "throttled to 8.00 MiB/s and 1 ms" in bench.err
    other = moepack("bench", "--prompt", "16", "--new", "4", "--link", "9M")
    assert other.err.splitlines()[-1].startswith("PlanMismatchError: ")


def test_what_is_named_once_stays_current(measured: Path, model: Path, moepack: Moepack) -> None:
    assert moepack("plan", model, "--vram", "4M", "--context", "256").code == 0
    assert moepack("inspect", "--json").document["name"] == model.name


def test_a_short_model_gets_a_context_that_it_has(
    measured: Path, model: Path, moepack: Moepack
) -> None:
    plan = moepack("plan", model, "--vram", "64M", "--json").document
    assert plan["context"] == 512


def test_a_pack_elsewhere_is_found_again(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    assert moepack("plan", model, "--vram", "4M", "--context", "256").code == 0
    out = tmp_path / "elsewhere"
    assert moepack("pack", "--out", out).code == 0
    assert moepack("verify", "--json").document["folder"] == str(out)
    by_folder = moepack("run", "abc", "--model", out, "--max-new-tokens", "3", "--json")
    by_model = moepack("run", "abc", "--model", model, "--max-new-tokens", "3", "--json")
    assert by_folder.document["tokens"] == by_model.document["tokens"]
