"""Each token is scored once, with context before it; none from which something was learnt."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.errors import TextError
from moepack.held_out import learnt_tokens, passage, stride_tokens, windows
from moepack.profiling import DEFAULT_TOKENS
from moepack.routing import TextSource
from moepack.shipped import shipped_texts
from moepack.trace import part_of_tokens

BOS = 999_999


@given(st.data())
def test_every_token_behind_the_first_is_scored_once_given_what_is_before_it(
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(2, 300))
    prefix = (BOS,) * data.draw(st.integers(0, 2))
    learnt = data.draw(st.integers(0, count - 1))
    most = data.draw(st.none() | st.integers(1, 300))
    size = data.draw(st.integers(len(prefix) + 2, 120))
    text = passage("any", range(count), prefix, learnt, most)
    scored: list[int] = []
    for tokens, first in windows(text, size):
        assert 1 <= first < len(tokens) <= size
        assert tokens[: len(prefix)] == prefix
        own = tokens[len(prefix) :]
        assert list(own) == list(range(own[0], own[0] + len(own))), "a stretch of the text"
        # Half a window of context, or everything that there is.
        assert own[0] == 0 or first - len(prefix) >= stride_tokens(size, len(prefix))
        scored += tokens[first:]
    begin = max(learnt, 0 if prefix else 1)
    end = count if most is None else min(count, begin + most)
    assert scored == list(range(begin, end))


def test_a_text_that_fits_is_one_window() -> None:
    (window,) = windows(passage("any", range(40), (), 0), 64)
    assert window.tokens == tuple(range(40))
    assert window.first == 1


def test_windows_of_a_long_text() -> None:
    found = [
        (window.tokens[0], window.tokens[window.first], window.tokens[-1])
        for window in windows(passage("any", range(150), (), 0), 64)
    ]
    assert found == [(0, 1, 63), (32, 64, 95), (64, 96, 127), (86, 128, 149)]


def test_of_shipped_texts_what_profiles_call_test_is_scored_and_what_lies_behind() -> None:
    texts = shipped_texts()
    share = DEFAULT_TOKENS // len(texts)
    named = part_of_tokens(share)  # 0 is fit, 1 select, 2 test
    first_of_test = int(np.flatnonzero(named == 2)[0])
    for path in texts:
        assert learnt_tokens(path.read_bytes(), 10_000, ()) == first_of_test
    assert learnt_tokens(texts[0].read_bytes(), 100, ()) == 80, "a text of 100 tokens"


def test_of_other_texts_all_is_scored_but_for_what_this_profile_learnt_from() -> None:
    content = b"Some words of mine. " * 50
    assert learnt_tokens(content, 1000, ()) == 0
    source = TextSource("renamed.txt", hashlib.sha256(content).hexdigest(), 600)
    assert learnt_tokens(content, 1000, (source,)) == 480
    assert learnt_tokens(content + b"!", 1000, (source,)) == 0


def test_a_profile_that_read_more_of_a_shipped_text_leaves_less_of_it() -> None:
    content = shipped_texts()[0].read_bytes()
    source = TextSource("c.txt", hashlib.sha256(content).hexdigest(), 9000)
    assert learnt_tokens(content, 10_000, (source,)) == 7200


@pytest.mark.parametrize(
    ("count", "learnt", "words"),
    [
        (1, 0, "one token, expected two at least"),
        (10, 10, "a routing profile learns from the first 10 of 10 tokens"),
    ],
)
def test_a_text_of_which_nothing_is_left_is_named(count: int, learnt: int, words: str) -> None:
    with pytest.raises(TextError, match=f"text short: {words}"):
        passage("short", range(count), (), learnt)


def test_one_token_is_enough_behind_a_begin_token() -> None:
    (window,) = windows(passage("any", [7], (BOS,), 0), 64)
    assert window == ((BOS, 7), 1)
