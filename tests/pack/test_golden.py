"""The bytes of format version 1 do not change, and packs of version 1 stay readable."""

from __future__ import annotations

from pathlib import Path

from moepack.formats import PackedModel
from moepack.pack import pack
from moepack.segments import SegmentId
from moepack.verify import verify
from tests.pack.golden_pack import GOLDEN, dump, golden_source, shards, undump


def test_packing_gives_the_golden_bytes(tmp_path: Path) -> None:
    source, plan = golden_source(tmp_path)
    pack(source, plan, tmp_path / "pack")
    for path in shards(tmp_path / "pack"):
        assert dump(path.read_bytes()) == (GOLDEN / f"{path.stem}.txt").read_text(), path.name
        assert undump(dump(path.read_bytes())) == path.read_bytes()
    manifest = (tmp_path / "pack" / "manifest.json").read_text()
    assert manifest == (GOLDEN / "manifest.json").read_text()


def test_the_golden_pack_can_be_read(tmp_path: Path) -> None:
    """As a folder that an earlier moepack has written: nothing here is written by this one."""
    (tmp_path / "experts").mkdir()
    for name in ("trunk", "experts/layer-000.top", "experts/layer-000.bottom"):
        text = (GOLDEN / f"{Path(name).name}.txt").read_text()
        (tmp_path / f"{name}.safetensors").write_bytes(undump(text))
    for name in ("manifest.json", "plan.json"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")

    assert not verify(tmp_path).damages
    model = PackedModel.open(tmp_path)
    entry = model.entry(SegmentId(0, 1, "bottom"))
    assert (entry.offset_bytes, entry.size_bytes, entry.stored_bytes) == (8192, 64, 4096)
    payload = model.path(entry).read_bytes()[8192 : 8192 + 64]
    # Expert 1: gate is 0x20.., up 0x21.., down 0x22..; rows (columns of down) 1 and 2 are below.
    assert payload.hex(" ", 2) == (
        "0420 0520 0620 0720 0820 0920 0a20 0b20 "
        "0421 0521 0621 0721 0821 0921 0a21 0b21 "
        "0122 0222 0422 0522 0722 0822 0a22 0b22 "
        "0123 0223 0124 0224 0025 0125 0225 0325"
    )
