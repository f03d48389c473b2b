"""Greedy text of a model, and how far another one goes along with it.

Two figures, since either alone misleads. Given the first model's text, the other one's own choice
for each next token is the same for a share of the tokens: that says how near they are. Left to
itself the other one leaves the text at the first choice that differs, after which nothing can be
compared: how long it goes along says what a reader sees, and depends on luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moepack_runtime.engine import Engine
from moepack_runtime.sampling import Sampler

Text = list[int]


class Agreement(NamedTuple):
    """Of some texts together, and of each.

    Attributes
    ----------
    tokens : int
        Of all texts.
    same : float
        Share of them that is also the other model's choice, given those before.
    along : tuple of int
        How many tokens of each text the other one draws as well, left to itself.
    """

    tokens: int
    same: float
    along: tuple[int, ...]


def greedy_texts(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Text]:
    """The likeliest token after each prompt, and so on."""
    return [
        list(engine.generate(prompt, max_new_tokens=new_tokens, sampler=Sampler()))
        for prompt in prompts
    ]


def choices(engine: Engine, prompt: Sequence[int], text: Sequence[int]) -> Text:
    """The likeliest token at each place of a text, given the prompt and the text up to there."""
    engine.reset()
    found = [int(engine.prefill(prompt).argmax())]
    return found + [int(engine.decode(token).argmax()) for token in text[:-1]]


def agreement(
    engine: Engine, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> Agreement:
    """How far a model goes along with another one's texts."""
    same = tokens = 0
    along = []
    for prompt, text in zip(prompts, texts, strict=True):
        found = choices(engine, prompt, text)
        same += sum(one == other for one, other in zip(found, text, strict=True))
        tokens += len(text)
        (alone,) = greedy_texts(engine, [prompt], len(text))
        along.append(common(alone, text))
    return Agreement(tokens, same / tokens, tuple(along))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common, from the beginning."""
    pairs = zip(one, other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one))
