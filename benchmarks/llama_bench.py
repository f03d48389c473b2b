"""llama.cpp's own benchmark, ``llama-bench``, as one of the programs that take turns.

Each turn is a process of its own, which maps the GGUF, runs once to warm up and once to be timed.
It draws its tokens by itself; those that it generates follow a prompt, as everybody's do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks.llama_runners import find_binary
from moepack.errors import MoepackError

_PROGRAM = "llama-bench"


class LlamaBenchError(MoepackError):
    """llama-bench did not go through, or printed something else."""


class LlamaBench(NamedTuple):
    """The program on a model, with so many threads."""

    program: Path
    gguf: Path
    threads: int

    def prefill(self, prompt_tokens: int) -> float:
        """Tokens per second of a prompt."""
        return self._run("-p", str(prompt_tokens), "-n", "0")

    def decode(self, prompt_tokens: int, new_tokens: int) -> float:
        """Tokens per second behind a prompt."""
        return self._run("-p", "0", "-n", str(new_tokens), "-d", str(prompt_tokens))

    def _run(self, *test: str) -> float:
        command = [str(self.program), "-m", str(self.gguf), "-t", str(self.threads)]
        command += ["-r", "1", "-o", "json", *test]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LlamaBenchError(
                f"{' '.join(command)} ended with {done.returncode}: "
                f"{(done.stderr.strip().splitlines() or ['nothing said'])[-1]}; "
                "run it by hand, or leave --llama-cpp out"
            )
        return parse_speed(done.stdout)


def parse_speed(answer: str) -> float:
    """Tokens per second, from what ``llama-bench -o json`` prints of one test.

    Raises
    ------
    LlamaBenchError
        When that is no such thing.
    """
    try:
        (test,) = json.loads(answer)
        return float(statistics.median(test["samples_ts"]))
    except (ValueError, KeyError, TypeError) as failure:
        raise LlamaBenchError(
            f"{_PROGRAM} printed {answer[:80]!r}; expected one test with its samples_ts; "
            "take a llama.cpp whose llama-bench knows -o json"
        ) from failure


def find_llama_bench(folder: Path | None, gguf: Path | None, threads: int) -> LlamaBench | str:
    """The program and its model, or why there is none."""
    program = find_binary(folder, (_PROGRAM,))
    if program is None or not program.is_file():
        return f"no {_PROGRAM} was given, or it is not there"
    if gguf is None or not gguf.is_file():
        return "no GGUF was given, or it is not there"
    return LlamaBench(program, gguf, threads)
