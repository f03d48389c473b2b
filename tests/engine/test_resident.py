"""The comparison with everything resident runs, and llama.cpp's benchmark takes its turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.llama_bench import LlamaBench, LlamaBenchError, find_llama_bench, parse_speed
from benchmarks.resident import main
from tests.conftest import TinyFolder

#: Prints its arguments, and a speed that tells a prompt from what follows it.
LLAMA_BENCH = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in
    *"-n 0") speed=40.0 ;;
    *) speed=5.0 ;;
esac
echo "[{\\"n_prompt\\": 8, \\"samples_ts\\": [$speed]}]"
"""


def made(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_llama_bench_is_found_or_said_to_be_absent(tmp_path: Path) -> None:
    gguf = made(tmp_path / "model.gguf", "")
    assert "llama-bench" in str(find_llama_bench(tmp_path, gguf, 2))
    assert "llama-bench" in str(find_llama_bench(None, gguf, 2))
    program = made(tmp_path / "build" / "bin" / "llama-bench", LLAMA_BENCH)
    assert "GGUF" in str(find_llama_bench(tmp_path, None, 2))
    assert "GGUF" in str(find_llama_bench(tmp_path, tmp_path / "none.gguf", 2))
    assert find_llama_bench(tmp_path, gguf, 2) == LlamaBench(program, gguf, 2)


def test_what_llama_bench_cannot_do_is_an_error(tmp_path: Path) -> None:
    gguf = made(tmp_path / "model.gguf", "")
    program = made(tmp_path / "llama-bench", "#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(LlamaBenchError, match="no such model"):
        LlamaBench(program, gguf, 1).prefill(8)
    for answer in ("", "[]", "[{}]", '[{"samples_ts": []}]'):
        with pytest.raises(LlamaBenchError, match="expected one test"):
            parse_speed(answer)
    assert parse_speed('[{"samples_ts": [20.0, 40.0, 30.0]}]') == 30.0


def test_llama_bench_takes_its_turns(
    tiny_folder: TinyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = made(tmp_path / "model.gguf", "")
    made(tmp_path / "llama-bench", LLAMA_BENCH)
    options = ["--prompt", "8", "--new", "2", "--rounds", "2", "--threads", "1"]
    options += ["--llama-cpp", str(tmp_path), "--gguf", str(gguf)]
    main(["--model", str(tiny_folder("olmoe", "plain")), *options])
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert (run["llama_cpp_prefill"], run["llama_cpp_decode"]) == (40.0, 5.0)
    prompt, following = (tmp_path / "asked").read_text().splitlines()[:2]
    assert prompt == f"-m {gguf} -t 1 -r 1 -o json -p 8 -n 0"
    assert following == f"-m {gguf} -t 1 -r 1 -o json -p 0 -n 2 -d 8"


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
