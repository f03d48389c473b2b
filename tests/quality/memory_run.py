"""Evaluates a packed model, and prints what memory that took.

Run by ``test_memory.py`` in a process of its own. Arguments: the packed folder, the checkpoint, a
text, a folder for scratch.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from moepack_runtime.memory import resident_bytes

from moepack.checkpoint import Checkpoint
from moepack.evaluating import Evaluation, evaluate
from moepack.formats import PackedModel
from moepack.texts import read_texts


class Watch(threading.Thread):
    """Looks every few milliseconds, because the kernel's own peak begins anew with each engine."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def end(self) -> None:
        self._over.set()
        self.join()


def main(packed: Path, exact: Path, text: Path, scratch: Path) -> None:
    model = PackedModel.open(packed)
    checkpoint = Checkpoint.open(exact)
    (whole,) = read_texts([text])

    def run(tokens: int | None) -> Evaluation:
        return evaluate(
            model,
            model.plan(),
            [whole],
            exact=checkpoint,
            sources=(),
            scratch=scratch,
            most_tokens=tokens,
        )

    run(20)  # loads the libraries
    base_bytes = resident_bytes()
    watch = Watch()
    watch.start()
    found = run(None)
    watch.end()
    figures = {
        "tokens": found.quality.tokens,
        "kl": None if found.quality.nearness is None else found.quality.nearness.kl.value,
        "base_bytes": base_bytes,
        "peak_bytes": watch.peak_bytes,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]))
