"""What a hub test runs in a process of its own, where the client reads its environment anew.

Arguments: a hub id, ``headers`` or ``weights``, and after how many reported bytes to be
interrupted (0 for never). Prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import sys

from moepack.checkpoint import Checkpoint
from moepack.errors import MoepackError
from moepack.progress import Unit


class Recorder:
    """Adds up what it is told, and interrupts like somebody at the keyboard."""

    def __init__(self, interrupt_bytes: int) -> None:
        self.interrupt_bytes = interrupt_bytes
        self.total: int | None = None
        self.advanced = 0
        self.ended = False

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        assert (what.split(maxsplit=1)[0], unit) == ("download", "bytes")
        self.total = total

    def advance(self, amount: int) -> None:
        assert amount > 0
        self.advanced += amount
        if self.interrupt_bytes and self.advanced >= self.interrupt_bytes:
            raise KeyboardInterrupt

    def done(self) -> None:
        self.ended = True


def main(name: str, mode: str, interrupt_bytes: int) -> None:
    recorder = Recorder(interrupt_bytes)
    answer: dict[str, object] = {}
    try:
        checkpoint = Checkpoint.open(name, headers_only=mode == "headers", progress=recorder)
    except MoepackError as failure:
        answer = {"error": type(failure).__name__, "message": str(failure)}
    except KeyboardInterrupt:
        answer = {"error": "KeyboardInterrupt"}
    else:
        answer = {
            "name": checkpoint.name,
            "folder": str(checkpoint.folder) if checkpoint.folder else None,
            "spec": checkpoint.spec.digest,
            "weights": checkpoint.weights_digest,
            "source": [checkpoint.source_size.encoding, checkpoint.source_size.size_bytes],
            "auxiliary": [path.name for path in checkpoint.auxiliary_files],
        }
        if checkpoint.folder is not None:
            embedding = checkpoint.trunk_tensor("embed.weight")
            answer["embedding"] = hashlib.sha256(embedding.tobytes()).hexdigest()
    answer["progress"] = [recorder.total, recorder.advanced, recorder.ended]
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
