"""What the benchmark of peers is made of: each part apart, without the peers themselves."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks.control_group import ControlGroup, Interface, NoControlGroupError
from benchmarks.gguf_kinds import KINDS
from benchmarks.gguf_text import text_of, tokens_of
from benchmarks.llama_runners import (
    LlamaRunner,
    find_binary,
    find_sibling,
    llama_runners,
    parse_timings,
)
from benchmarks.peer_model import PeerModel
from benchmarks.peer_precision import TRUNKS, Asked, precision
from benchmarks.peer_process import Watched, run_watched
from benchmarks.peer_report import Bar, Row, judge, row_of, sentence, table
from benchmarks.peer_rounds import chosen
from benchmarks.peer_runners import Generation, Measured
from benchmarks.peers import main
from moepack.shipped import shipped_model
from moepack.units import MIB

#: The end of what llama-completion printed here.
LLAMA_CPP_SAYS = """
0.00.127.317 I common_perf_print:    sampling time =       0.13 ms
0.00.127.371 I common_perf_print:    samplers time =       0.07 ms /    40 tokens
0.00.127.419 I common_perf_print:        load time =      26.43 ms
0.00.127.467 I common_perf_print: prompt eval time =       2.87 ms /    24 tokens (    0.12 ms per \
token,  8362.37 tokens per second)
0.00.127.488 I common_perf_print:        eval time =       6.60 ms /    15 runs   (    0.44 ms per \
token,  2271.69 tokens per second)
0.00.127.489 I common_perf_print:       total time =      46.50 ms /    39 tokens
"""

MEASURED = Measured(1.0, 10.0, 4.0, 1000, 100.0, 5000, 4000)


def test_text_and_tokens_are_each_others_inverse() -> None:
    tokens = [0, 5, 151_935, 5, 7]
    assert tokens_of(text_of(tokens)) == tokens
    assert tokens_of(f"> {text_of(tokens)} [end of text]\n") == tokens


def test_timings_are_read_from_what_llama_cpp_prints() -> None:
    found = parse_timings(LLAMA_CPP_SAYS)
    assert found is not None
    assert found == pytest.approx((24, 0.00287, 15, 0.0066))
    assert parse_timings("error: failed to load the model") is None


def test_a_peer_that_is_absent_is_told_with_the_reason(tmp_path: Path) -> None:
    assert find_binary(tmp_path, ("llama-cli",)) is None
    program = tmp_path / "build" / "bin" / "llama-cli"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho '--prefetch-experts --no-repack'\n")
    program.chmod(0o755)
    assert find_binary(tmp_path, ("llama-cli",)) == program
    assert find_sibling(program, "llama-cli") == find_sibling(tmp_path, "llama-cli") == program
    assert find_sibling(program, "llama-quantize") is find_sibling(None, "llama-cli") is None
    (absent,) = llama_runners("ik", None, tmp_path, "no device", (1, 2))
    assert absent.absent
    there = {each.name: each for each in llama_runners("ik", program, tmp_path, "none", (1, 2))}
    assert there["ik, direct I/O"].absent
    assert there["ik, mmap, 128 KiB ahead"].absent == "none"
    assert not there["ik, mmap, as it is"].absent
    assert not there["ik, --prefetch-experts"].absent


def test_the_interface_of_control_groups_is_found(tmp_path: Path) -> None:
    with pytest.raises(NoControlGroupError, match="no memory controller"):
        Interface.find(tmp_path)
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    assert Interface.find(tmp_path).limit == "memory.max"
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").touch()
    first = Interface.find(tmp_path)
    assert (first.root, first.peak) == (tmp_path / "memory", "memory.max_usage_in_bytes")


def test_a_process_is_held_to_the_limit_and_counted(tmp_path: Path) -> None:
    try:
        ControlGroup("test", 64 * MIB).close()
    except NoControlGroupError as failure:
        pytest.skip(str(failure))

    def run(allocated_bytes: int) -> str:
        code = f"held = b'x' * {allocated_bytes}; print('*' * 3, flush=True); open('log', 'w')"
        watched = run_watched(
            [sys.executable, "-c", code],
            limit_bytes=64 * MIB,
            messages=tmp_path / "messages.txt",
            timeout_s=60,
            count_tokens=lambda piece: piece.count("*"),
            folder=tmp_path,
        )
        assert watched.peak_group_bytes is None or watched.peak_group_bytes <= 64 * MIB
        assert watched.tokens == (0 if watched.failure else 3)
        assert (watched.first is None) == bool(watched.failure)
        return watched.failure

    assert run(1 * MIB) == ""
    assert (tmp_path / "log").exists()
    assert run(128 * MIB) == "killed for want of memory"


def test_the_faster_number_of_threads_counts() -> None:
    slow, fast = (MEASURED._replace(decode_tokens_per_s=speed) for speed in (2.0, 3.0))
    row = row_of("peer", {1: [slow], 2: [fast, fast._replace(decode_tokens_per_s=5.0)]}, "")
    assert (row.threads, row.rounds, row.decode_tokens_per_s) == (2, 2, 4.0)
    assert (row.slowest, row.fastest) == (3.0, 5.0)
    assert row_of("peer", {}, "killed").failure == "killed"


@pytest.mark.parametrize(
    ("own_decode", "own_prefill", "missed", "ratio", "passed"),
    [
        (5.0, 20.0, 100.0, 1.0, True),  # 2.5 times the peer's 2 is the lower bar
        (4.9, 20.0, 100.0, 0.98, False),
        (4.9, 20.0, 250.0, 4.9 / 3.6, True),  # 0.9 * 1000 / 250 is
        (5.0, 19.0, 100.0, 1.0, False),
    ],
)
def test_the_bar_is_the_lower_of_two(
    own_decode: float, own_prefill: float, missed: float, ratio: float, passed: bool
) -> None:
    of_peer = MEASURED._replace(decode_tokens_per_s=2.0, prefill_tokens_per_s=20.0)
    of_own = MEASURED._replace(decode_tokens_per_s=own_decode, prefill_tokens_per_s=own_prefill)
    rows = [
        row_of("moepack", {1: [of_own]}, ""),
        row_of("peer", {1: [of_peer]}, ""),
        Row("another", "killed"),
    ]
    bar = Bar("lru", missed, 1000.0)
    verdict = judge(rows, bar)
    assert verdict.best_peer == "peer"
    assert verdict.decode_ratio == pytest.approx(ratio)
    assert verdict.passed == passed
    assert sentence(verdict, bar, rows, judged=True).endswith("pass" if passed else "FAIL")
    assert len({line.count("|") for line in table(rows)}) == 1
    assert rows[2].document() == {"name": "another", "failure": "killed"}
    json.dumps([verdict._asdict(), *(row.document() for row in rows)])


@dataclasses.dataclass(frozen=True)
class Said(LlamaRunner):
    """A program that may say how long it took."""

    def measured(self, generation: Generation, watched: Watched) -> Measured | None:
        assert len(generation.prompt) == 2
        return MEASURED if watched.output == "said" else None


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [(["", "said"], MEASURED), (["", "", ""], "it does not say how long it took")],
)
def test_a_run_whose_last_words_are_lost_is_repeated(
    outputs: list[str], expected: Measured | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(outputs)

    def ended(*_arguments: object, **_options: object) -> Watched:
        return Watched(None, None, 0, next(left), "", None, "")

    monkeypatch.setattr("benchmarks.peer_runners.run_watched", ended)
    runner = Said("peer", (1,), binary=tmp_path, gguf=tmp_path / "model.gguf")
    runner.gguf.touch()
    generation = Generation((1, 2), (1,), 4, 1.0)
    found = runner.run(generation, 1, limit_bytes=1, timeout_s=1, scratch=tmp_path)
    assert found == expected
    assert next(left, None) is None


def test_only_the_fastest_variants_go_on() -> None:
    def runs(prefill: float, decode: float) -> dict[int, list[Measured]]:
        return {1: [MEASURED._replace(prefill_tokens_per_s=prefill, decode_tokens_per_s=decode)]}

    found = {
        "moepack": runs(1.0, 1.0),
        "llama.cpp, mmap": runs(30.0, 2.0),
        "llama.cpp, near": runs(20.0, 5.0),
        "llama.cpp, direct I/O": {},
        "llama.cpp, repacked": runs(25.0, 4.0),
        "llama.cpp Q4_K, mmap": runs(3.0, 2.0),
    }
    runners = [LlamaRunner(name, (1,)) for name in found]
    assert chosen(runners, found) == {
        "moepack",
        "llama.cpp, mmap",
        "llama.cpp, near",
        "llama.cpp Q4_K, mmap",
    }


def test_files_of_fewer_bits_are_tried_repacked_as_well(tmp_path: Path) -> None:
    program = tmp_path / "llama-completion"
    program.write_text("#!/bin/sh\necho '--no-repack -no-cnv --load-mode dio'\n")
    program.chmod(0o755)
    near = tmp_path / "device"
    exact = llama_runners("l", program, tmp_path / "a.gguf", near, (1,))
    assert [each.name for each in exact] == [
        "l, mmap, as it is",
        "l, mmap, 128 KiB ahead",
        "l, direct I/O",
    ]
    generation = Generation((1, 2), (1,), 4, 1.0)
    fewer = {
        each.name: each.command(generation, 1, 1, tmp_path)
        for each in llama_runners("l", program, tmp_path / "b.gguf", near, (1,), KINDS["Q4_0"])
    }
    assert "--no-repack" not in fewer["l Q4_0, repacked"]
    assert "--no-repack" in fewer["l Q4_0, mmap, 128 KiB ahead"]
    assert str(near) in fewer["l Q4_0, mmap, 128 KiB ahead"]
    assert fewer["l Q4_0, direct I/O"][-2:] == ["--load-mode", "dio"]
    rounded = KINDS["Q4_K"].with_trunk("Q8_0")
    (missing,) = llama_runners("l", program, "it cannot be made", near, (1,), rounded)
    assert (missing.name, missing.absent) == ("l Q4_K (trunk Q8_0)", "it cannot be made")
    assert missing.kind == "Q4_K"


def test_a_rounded_trunk_goes_with_rounded_experts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model", "--scratch", "scratch", "--bits", "16", "4", "--trunk", "int8"])
    assert "--trunk int8 goes with --bits 8 or 4" in capsys.readouterr().err


def test_trunks_are_rounded_on_both_sides() -> None:
    for bits, quality in ((8, "int8"), (4, "int4")):
        plain, rounded = precision(bits, "exact"), precision(bits, "int8")
        assert plain.asked.options == ("--quality", quality)
        assert rounded.asked.options == ("--quality", quality, "--trunk", "int8")
        assert plain.asked.name != rounded.asked.name
        assert {kind.trunk for kind in plain.kinds} == {"BF16"}
        assert {kind.trunk for kind in rounded.kinds} == {"Q8_0"}
        assert [kind.name for kind in plain.kinds] == [kind.name for kind in rounded.kinds]


def test_what_is_stored_has_its_trunk_in_codes_and_scales(tmp_path: Path) -> None:
    model = PeerModel(shipped_model(), tmp_path)
    codes = ["embed", "head", "attn.q", "attn.k", "attn.v", "attn.o"]
    saved_bytes = 0
    for info in model.spec.trunk:
        if info.name.removesuffix(".weight").endswith(tuple(codes)):
            outputs, inputs = info.shape
            saved_bytes += 2 * outputs * inputs - (outputs * inputs + 2 * outputs)
    assert saved_bytes > 0
    exact, rounded = (model.stored_bytes(Asked("int4", trunk)) for trunk in TRUNKS)
    assert exact - rounded == saved_bytes
    assert model.stored_bytes(Asked("exact")) == model.size_bytes
