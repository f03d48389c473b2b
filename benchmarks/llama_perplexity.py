"""What a GGUF's model gives every token of a text, as llama.cpp's ``llama-perplexity`` keeps it.

It cuts a text into windows of one length, runs each alone, and scores the second half of it but for
the half's first token. With ``--kl-divergence-base FILE`` it writes what the model gives each of
those: ``_logits_``; tokens of a window, entries of the vocabulary and windows (three int32); the
tokens; and for each scored one two float32, a step and the least logarithm of a probability, then a
uint16 for each entry of the vocabulary, padded to an even number: so many steps above the least. A
step is at most 16 / 65535, and what is e^16 times less likely than the likeliest counts as that.

Two such files are compared here and not by the program's own ``--kl-divergence``, whose last lines
are lost now and then when it ends; what it says is the same.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.errors import MoepackError
from moepack.quality import TokenScores

_MAGIC = b"_logits_"
_HEADER = struct.Struct("<8sIii")
_SCALE_VALUES = 4  # of uint16, that hold the two float32

#: What is less likely than e to this counts as impossible, as llama-perplexity has it: below that
#: it keeps no logarithms.
_LEAST = -16.0

Floats = npt.NDArray[np.float64]


class PerplexityError(MoepackError):
    """llama-perplexity did not go through, or scored something else."""


class _Header(NamedTuple):
    magic: bytes
    window_tokens: int
    vocab_size: int
    windows: int

    @property
    def rows(self) -> int:
        """Scored tokens of a window."""
        return self.window_tokens - first_scored(self.window_tokens)

    @property
    def row_values(self) -> int:
        """Values of uint16 that a scored token takes."""
        return _SCALE_VALUES + self.vocab_size + self.vocab_size % 2


def first_scored(window_tokens: int) -> int:
    """The place of the first token that is scored in a window."""
    return window_tokens // 2 + 1


def keep_probabilities(
    program: Path, model: Path, text: Path, out: Path, windows: npt.NDArray[np.int32]
) -> None:
    """Run a model over windows, and keep what it gives.

    Parameters
    ----------
    text
        Of all windows, one after another.
    windows
        [windows, tokens], to compare with what it has read.

    Raises
    ------
    PerplexityError
        When it does not go through, or has seen other windows.
    """
    window = str(windows.shape[1])
    command = [str(program), "-m", str(model), "-f", str(text), "-c", window, "-b", window]
    done = subprocess.run(
        [*command, "--kl-divergence-base", str(out)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode or not out.exists():
        said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        raise PerplexityError(f"{program}: exit code {done.returncode}: {said[-1]}")
    found = kept_tokens(out)
    if not np.array_equal(found, windows):
        raise PerplexityError(
            f"{program} read windows {found.shape}, expected {windows.shape} of the same tokens"
        )


def kept_tokens(path: Path) -> npt.NDArray[np.int32]:
    """The windows in such a file, [windows, tokens].

    Raises
    ------
    PerplexityError
        When it is no such file.
    """
    with path.open("rb") as file:
        header = _header(path, file.read(_HEADER.size))
        found = np.fromfile(file, np.int32, count=header.windows * header.window_tokens)
    return found.reshape(header.windows, header.window_tokens)


def compared(exact: Path, other: Path) -> Iterator[TokenScores]:
    """How far another file is from the exact model's, window by window. Peak memory: one window.

    Raises
    ------
    PerplexityError
        When one is no such file, is shorter than it says, or they are of different tokens.
    """
    tokens = kept_tokens(exact)
    if not np.array_equal(tokens, kept_tokens(other)):
        raise PerplexityError(f"{exact} and {other} are of different tokens")
    for window, exact_rows, other_rows in zip(tokens, _rows(exact), _rows(other), strict=True):
        targets = window[first_scored(len(window)) :, None]
        possible = exact_rows > _LEAST
        lost = np.where(possible, np.exp(exact_rows) * (exact_rows - other_rows), 0.0)
        same = exact_rows.argmax(axis=1) == other_rows.argmax(axis=1)
        yield TokenScores(
            nll=-np.take_along_axis(other_rows, targets, axis=1)[:, 0],
            exact_nll=-np.take_along_axis(exact_rows, targets, axis=1)[:, 0],
            kl=lost.sum(axis=1),
            agrees=same.astype(np.float64),
        )


def _rows(path: Path) -> Iterator[Floats]:
    """Logarithms of probabilities of the scored tokens of each window, [rows, vocabulary]."""
    with path.open("rb") as file:
        header = _header(path, file.read(_HEADER.size))
        file.seek(4 * header.windows * header.window_tokens, 1)
        for number in range(header.windows):
            values = np.fromfile(file, np.uint16, count=header.rows * header.row_values)
            if len(values) < header.rows * header.row_values:
                raise PerplexityError(
                    f"{path} ends within window {number}, expected {header.windows} windows"
                )
            rows = values.reshape(header.rows, header.row_values)
            scales = np.ascontiguousarray(rows[:, :_SCALE_VALUES]).view(np.float32)
            step, least = scales[:, :1].astype(np.float64), scales[:, 1:].astype(np.float64)
            yield least + step * rows[:, _SCALE_VALUES : _SCALE_VALUES + header.vocab_size]


def _header(path: Path, data: bytes) -> _Header:
    if len(data) < _HEADER.size or data[: len(_MAGIC)] != _MAGIC:
        raise PerplexityError(f"{path}: begins with {data[:8]!r}, expected {_MAGIC!r}")
    return _Header(*_HEADER.unpack(data))
