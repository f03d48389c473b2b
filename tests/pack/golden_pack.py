"""The golden pack: format version 1, byte for byte, in a form that people can read.

``golden/manifest.json`` is the file itself. A shard is its size, its header (the padding of spaces
left out) and every row of sixteen bytes that is not zero. ``python -m tests.pack.golden_pack``
writes them anew: only together with a new format version, once moepack is released.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.plan import Plan
from moepack.segments import EXPERT_TENSORS, Bits
from tests.pack.fake_models import make_plan, make_spec

GOLDEN = Path(__file__).with_name("golden")
ROW = 16


@dataclass
class CountingSource:
    """Bits whose high byte names the tensor (and the expert) and whose low byte counts."""

    spec: ModelSpec
    weights_digest: str = "c0ffee".rjust(64, "0")
    auxiliary_files: tuple[Path, ...] = ()

    def trunk_tensor(self, name: str) -> Bits:
        number = [info.name for info in self.spec.trunk].index(name)
        info = self.spec.trunk[number]
        if info.dtype == "F32":
            return np.full(info.shape, 0xF0000000 + number, np.uint32)
        return self._count(0xE0 + number, info.shape)

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        width, hidden = self.spec.moe(layer).intermediate_size, self.spec.hidden_size
        shapes = {"down.weight": (hidden, width), "gate.bias": (width,), "up.bias": (width,)}
        shapes["down.bias"] = (hidden,)
        return {
            name: self._count(16 * (expert + 1) + number, shapes.get(name, (width, hidden)))
            for number, name in enumerate(EXPERT_TENSORS)
        }

    def _count(self, high: int, shape: tuple[int, ...]) -> Bits:
        return (256 * high + np.arange(prod(shape), dtype=np.uint16)).reshape(shape)


def golden_source(folder: Path) -> tuple[CountingSource, Plan]:
    """Two experts of width 3 over a hidden size of 4, with biases, cut after one neuron."""
    spec = make_spec(hidden=4, width=3, experts=2, moe_layers=1, dense_layers=0, bias=True, vocab=3)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    source = CountingSource(replace(spec, name="golden"), auxiliary_files=(tokenizer,))
    return source, make_plan(spec, [1])


def dump(shard: bytes) -> str:
    """A shard as text."""
    header_bytes = 8 + int.from_bytes(shard[:8], "little")
    header = shard[8:header_bytes].rstrip(b" ").decode()
    rows = [
        f"{start:06x}: {shard[start : start + ROW].hex(' ', 2)}"
        for start in range(header_bytes, len(shard), ROW)
        if any(shard[start : start + ROW])
    ]
    return "\n".join([f"{len(shard)} bytes, data at {header_bytes}", header, *rows]) + "\n"


def undump(text: str) -> bytes:
    """The shard of a text."""
    first, header, *rows = text.splitlines()
    size_bytes, header_bytes = int(first.split()[0]), int(first.split()[-1])
    start = (header_bytes - 8).to_bytes(8, "little") + header.encode().ljust(header_bytes - 8)
    shard = bytearray(start.ljust(size_bytes, b"\0"))
    for row in rows:
        offset, data = row.split(": ")
        shard[int(offset, 16) : int(offset, 16) + ROW] = bytes.fromhex(data)
    return bytes(shard)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def main() -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as name:
        source, plan = golden_source(Path(name))
        out = Path(name) / "pack"
        pack(source, plan, out)
        for path in shards(out):
            (GOLDEN / f"{path.stem}.txt").write_text(dump(path.read_bytes()))
        for file in ("manifest.json", "plan.json"):
            (GOLDEN / file).write_bytes((out / file).read_bytes())


if __name__ == "__main__":
    main()
