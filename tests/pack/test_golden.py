"""The bytes of a format version do not change, and packs of every version stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepack.formats import PackedModel
from moepack.pack import pack
from moepack.segments import SegmentId
from moepack.verify import verify
from tests.pack.golden_pack import (
    GOLDEN,
    GOLDEN_MIXED,
    GOLDEN_QUANTISED,
    GOLDEN_TRUNK,
    SOURCES,
    dump,
    shards,
    undump,
)


@pytest.mark.parametrize("golden", SOURCES, ids=lambda golden: golden.name)
def test_packing_gives_the_golden_bytes(tmp_path: Path, golden: Path) -> None:
    source, plan = SOURCES[golden](tmp_path)
    pack(source, plan, tmp_path / "pack")
    for path in shards(tmp_path / "pack"):
        assert dump(path.read_bytes()) == (golden / f"{path.stem}.txt").read_text(), path.name
        assert undump(dump(path.read_bytes())) == path.read_bytes()
    manifest = (tmp_path / "pack" / "manifest.json").read_text()
    assert manifest == (golden / "manifest.json").read_text()


def written_long_ago(golden: Path, folder: Path) -> PackedModel:
    """A folder as an earlier moepack has written it: nothing here is written by this one."""
    (folder / "experts").mkdir()
    for path in golden.glob("*.txt"):
        place = folder if path.stem == "trunk" else folder / "experts"
        (place / f"{path.stem}.safetensors").write_bytes(undump(path.read_text()))
    for name in ("manifest.json", "plan.json"):
        (folder / name).write_bytes((golden / name).read_bytes())
    (folder / "tokenizer.json").write_text("{}")
    assert not verify(folder).damages
    return PackedModel.open(folder)


def payload_of(model: PackedModel, segment: SegmentId) -> bytes:
    entry = model.entry(segment)
    return model.path(entry).read_bytes()[entry.offset_bytes :][: entry.size_bytes]


def test_the_golden_pack_of_version_1_can_be_read(tmp_path: Path) -> None:
    model = written_long_ago(GOLDEN, tmp_path)
    entry = model.entry(SegmentId(0, 1, "bottom"))
    assert (entry.offset_bytes, entry.size_bytes, entry.stored_bytes) == (8192, 64, 4096)
    # Expert 1: gate is 0x20.., up 0x21.., down 0x22..; rows (columns of down) 1 and 2 are below.
    assert payload_of(model, entry.id).hex(" ", 2) == (
        "0420 0520 0620 0720 0820 0920 0a20 0b20 "
        "0421 0521 0621 0721 0821 0921 0a21 0b21 "
        "0122 0222 0422 0522 0722 0822 0a22 0b22 "
        "0123 0223 0124 0224 0025 0125 0225 0325"
    )


def code_of_int8(row: int, column: int, seed: int) -> int:
    code = 127 if column == row % 32 else (29 * row + 53 * column + seed) % 255 - 127
    return code % 256


def test_the_golden_segment_of_int8_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    """One byte after another, for the neurons from 16 on of 64, over a hidden size of 32."""
    model = written_long_ago(GOLDEN_QUANTISED, tmp_path)
    scale = bytes.fromhex("003c")  # 1/128
    expected = [
        *(code_of_int8(row, column, 0) for row in range(16, 64) for column in range(32)),
        *(code_of_int8(row, column, 1) for row in range(16, 64) for column in range(32)),
        *(48 * scale),
        *(48 * scale),
        *(code_of_int8(row, column, 2) for row in range(32) for column in range(16, 64)),
        *(32 * scale),
    ]
    for high, numbers in ((0x13, range(16, 64)), (0x14, range(16, 64)), (0x15, range(32))):
        expected += [byte for number in numbers for byte in (number, high)]  # the biases
    assert payload_of(model, SegmentId(0, 0, "bottom")) == bytes(expected)


def test_the_golden_segment_of_int4_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    """Neurons from 32 on: 32 rows of gate and as many of up are a tile; down's 32 rows are left."""
    model = written_long_ago(GOLDEN_QUANTISED, tmp_path)

    def code(row: int, column: int, seed: int) -> int:
        return (3 * row + 7 * column + seed) % 16

    expected = [code(32 + r, k, 0) | code(32 + r, k, 1) << 4 for k in range(32) for r in range(32)]
    expected += 64 * bytes.fromhex("803d0000")  # scale 1/16, offset 0
    expected += [
        code(2 * r, k, 2) | code(2 * r + 1, k, 2) << 4 for k in range(32, 64) for r in range(16)
    ]
    expected += 32 * bytes.fromhex("803d0000")
    for high, numbers in ((0x13, range(32, 64)), (0x14, range(32, 64)), (0x15, range(32))):
        expected += [byte for number in numbers for byte in (number, high)]
    assert payload_of(model, SegmentId(1, 0, "bottom")) == bytes(expected)


def test_the_golden_mixed_layer_holds_every_expert_in_its_encoding(tmp_path: Path) -> None:
    """One shard, experts in their order, each as large as its encoding makes it."""
    model = written_long_ago(GOLDEN_MIXED, tmp_path)
    assert model.layout.layers[0].encodings == ("INT4_G32", "BF16", "INT8")
    found = [model.entry(SegmentId(0, expert, "top")) for expert in range(3)]
    assert [entry.encoding for entry in found] == ["INT4_G32", "BF16", "INT8"]
    codes, scales = 3 * 32 * 32 // 2, 3 * 32 * 4
    sizes_bytes = [codes + scales, 3 * 32 * 32 * 2, 3 * 32 * 32 + 3 * 32 * 2]
    assert [entry.size_bytes for entry in found] == sizes_bytes
    assert [entry.offset_bytes for entry in found] == [4096, 8192, 16384]
    assert {entry.path for entry in found} == {"experts/layer-000.top.safetensors"}
    # INT8's codes of gate: row by row, with those of up behind them.
    payload = payload_of(model, found[2].id)
    expected = [code_of_int8(row, column, 0) for row in range(32) for column in range(32)]
    assert payload[:1024] == bytes(expected)
    # In BF16 minus a half, then minus a sixteenth.
    assert payload_of(model, found[1].id)[:4].hex() == "00bf80bd"


def test_the_golden_trunk_of_int8_is_laid_out_as_the_format_says(tmp_path: Path) -> None:
    """Codes of the embedding row by row; its scales, aligned, are the next tensor."""
    model = written_long_ago(GOLDEN_TRUNK, tmp_path)
    assert (tmp_path / "manifest.json").read_text().startswith('{"format":"moepack","version":3,')
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in model.trunk] == [
        ("embed.weight", "I8", (257, 32)),
        ("embed.scale", "BF16", (257,)),
        ("layers.0.attn_norm.weight", "BF16", (32,)),
        ("layers.0.router.weight", "BF16", (1, 32)),
        ("layers.0.router.correction_bias", "F32", (1,)),
        ("norm.weight", "BF16", (32,)),
    ]
    codes, scales, norm = model.trunk[:3]
    assert [scales.offset_bytes, norm.offset_bytes] == [
        codes.offset_bytes + 12288,
        codes.offset_bytes + 16384,
    ]
    shard = (tmp_path / "trunk.safetensors").read_bytes()
    told = (0, 1, 256)
    expected = [
        code_of_int8(row, column, 0) if row in told else 0
        for row in range(257)
        for column in range(32)
    ]
    assert shard[codes.offset_bytes :][: codes.size_bytes] == bytes(expected)
    scale = {row: "003c" if row in told else "0000" for row in range(257)}  # 1/128, and 0
    found = shard[scales.offset_bytes :][: scales.size_bytes]
    assert found.hex(" ", 2) == " ".join(scale.values())
