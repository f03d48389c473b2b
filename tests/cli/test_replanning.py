"""Planning again from live routing: said when it happens, and no token changes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from typing_extensions import override

from tests.cli.conftest import Moepack


class Typed(io.StringIO):
    """What somebody types at a terminal."""

    @override
    def isatty(self) -> bool:
        return True


@pytest.fixture
def layered(measured: Path, model: Path, moepack: Moepack) -> None:
    """A current model whose layers have slots of their own, most of which hold tops."""
    plan = moepack("plan", model, "--vram", "4M", "--context", "256", "--json")
    assert plan.code == 0, plan.err
    assert plan.document.get("pool") is None
    assert moepack("pack").code == 0


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the routing says is worth it, after few tokens."""
    monkeypatch.setattr("moepack.replan.LEAST_TOKENS", 16)
    monkeypatch.setattr("moepack.replan.LEAST_SAVED", float("-inf"))


@pytest.mark.usefixtures("layered", "eager")
def test_slots_move_between_the_texts_of_a_benchmark_that_asks_for_it(moepack: Moepack) -> None:
    options = ("bench", "--prompt", "40", "--new", "12", "--json")
    fixed, moving = moepack(*options), moepack(*options, "--replan-every", "60")
    assert (fixed.code, moving.code) == (0, 0), moving.err
    assert "replans" not in fixed.document
    assert "slots move" not in fixed.err
    replans = moving.document["replans"]
    # To warm up 41 tokens a text, of three, then 51 a text; due at 60 and 60 later, between texts.
    assert [each["after_tokens"] for each in replans] == [82, 174]
    assert replans[0].keys() == {"after_tokens", "moved_bytes", "layers"}
    assert bool(replans[0]["moved_bytes"]) == bool(replans[0]["layers"])
    assert "after 82 tokens" in moving.err
    assert "of slots move between" in moving.err
    assert moving.document["tokens"] == fixed.document["tokens"]


@pytest.mark.usefixtures("layered", "eager")
def test_run_goes_on_with_what_is_typed_at_a_terminal(
    moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-new-tokens", "8")
    alone = [moepack("run", prompt, *options).out for prompt in ("abc", "Once upon")]
    monkeypatch.setattr("sys.stdin", Typed("abc\n\nOnce upon\nabc\n"))
    typed = moepack("run", "-", *options, "--replan-every", "10", "--stats")
    assert typed.code == 0, typed.err
    assert typed.out == "".join([*alone, alone[0]])
    # 3 + 7 tokens of the first prompt tell too little, 9 + 7 of the second come to that.
    assert typed.err.count("of slots move between") == 1
    assert "after 26 tokens" in typed.err
    assert typed.err.count("tokens/s") >= 3


@pytest.mark.usefixtures("layered")
def test_with_json_a_terminal_is_read_to_its_end(
    moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Typed("abc\nabc\n"))
    found = moepack("run", "-", "--max-new-tokens", "4", "--json").document
    assert (
        found["tokens"]
        == moepack("run", "abc\nabc", "--max-new-tokens", "4", "--json").document["tokens"]
    )
