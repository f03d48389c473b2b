"""The artificial vocabulary of the GGUF files that are written here: a character is a token."""

from __future__ import annotations

from collections.abc import Sequence

#: Token 0. From here on there are no surrogates, and no character that a program prints.
FIRST_CHARACTER = 0x10000

#: What a file says of its vocabulary.
VOCABULARY = "U+10000"


def text_of(tokens: Sequence[int]) -> str:
    """The text that is exactly these tokens."""
    return "".join(chr(FIRST_CHARACTER + token) for token in tokens)


def tokens_of(text: str) -> list[int]:
    """The tokens of such a text; other characters are passed over."""
    codes = (ord(character) - FIRST_CHARACTER for character in text)
    return [code for code in codes if code >= 0]
