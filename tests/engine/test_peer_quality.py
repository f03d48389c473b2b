"""Peers' losses are counted on the tokens that moepack's are, and pairs count by them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.llama_perplexity import PerplexityError, compared, first_scored, kept_tokens
from benchmarks.peer_model import PeerModel
from benchmarks.peer_pairs import Pair, judge_pairs, pairs, told
from benchmarks.peer_precision import TRUNKS, precision
from benchmarks.peer_quality import kept_at, kept_quality, shared_windows, table
from benchmarks.peer_report import Bar, row_of
from benchmarks.peer_runners import Measured
from moepack.calibration import CALIBRATION_FILE
from moepack.factor_file import FACTORS_FILE
from moepack.shipped import shipped_model
from moepack.workspace import ModelRecord, Workspace

WINDOW, VOCABULARY = 8, 11
Floats = npt.NDArray[np.float64]


def kept(path: Path, tokens: npt.NDArray[np.int32], logits: Floats) -> Path:
    """A file as llama-perplexity writes it, of logits [windows, scored, vocabulary]."""
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", tokens.shape[1], VOCABULARY, len(tokens)))
        file.write(tokens.astype("<i4").tobytes())
        for row in logits.reshape(-1, VOCABULARY):
            most = row.max()
            least = max(row.min(), most - 16)
            step = np.float32((most - least) / 65535)
            codes = np.rint((np.maximum(row, least) - least) / step).astype("<u2")
            normaliser = most + np.log(np.exp(row - most).sum())
            file.write(struct.pack("<ff", step, least - normaliser) + codes.tobytes() + b"\0\0")
    return path


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def test_what_llama_perplexity_keeps_gives_the_divergence(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(VOCABULARY, size=(3, WINDOW)).astype(np.int32)
    shape = 3, WINDOW - first_scored(WINDOW), VOCABULARY
    exact = 2 * generator.standard_normal(shape)
    exact[0, 0, 4] -= 40  # of what is impossible the logarithm is not kept
    other = exact + 0.3 * generator.standard_normal(shape)
    files = kept(tmp_path / "exact", tokens, exact), kept(tmp_path / "other", tokens, other)
    p, q = log_softmax(exact), log_softmax(other)
    found = list(compared(*files))
    assert len(found) == 3
    for window, scores in enumerate(found):
        targets = tokens[window, first_scored(WINDOW) :]
        rows = np.arange(len(targets))
        wanted = (np.exp(p) * (p - q)).sum(axis=-1)[window]
        assert scores.kl is not None
        assert scores.exact_nll is not None
        assert scores.agrees is not None
        np.testing.assert_allclose(scores.kl, wanted, atol=2e-4)
        np.testing.assert_allclose(scores.nll, -q[window, rows, targets], atol=2e-4)
        np.testing.assert_allclose(scores.exact_nll, -p[window, rows, targets], atol=2e-4)
        same = p[window].argmax(axis=-1) == q[window].argmax(axis=-1)
        np.testing.assert_array_equal(scores.agrees, same)
    np.testing.assert_array_equal(kept_tokens(files[0]), tokens)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    tokens = np.zeros((2, WINDOW), np.int32)
    logits = np.random.default_rng(0).standard_normal((2, 3, VOCABULARY))
    exact = kept(tmp_path / "exact", tokens, logits)
    with pytest.raises(PerplexityError, match="are of different tokens"):
        list(compared(exact, kept(tmp_path / "other", tokens + 1, logits)))
    cut = tmp_path / "cut"
    cut.write_bytes(exact.read_bytes()[:-1])
    with pytest.raises(PerplexityError, match="ends within window 1"):
        list(compared(exact, cut))
    cut.write_bytes(b"GGUF")
    with pytest.raises(PerplexityError, match="begins with b'GGUF'"):
        kept_tokens(cut)


@pytest.mark.parametrize(("learnt", "first"), [(0, 5), (20, 20)])
def test_windows_score_each_token_once_where_llama_perplexity_does(learnt: int, first: int) -> None:
    ids = list(range(100, 161))
    passage, windows = shared_windows("text", ids, learnt, WINDOW)
    scored = [token for window in windows for token in window.tokens[window.first :]]
    assert scored == list(passage.ids[passage.first :])
    assert passage.first == first
    assert scored == ids[first : first + len(scored)]
    assert len(ids) - first - len(scored) < WINDOW - first_scored(WINDOW), "whole windows only"
    for window in windows:
        # Its places n_ctx / 2 up to the last but one predict what is scored.
        assert window.first == WINDOW // 2 + 1
        assert len(window.tokens) == WINDOW
    assert shared_windows("short", ids[:7], 0, WINDOW)[1] == []


def measured_quality(**peers: dict[str, Any]) -> dict[str, Any]:
    own = {
        "int8": {"stored": "INT8", "kl": 0.001},
        "int4": {"stored": "INT4_G32", "kl": 0.008},
    }
    return {"moepack": own, "peers": peers}


def test_a_pair_counts_where_moepack_loses_no_more() -> None:
    quality = measured_quality(
        Q8_0={"stored": "Q8_0", "kl": 0.0009},
        Q4_0={"stored": "Q4_0", "kl": 0.008},
        Q4_K={"stored": "Q5_0", "kl": 0.007},
    )
    int8, int4 = precision(8, "exact"), precision(4, "exact")
    (eight,) = pairs(int8, "INT8", quality)
    assert not eight.counts
    assert "KL 0.00100, the peer's 0.00090" in eight.why
    equal, other = pairs(int4, "INT4_G32", quality)
    assert (equal.kind, equal.counts) == ("Q4_0", True)
    assert (other.kind, other.counts) == ("Q4_K", False)
    assert "Q5_0, which is what llama-quantize stores there for Q4_K" in other.why
    assert [pair.counts for pair in pairs(int4, "INT4_G64", quality)] == [False, False]
    assert [pair.counts for pair in pairs(precision(16, "exact"), "BF16", None)] == [True]
    (unknown,) = pairs(precision(8, "int8"), "INT8", None)
    assert not unknown.counts
    assert unknown.why.endswith("benchmarks.peer_quality --trunk int8")
    (absent,) = pairs(int8, "INT8", measured_quality(Q8_0={"failure": "absent: no program"}))
    assert absent == Pair("Q8_0", counts=False, why="absent: no program")


def test_quality_is_of_one_trunk(tmp_path: Path) -> None:
    for kl, trunk in zip((0.0008, 0.0012), TRUNKS, strict=True):
        own = {"stored": "INT8", "kl": kl}
        peers = {"Q8_0": {"stored": "Q8_0", "kl": 0.001}}
        document = {"trunk": trunk, "moepack": {"int8": own}, "peers": peers}
        kept_at(tmp_path, trunk).write_text(json.dumps(document))
    assert kept_quality(tmp_path / "elsewhere", "exact") is None
    counts = {}
    for trunk in TRUNKS:
        (pair,) = pairs(precision(8, trunk), "INT8", kept_quality(tmp_path, trunk))
        counts[trunk] = pair.counts
    assert counts == {"exact": True, "int8": False}
    of_before = {"moepack": {"int8": own}, "peers": peers}  # rounded without calibration
    kept_at(tmp_path, "exact").write_text(json.dumps(of_before))
    assert kept_quality(tmp_path, "exact") is None


def test_the_table_says_what_trunks_are_in() -> None:
    found = {
        "stored": "INT8",
        "trunk": "INT8",
        "bits_per_weight": 8.1,
        "kl": 0.001,
        "kl_interval": [0.0009, 0.0011],
        "top1_agreement": 0.98,
    }
    peers = {"Q8_0": {**found, "stored": "Q8_0", "trunk": "Q8_0"}, "Q4_K": {"failure": "absent"}}
    lines = list(table({"moepack": {"int8": found}, "peers": peers}))
    assert len({line.count("|") for line in lines}) == 1
    column = [name.strip() for name in lines[0].split("|")].index("trunk in")
    assert [line.split("|")[column].strip() for line in lines[2:]] == ["INT8", "Q8_0", ""]


def test_a_pair_is_judged_by_its_own_programs() -> None:
    def row(name: str, decode: float) -> Any:
        return row_of(name, {2: [Measured(1.0, 10.0, decode, 1000, 100.0, 5000, 4000)]}, "")

    rows = [row("moepack", 10.0), row("llama.cpp Q4_0", 3.0), row("llama.cpp Q4_K", 5.0)]
    kinds = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q4_K": "Q4_K"}
    both = [Pair("Q4_0", counts=True, why="so"), Pair("Q4_K", counts=False, why="not so")]
    bar = Bar("lru", 10.0, 1e6)
    first, second = judge_pairs(both, rows, kinds, bar)
    assert (first.verdict.best_peer, first.verdict.passed) == ("llama.cpp Q4_0", True)
    assert (second.verdict.best_peer, second.verdict.passed) == ("llama.cpp Q4_K", False)
    assert told(first, rows, kinds, bar, 0.5).endswith("pass")
    assert told(first, rows, kinds, bar, 1.0).endswith("No bar at this share.")
    said = told(second, rows, kinds, bar, 0.5)
    assert said.startswith("Q4_K does not count (not so). ")
    assert said.endswith("FAIL")
    assert first.document()["verdict"]["passed"] is True


def test_what_rounding_is_weighed_by_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, ...]] = []

    def profiled(_module: str, *arguments: str, home: Path) -> str:
        """What the command leaves in its workspace."""
        told.append(arguments)
        source = str(shipped_model().resolve())
        folder = Workspace(home).remember(ModelRecord("model", source, "1" * 64, "2" * 64))
        folder.routing_path.touch()
        if "--bits" in arguments:
            (folder.folder / CALIBRATION_FILE).touch()
            (folder.folder / FACTORS_FILE).touch()
        return ""

    monkeypatch.setattr("benchmarks.peer_model._python", profiled)
    model = PeerModel(shipped_model(), tmp_path, "apart")
    for bits in (False, False, True, True, False):
        model.profile(bits=bits)
    assert told == [
        ("profile", str(shipped_model())),
        ("profile", str(shipped_model()), "--bits"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["apart"]
