"""Texts to run a model on: read whole, refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moepack.errors import TextError


class Text(NamedTuple):
    """A text file: its name, its bytes, and what they say."""

    name: str
    content: bytes
    text: str


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Name, bytes and text of each file.

    Raises
    ------
    TextError
        When a file cannot be read, is not UTF-8 or is empty.
    """
    texts = []
    for path in paths:
        try:
            content = path.read_bytes()
            texts.append(Text(path.name, content, content.decode()))
        except OSError as failure:
            raise TextError(f"text {path}: {failure.strerror}; name a readable file") from None
        except UnicodeDecodeError as failure:
            raise TextError(f"text {path}: not UTF-8 ({failure}); convert it first") from None
        if not content:
            raise TextError(f"text {path}: is empty; name one of some thousand tokens")
    return texts
