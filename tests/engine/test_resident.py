"""The comparison with everything resident runs, and reads what llama.cpp's benchmark prints."""

from __future__ import annotations

import json

import pytest

from benchmarks.resident import main, parse_llama
from tests.conftest import TinyFolder


def test_figures_of_llama_bench_are_read_by_phase() -> None:
    answer = json.dumps(
        [
            {"n_prompt": 512, "n_gen": 0, "samples_ts": [20.0, 40.0, 30.0]},
            {"n_prompt": 0, "n_gen": 128, "samples_ts": [5.0]},
        ]
    )
    assert parse_llama(answer) == {"llama_cpp_prefill": 30.0, "llama_cpp_decode": 5.0}


def test_a_comparison_ends_with_a_line_of_json(
    tiny_folder: TinyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("olmoe", "plain")
    options = ["--prompt", "8", "--new", "2", "--rounds", "1", "--threads", "1"]
    main(["--model", str(folder), *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = report["runs"]
    for phase in ("prefill", "decode"):
        assert run[f"moepack_{phase}"] > 0
        assert run[f"{phase}_ratio"] > 0
    assert report["overhead_us"] > 0
    assert "llama_cpp_decode" not in run, "what is not given is absent"
