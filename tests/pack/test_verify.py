"""Every byte is checked, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepack.errors import DamagedSegmentError, PackError, TruncatedShardError
from moepack.pack import replace_plan
from moepack.verify import Damage, verify
from tests.pack.fake_models import make_plan, make_spec
from tests.pack.hostile import change_manifest
from tests.pack.test_pack import Recorder

TOP = "experts/layer-001.top.safetensors"


def flip(path: Path, offset_bytes: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        (byte,) = file.read(1)
        file.seek(offset_bytes)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_whole_folder_has_no_damage(packed: Path) -> None:
    recorder = Recorder()
    report = verify(packed, progress=recorder)
    report.raise_if_damaged()
    assert not report.damages
    assert not report.extra_files
    assert (report.segments, report.trunk_tensors) == (9, 9)
    assert recorder.advanced == recorder.total == report.size_bytes
    assert recorder.ended


SHA = "its bytes do not match their SHA-256"


@pytest.mark.parametrize(
    ("path", "offset_bytes", "damage"),
    [
        (TOP, 4096, Damage(TOP, "layer 1, expert 0, top (base)", SHA)),
        (TOP, 3 * 4096 - 961, Damage(TOP, "layer 1, expert 1, top (base)", SHA)),
        (
            TOP,
            3 * 4096 - 960,
            Damage(
                TOP,
                "the padding after layer 1, expert 1, top (base)",
                "holds something other than zeros",
            ),
        ),
        (
            "trunk.safetensors",
            4096,
            Damage("trunk.safetensors", "trunk tensor embed.weight", SHA),
        ),
        ("tokenizer.json", 3, Damage("tokenizer.json", "the whole file", SHA)),
    ],
)
def test_one_flipped_bit_is_named(
    packed: Path, path: str, offset_bytes: int, damage: Damage
) -> None:
    flip(packed / path, offset_bytes)
    report = verify(packed)
    assert report.damages == (damage,)
    with pytest.raises(DamagedSegmentError, match=r"pack again \(what is whole is reused\)"):
        report.raise_if_damaged()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_bit_of_any_file_can_flip_unseen(packed: Path, data: st.DataObject) -> None:
    files = sorted(path for path in packed.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([path for path in files if path.name != "plan.json"]))
    offset_bytes = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(path, offset_bytes, bit)
    try:
        with pytest.raises(PackError):
            verify(packed).raise_if_damaged()
    finally:
        flip(path, offset_bytes, bit)


def test_all_damage_is_collected(packed: Path) -> None:
    for offset_bytes in (4096, 8192, 12288):
        flip(packed / TOP, offset_bytes)
    flip(packed / "trunk.safetensors", 4096)
    report = verify(packed)
    assert [damage.what for damage in report.damages] == [
        "trunk tensor embed.weight",
        *(f"layer 1, expert {expert}, top (base)" for expert in range(3)),
    ]
    with pytest.raises(DamagedSegmentError, match=r"trunk tensor embed\.weight.*, and 3 more"):
        report.raise_if_damaged()


def test_segments_that_have_changed_places_are_damaged(packed: Path) -> None:
    data = (packed / TOP).read_bytes()
    (packed / TOP).write_bytes(data[:4096] + data[8192:12288] + data[4096:8192] + data[12288:])
    assert [damage.what for damage in verify(packed).damages] == [
        "layer 1, expert 0, top (base)",
        "layer 1, expert 1, top (base)",
    ]


def test_an_index_with_another_crc_is_named(packed: Path) -> None:
    change_manifest(packed, lambda document: document["trunk"][0].update(crc32=1))
    (damage,) = verify(packed).damages
    assert damage.reason.endswith("not their CRC-32: the index is wrong")


def test_files_that_nobody_reads_are_named_and_do_no_harm(packed: Path) -> None:
    (packed / "experts" / ".DS_Store").write_text("")
    (packed / "notes").mkdir()
    (packed / "notes" / "link").symlink_to("/")
    report = verify(packed)
    report.raise_if_damaged()
    assert report.extra_files == ("experts/.DS_Store", "notes/link")


def test_a_plan_that_is_missing_or_for_other_segments_is_named(packed: Path) -> None:
    replace_plan(packed, make_plan(make_spec(bias=True), [16, 48], new_tokens=3))
    assert not verify(packed).damages
    path = packed / "plan.json"
    path.write_text(path.read_text().replace('"split": 16', '"split": 32'))
    (damage,) = verify(packed).damages
    assert damage.path == "plan.json"
    assert "differs from the folder's in layers 1" in damage.reason
    path.unlink()
    (damage,) = verify(packed).damages
    assert "No such file" in damage.reason


def test_a_broken_structure_is_its_own_error(packed: Path) -> None:
    (packed / TOP).write_bytes((packed / TOP).read_bytes()[:-1])
    with pytest.raises(TruncatedShardError):
        verify(packed)
