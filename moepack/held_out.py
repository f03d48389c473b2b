"""Which tokens of a text are scored, and the windows in which a model sees them.

Nothing is scored that something was fitted to. A routing profile splits the tokens that it runs of
a text, in their order, into *fit*, *select* and *test* (:mod:`moepack.trace`): hot rankings,
half-lives and policies, and what else is calibrated, come from the first two. Scored are the *test*
part and whatever lies behind the tokens that were run. For the shipped texts that is so even where
no profile was made, so that their figures do not depend on who has profiled what; of any other text
it is so if this model's profile was made from it.

The shipped texts are held out of the shipped model's training. Other models may have been trained
on them: then their perplexity says little, and how two versions of a model differ still holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moepack.errors import TextError
from moepack.profiling import DEFAULT_TOKENS
from moepack.routing import TextSource
from moepack.shipped import shipped_texts
from moepack.trace import ROUTING_PARTS, part_of_tokens

#: The longest window, tokens. The shipped model was trained on no longer ones.
WINDOW_TOKENS = 1024

#: A window of one token has nothing to be predicted from.
LEAST_WINDOW_TOKENS = 2


class Passage(NamedTuple):
    """A text in tokens.

    Attributes
    ----------
    ids : sequence of int
        The text's own tokens.
    prefix : tuple of int
        What the model has before every text, such as its begin token; not scored.
    first : int
        Which of ``ids`` is the first that is scored; those before it are context.
    """

    name: str
    ids: Sequence[int]
    prefix: tuple[int, ...]
    first: int

    @property
    def scored_tokens(self) -> int:
        """How many are scored."""
        return len(self.ids) - self.first


class Window(NamedTuple):
    """What a model is given at once.

    Attributes
    ----------
    tokens : tuple of int
        The prefix, then consecutive tokens of the text.
    first : int
        Those from this place on are scored, each given all before it; 1 or more.
    """

    tokens: tuple[int, ...]
    first: int


def learnt_tokens(content: bytes, tokens: int, sources: Sequence[TextSource]) -> int:
    """How many of the first tokens of a text something is fitted to.

    Parameters
    ----------
    content
        The text's file.
    tokens
        Of the whole text.
    sources
        Of the model's routing profile.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    profiled = [source.tokens for source in sources if source.sha256 == sha256]
    shipped = [path.read_bytes() for path in shipped_texts()]
    if content in shipped:
        profiled.append(min(tokens, DEFAULT_TOKENS // len(shipped)))
    parts = part_of_tokens(max(profiled, default=0))
    return int((parts < ROUTING_PARTS.index("test")).sum())


def passage(
    name: str,
    ids: Sequence[int],
    prefix: Sequence[int],
    learnt: int,
    most_tokens: int | None = None,
) -> Passage:
    """A text of whose tokens the first ``learnt`` are not scored.

    Parameters
    ----------
    most_tokens
        So many are scored at the most, and the text ends there.

    Raises
    ------
    TextError
        When nothing of it can be scored.
    """
    # The first token of all has nothing before it unless the model puts something there.
    first = max(learnt, 0 if prefix else 1)
    if first < len(ids):
        end = None if most_tokens is None else first + most_tokens
        return Passage(name, ids[:end], tuple(prefix), first)
    if learnt:
        why = f"a routing profile learns from the first {learnt} of {len(ids)} tokens"
    else:
        why = "one token, expected two at least: the first is only context"
    raise TextError(f"text {name}: {why}; nothing is left to score: name a longer one with --text")


def stride_tokens(window_tokens: int, prefix_tokens: int = 0) -> int:
    """How far apart windows begin: half of what they hold of a text."""
    return (window_tokens - prefix_tokens) // 2


def windows(text: Passage, window_tokens: int) -> Iterator[Window]:
    """Windows that score every token from ``text.first`` on exactly once.

    The first holds as much as a window can. Each further one moves on by the stride and scores
    what is new in it, so that but for the beginning of the text each scored token has the other
    half of a window before it.

    Parameters
    ----------
    window_tokens
        The longest, its prefix included; at least :data:`LEAST_WINDOW_TOKENS` beside that.
    """
    held = window_tokens - len(text.prefix)
    assert held >= LEAST_WINDOW_TOKENS, f"a window of {window_tokens} tokens"
    stride = stride_tokens(window_tokens, len(text.prefix))
    scored = text.first
    end = max(scored + stride, held)
    while scored < len(text.ids):
        end = min(end, len(text.ids))
        begin = max(0, end - held)
        tokens = (*text.prefix, *text.ids[begin:end])
        yield Window(tokens, len(text.prefix) + scored - begin)
        scored, end = end, end + stride
