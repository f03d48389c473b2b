"""``moepack eval``: what it answers, and what it says where there is nothing to answer."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moepack import records
from moepack.routing import ROUTING_VERSION, RoutingSummary, TextSource
from tests.cli.conftest import Moepack, Outcome

FIGURES = ("perplexity", "exact_perplexity", "perplexity_ratio", "kl", "top1_agreement")

WORDS = "This is a text of words, and it goes on for a while. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 14)
    return path


def assert_named(outcome: Outcome, name: str, *words: str) -> None:
    assert outcome.code == 1
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"{name}: ")
    for word in words:
        assert word in last


def test_json_answers_with_the_documented_keys(packed: Path, moepack: Moepack, text: Path) -> None:
    text.write_text(WORDS * 40)  # nine blocks of 256 tokens
    other = text.with_name("other.txt")
    other.write_text("Something else. " * 12)
    done = moepack("eval", "--text", text, "--text", other, "--json")
    assert done.code == 0, done.err
    found = done.document
    assert list(found["domains"]) == ["words", "other"]
    for document in (found, *found["domains"].values()):
        assert document.keys() >= {"tokens", *FIGURES}
        assert None not in document.values()
    assert found["tokens"] == sum(each["tokens"] for each in found["domains"].values())
    assert found["tokens"] == text.stat().st_size + other.stat().st_size - 2
    assert found["perplexity"] > 1
    assert found["encodings"] == {"F32": 3 * 16}
    # The pack keeps the model's float32, and this plan cuts nothing.
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["top1_agreement"] == 1
    assert found["window_tokens"] == 256
    low, high = found["domains"]["words"]["perplexity_interval"]
    assert low < found["domains"]["words"]["perplexity"] < high
    assert "perplexity_interval" not in found["domains"]["other"], "one block of tokens"


def test_people_get_a_table(packed: Path, moepack: Moepack, text: Path) -> None:
    done = moepack("eval", "--text", text)
    assert done.code == 0, done.err
    head, first, *_ = done.out.splitlines()
    assert head.split()[:3] == ["text", "tokens", "perplexity"]
    assert first.split()[:2] == ["words", str(text.stat().st_size - 1)]
    assert "KL(exact || packed), nats" in done.out
    assert "windows of 256 tokens, 128 apart" in done.out
    assert "blocks of 256 tokens" in done.out


def test_the_shipped_texts_are_the_default(
    packed: Path, moepack: Moepack, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cli.evaluate", "held_out"):
        monkeypatch.setattr(f"moepack.{module}.shipped_texts", lambda: (text,))
    found = moepack("eval", "--json", "--tokens", "100").document
    assert list(found["domains"]) == ["words"]
    # What a profile would learn from is not scored: four fifths.
    domain = found["domains"]["words"]
    assert domain["first_token"] == round(0.6 * 742) + round(0.2 * 742)
    assert domain["tokens"] == 100


def test_of_a_profiled_text_the_test_part_is_scored(
    packed: Path, moepack: Moepack, home: Path, text: Path
) -> None:
    source = TextSource("words.txt", hashlib.sha256(text.read_bytes()).hexdigest(), 500)
    summary = RoutingSummary(
        ROUTING_VERSION, "m", "d", "now", "a test", 500, 1, "none", (source,), ()
    )
    (folder,) = home.glob("models/*")
    (folder / "routing.yaml").write_bytes(records.to_yaml(summary, header="a test"))
    (domain,) = moepack("eval", "--text", text, "--json").document["domains"].values()
    assert domain["first_token"] == 400
    (folder / "routing.yaml").write_text("{}")
    assert_named(moepack("eval", "--text", text), "ProfileError", "routing.yaml")


@pytest.mark.parametrize("why", ["gone", "changed", "unknown"])
def test_without_the_checkpoint_only_perplexity_is_given_and_it_is_said(
    why: str, measured: Path, model: Path, moepack: Moepack, text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    assert moepack("plan", source, "--vram", "4M", "--context", "256").code == 0
    done = moepack("pack", "--json", "--out", tmp_path / "packed")
    assert done.code == 0, done.err
    words = {"gone": "source", "changed": "has changed", "unknown": "was packed from"}[why]
    if why == "gone":
        shutil.rmtree(source)
    elif why == "changed":
        weights = bytearray((source / "model.safetensors").read_bytes())
        weights[len(weights) // 2 :] = bytes(len(weights) - len(weights) // 2)
        (source / "model.safetensors").write_bytes(weights)
    else:
        shutil.rmtree(measured / "models")
    found = moepack("eval", "--model", tmp_path / "packed", "--text", text, "--json")
    assert found.code == 0, found.err
    assert "there is only perplexity" in found.err
    assert words in found.err
    (domain,) = found.document["domains"].values()
    for document in (found.document, domain):
        assert document["perplexity"] > 1
        assert document.keys().isdisjoint(FIGURES[1:])
    assert "not at hand" in moepack("eval", "--model", tmp_path / "packed", "--text", text).out


def test_texts_that_cannot_be_scored_are_named(packed: Path, moepack: Moepack, text: Path) -> None:
    def said(content: bytes) -> Outcome:
        text.write_bytes(content)
        return moepack("eval", "--text", text)

    assert_named(said(b""), "TextError", "words", "is empty")
    assert_named(said(b"a"), "TextError", "words", "one token")
    assert_named(said(b"\xff\xfe\x00"), "TextError", "words", "not UTF-8")
    assert_named(moepack("eval", "--text", text.with_name("no")), "TextError", "No such file")
    assert_named(moepack("eval", "--text", text.parent), "TextError", "Is a directory")


def test_a_pack_without_a_tokenizer_is_named(packed: Path, moepack: Moepack, text: Path) -> None:
    (packed / "tokenizer.json").unlink()
    outcome = moepack("eval", "--text", text)
    assert outcome.code == 1
    assert "tokenizer" in outcome.err


def test_a_text_that_is_named_twice_is_wrong_usage(
    packed: Path, moepack: Moepack, text: Path
) -> None:
    outcome = moepack("eval", "--text", text, "--text", text)
    assert outcome.code == 2
    assert "named twice" in outcome.err
    elsewhere = text.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(text, elsewhere)
    both = moepack("eval", "--text", text, "--text", elsewhere / text.name, "--json")
    assert list(both.document["domains"]) == [str(text), str(elsewhere / text.name)]


def test_what_has_not_been_packed_is_named(measured: Path, moepack: Moepack, text: Path) -> None:
    assert_named(moepack("eval", "--text", text), "WorkspaceError", "has not been packed")


def test_ctrl_c_ends_it_cleanly(packed: Path, home: Path, text: Path, interruptible: None) -> None:
    text.write_text(WORDS * 4000)
    before = sorted(home.rglob("*"))
    command = [sys.executable, "-m", "moepack", "eval", "--text", str(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stderr.readline().decode()
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode()
        assert process.stdout.read() == b""
    assert first.startswith("run the exact model (tokens): ")
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted"
    assert sorted(home.rglob("*")) == before


def test_equal_calls_give_equal_answers(packed: Path, moepack: Moepack, text: Path) -> None:
    first, second = (moepack("eval", "--text", text, "--json").out for _ in range(2))
    assert json.loads(first) == json.loads(second)
