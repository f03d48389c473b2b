"""Packs a model much larger than a few experts, and prints how much memory that took.

Run by ``test_memory.py`` in a process of its own. Arguments: folder, experts, hidden size, width,
encoding.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.segments import Bits
from moepack.verify import verify
from tests.pack.fake_models import FakeSource, make_plan, make_spec


@dataclass
class SteadySource:
    """Gives every expert as a fresh array, as a checkpoint that reads from the disk does."""

    spec: ModelSpec
    weights_digest: str = "0" * 64
    auxiliary_files: tuple[Path, ...] = ()

    @cached_property
    def one_expert(self) -> dict[str, Bits]:
        return FakeSource(self.spec).expert(self.spec.moe_layers[0], 0)

    def trunk_tensor(self, name: str) -> Bits:
        return FakeSource(self.spec).trunk_tensor(name)

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        return {
            name: (bits & 0xBFFF) ^ np.uint16(layer + 8 * expert)  # finite: no exponent of ones
            for name, bits in self.one_expert.items()
        }


def peak_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def main(folder: Path, experts: int, hidden: int, width: int, encoding: str) -> None:
    spec = make_spec(hidden=hidden, width=width, experts=experts)
    names = [encoding, encoding]
    source = SteadySource(spec)
    plan = make_plan(spec, [width // 4, width // 2], encodings=names)
    small = make_spec(hidden=64, width=128)
    pack(SteadySource(small), make_plan(small, [64, 64], encodings=names), folder / "imports")
    assert source.one_expert
    before_bytes = peak_bytes()
    report = pack(source, plan, folder / "pack")
    packed_bytes = peak_bytes()
    checked = verify(folder / "pack")
    checked.raise_if_damaged()
    figures = {
        "size_bytes": report.size_bytes,
        "expert_bytes": spec.expert_bytes(1),
        "model_bytes": spec.experts_bytes,
        "threads": os.cpu_count(),
        "pack_bytes": packed_bytes - before_bytes,
        "verify_bytes": peak_bytes() - packed_bytes,
        "pack_bytes_per_s": report.size_bytes / report.duration_s,
        "verify_bytes_per_s": checked.size_bytes / checked.duration_s,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    folder, experts, hidden, width, encoding = sys.argv[1:]
    main(Path(folder), int(experts), int(hidden), int(width), encoding)
