"""Runs packs with everything resident, and with almost nothing, and prints their logits as JSON.

Run by ``test_instruction_sets.py``: torch chooses its instruction set when a process begins.
Arguments: packed folders.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from moepack_runtime.int4_tiles import torch_tile_rows
from moepack_runtime.loading import open_packed

from moepack.formats import PackedModel
from tests.support.engines import all_logits
from tests.support.packs import plan_for
from tests.support.plans import placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
FOLLOWING = [17, 99, 4, 250]


def logits(packed: PackedModel, slots: int, staging: int) -> list[list[float]]:
    """At every position."""
    place = placement(
        packed.spec, packed.layout, tops=slots, bottoms=slots, staging=staging, context=96
    )
    with open_packed(packed, plan_for(packed.spec, packed.layout, place)) as engine:
        found: list[list[float]] = all_logits(engine, PROMPT, FOLLOWING).tolist()
    return found


def main(folders: list[Path]) -> None:
    packs = [PackedModel.open(folder) for folder in folders]
    found = {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "tile_rows": torch_tile_rows(),
        "logits": [[logits(packed, 99, 1), logits(packed, 1, 2)] for packed in packs],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
