"""The golden packs: format versions 1 to 3, byte for byte, in a form that people can read.

``golden/manifest.json`` is the file itself; those of version 2 are in ``golden_quantised``, and
of a mixed layer in ``golden_mixed``; that of version 3 is in ``golden_trunk``. A shard is its size,
its header (the padding of spaces left out) and every row of sixteen bytes that is not zero.
``python -m tests.pack.golden_pack`` writes them anew: only together with a new format version, once
moepack is released.
"""

from __future__ import annotations

from collections.abc import Callable
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
GOLDEN_QUANTISED = Path(__file__).with_name("golden_quantised")
GOLDEN_MIXED = Path(__file__).with_name("golden_mixed")
GOLDEN_TRUNK = Path(__file__).with_name("golden_trunk")
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


class GridSource(CountingSource):
    """Experts whose weights are on a grid already, so that no choice of scales is involved.

    Of layer 0, for INT8: codes of -127 to 127 times 1/128, in every row 127. Of layer 1, for INT4:
    codes of 0 to 15, less 8, times 1/16, in every 32 of a row all of them.
    """

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        found = super().expert(layer, expert)
        for seed, name in enumerate(("gate.weight", "up.weight", "down.weight")):
            rows, columns = np.indices(found[name].shape)
            values = (
                np.where(columns == rows % 32, 127, (29 * rows + 53 * columns + seed) % 255 - 127)
                / 128
                if self.is_for_int8((layer, expert))
                else ((3 * rows + 7 * columns + seed) % 16 - 8) / 16
            )
            bits = np.asarray(values, np.float32).view(np.uint32)
            assert not (bits & 0xFFFF).any()
            found[name] = np.asarray(bits >> 16, np.uint16)
        return found

    def is_for_int8(self, where: tuple[int, int]) -> bool:
        return where[0] == 0


class MixedGridSource(GridSource):
    """The same in one layer: the last expert is on the grid of INT8, the others on that of INT4."""

    def is_for_int8(self, where: tuple[int, int]) -> bool:
        return where[1] == 2


def golden_mixed_source(folder: Path) -> tuple[MixedGridSource, Plan]:
    """Three experts of width 32 over a hidden size of 32, without biases, each stored otherwise."""
    spec = make_spec(hidden=32, width=32, experts=3, moe_layers=1, dense_layers=0, vocab=3)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    source = MixedGridSource(replace(spec, name="golden"), auxiliary_files=(tokenizer,))
    return source, make_plan(spec, [32], encodings=[["INT4_G32", "BF16", "INT8"]])


def golden_quantised_source(folder: Path) -> tuple[GridSource, Plan]:
    """One expert of width 64 over a hidden size of 32, with biases: as INT8 and as INT4_G32."""
    spec = make_spec(
        hidden=32, width=64, experts=1, moe_layers=2, dense_layers=0, bias=True, vocab=3
    )
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    source = GridSource(replace(spec, name="golden"), auxiliary_files=(tokenizer,))
    return source, make_plan(spec, [16, 32], encodings=["INT8", "INT4_G32"])


class TrunkGridSource(GridSource):
    """Three rows of the embedding on the grid of INT8, all others zero."""

    def trunk_tensor(self, name: str) -> Bits:
        if name != "embed.weight":
            return super().trunk_tensor(name)
        rows, columns = np.indices(self.spec.trunk[0].shape)
        codes = np.where(columns == rows % 32, 127, (29 * rows + 53 * columns) % 255 - 127)
        values = np.where(np.isin(rows, (0, 1, 256)), codes / 128, 0)
        return np.asarray(np.asarray(values, np.float32).view(np.uint32) >> 16, np.uint16)


def golden_trunk_source(folder: Path) -> tuple[TrunkGridSource, Plan]:
    """An embedding of 257 tokens that is the head as well, and one expert as INT8."""
    spec = make_spec(hidden=32, width=32, experts=1, moe_layers=1, dense_layers=0, vocab=257)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    source = TrunkGridSource(replace(spec, name="golden"), auxiliary_files=(tokenizer,))
    plan = make_plan(spec, [32], encodings=["INT8"])
    return source, replace(plan, layout=replace(plan.layout, trunk="INT8"))


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


#: What each folder is made from.
SOURCES: dict[Path, Callable[[Path], tuple[CountingSource, Plan]]] = {
    GOLDEN: golden_source,
    GOLDEN_QUANTISED: golden_quantised_source,
    GOLDEN_MIXED: golden_mixed_source,
    GOLDEN_TRUNK: golden_trunk_source,
}


def main() -> None:
    from tempfile import TemporaryDirectory

    for golden, make in SOURCES.items():
        golden.mkdir(exist_ok=True)
        with TemporaryDirectory() as name:
            source, plan = make(Path(name))
            out = Path(name) / "pack"
            pack(source, plan, out)
            for path in shards(out):
                (golden / f"{path.stem}.txt").write_text(dump(path.read_bytes()))
            for file in ("manifest.json", "plan.json"):
                (golden / file).write_bytes((out / file).read_bytes())


if __name__ == "__main__":
    main()
