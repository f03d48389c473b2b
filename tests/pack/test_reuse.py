"""Packing over an earlier pack: equal layers are linked, damaged ones are made anew."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from moepack import work_folder
from moepack.errors import OutputError, PackFormatError
from moepack.pack import pack
from moepack.verify import verify
from tests.pack.fake_models import FakeSource, contents, make_plan, make_spec

UNCHANGED = "experts/layer-001.top.safetensors"


def straight(source: FakeSource, splits: list[int], folder: Path) -> dict[str, bytes]:
    """The files of a pack that nothing came before."""
    pack(source, make_plan(source.spec, splits), folder / "straight")
    return contents(folder / "straight")


def test_unchanged_layers_are_links_and_the_bytes_those_of_a_fresh_pack(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    pack(source, make_plan(source.spec, [16, 32]), tmp_path / "old")
    source.asked.clear()
    report = pack(source, make_plan(source.spec, [16, 0]), tmp_path / "new", reuse=tmp_path / "old")
    assert {layer for layer, _ in source.asked} == {2}
    assert report.linked_bytes + report.written_bytes == report.size_bytes
    for name in (UNCHANGED, "experts/layer-001.bottom.safetensors", "trunk.safetensors"):
        assert (tmp_path / "new" / name).samefile(tmp_path / "old" / name)
    assert contents(tmp_path / "new") == straight(source, [16, 0], tmp_path)


def test_packing_in_place_replaces_the_folder_and_reuses_it(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    out = tmp_path / "pack"
    pack(source, make_plan(source.spec, [16, 32]), out)
    inode = (out / UNCHANGED).stat().st_ino
    report = pack(source, make_plan(source.spec, [16, 48]), out)
    assert report.linked_bytes > 0
    assert (out / UNCHANGED).stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
    assert contents(out) == straight(source, [16, 48], tmp_path)


def test_packing_again_repairs_what_is_damaged(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    out = tmp_path / "pack"
    plan = make_plan(source.spec, [16, 32])
    pack(source, plan, out)
    whole = contents(out)
    damaged = bytearray(whole[UNCHANGED])
    damaged[5000] ^= 1
    (out / UNCHANGED).write_bytes(damaged)
    assert verify(out).damages
    source.asked.clear()
    pack(source, plan, out)
    assert {layer for layer, _ in source.asked} == {1}
    assert contents(out) == whole


def test_writing_never_goes_through_a_link_into_the_earlier_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two links fails; the layer is written instead, the donor stays as it was."""
    source = FakeSource(make_spec())
    pack(source, make_plan(source.spec, [16, 32]), tmp_path / "old")
    before = contents(tmp_path / "old")
    link = Path.hardlink_to

    def failing(self: Path, target: Path) -> None:
        if "bottom" in self.name:
            raise OSError(errno.EMLINK, "Too many links")
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", failing)
    pack(source, make_plan(source.spec, [16, 32]), tmp_path / "new", reuse=tmp_path / "old")
    assert not (tmp_path / "new" / UNCHANGED).samefile(tmp_path / "old" / UNCHANGED)
    assert contents(tmp_path / "old") == before == contents(tmp_path / "new")


def test_a_pack_of_other_weights_is_replaced_and_not_reused(tmp_path: Path) -> None:
    spec = make_spec()
    plan = make_plan(spec, [16, 32])
    pack(FakeSource(spec, seed=1), plan, tmp_path / "pack")
    report = pack(FakeSource(spec, seed=2), plan, tmp_path / "pack")
    assert report.linked_bytes == 0
    assert contents(tmp_path / "pack") == straight(FakeSource(spec, seed=2), [16, 32], tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_a_broken_pack_is_replaced(tmp_path: Path, damage: bytes | None) -> None:
    """Its manifest still begins as one; a folder without that is somebody else's."""
    source = FakeSource(make_spec())
    plan = make_plan(source.spec, [16, 32])
    pack(source, plan, tmp_path / "pack")
    whole = contents(tmp_path / "pack")
    manifest = tmp_path / "pack" / "manifest.json"
    if damage is None:
        manifest.write_bytes(manifest.read_bytes()[:300])
        pack(source, plan, tmp_path / "pack")
        assert contents(tmp_path / "pack") == whole
    else:
        manifest.write_bytes(damage)
        with pytest.raises(OutputError, match="is not a packed folder"):
            pack(source, plan, tmp_path / "pack")


def test_what_is_not_a_pack_is_never_replaced(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    plan = make_plan(source.spec, [16, 32])
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("42")
    file.write_text("42")
    for out in (folder, file):
        with pytest.raises(OutputError, match="exists and is not a packed folder"):
            pack(source, plan, out)
    assert contents(tmp_path) == {"folder/thesis.txt": b"42", "file": b"42"}


def test_an_empty_folder_and_a_link_to_one_may_become_the_pack(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    plan = make_plan(source.spec, [16, 32])
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    pack(source, plan, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not verify(tmp_path / "disk").damages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_folder_of_broken_structure_is_repaired_from_the_source(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    plan = make_plan(source.spec, [16, 32])
    out = tmp_path / "pack"
    pack(source, plan, out)
    whole = contents(out)
    (out / UNCHANGED).write_bytes(b"")
    with pytest.raises(PackFormatError, match="pack again"):
        verify(out)
    pack(source, plan, out, reuse=out)
    assert contents(out) == whole


def test_a_folder_to_reuse_that_is_no_pack_gives_nothing(tmp_path: Path) -> None:
    source = FakeSource(make_spec())
    report = pack(source, make_plan(source.spec, [16, 32]), tmp_path / "pack", reuse=tmp_path)
    assert report.linked_bytes == 0


def test_where_folders_cannot_change_places_in_one_step_they_do_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_folder, "_exchange_at_once", lambda *_: False)
    source = FakeSource(make_spec())
    pack(source, make_plan(source.spec, [16, 32]), tmp_path / "pack")
    pack(source, make_plan(source.spec, [16, 48]), tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
    assert contents(tmp_path / "pack") == straight(source, [16, 48], tmp_path)
