"""Runs a packed model, and prints what memory that took.

Run by ``test_memory_limit.py`` in a process of its own, inside a control group. Arguments: the
packed folder, prompt tokens, new tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moepack_runtime.loading import open_packed
from moepack_runtime.sampling import Sampler, SamplingParams

from moepack.formats import PackedModel


def main(folder: Path, prompt_tokens: int, new_tokens: int) -> None:
    packed = PackedModel.open(folder)
    prompt = [(7 * place * place + 3 * place + 5) % 4000 + 3 for place in range(prompt_tokens)]
    with open_packed(packed, packed.plan()) as engine:
        sampler = Sampler(SamplingParams(temperature=1.0))
        tokens = list(engine.generate(prompt, max_new_tokens=new_tokens, sampler=sampler))
        stats = engine.stats()
    figures = {
        "tokens": len(tokens),
        "process_base_bytes": stats.process_base_bytes,
        "peak_process_bytes": stats.peak_process_bytes,
        "link_bytes_per_token": stats.link_bytes_per_token,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
