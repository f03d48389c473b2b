from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from moepack_runtime import direct_io, store
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import allocate
from moepack_runtime.store import CheckMode, PackStore

from moepack.budget import trunk_bytes
from moepack.errors import DamagedSegmentError, PackError, TransferError
from moepack.formats import PackedModel
from moepack.pack import pack
from moepack.segments import SegmentId, cut_expert
from tests.pack.fake_models import BITS, FakeSource, make_plan, make_spec

SPEC = make_spec(bias=True, vocab=3001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 is cut at 16 of 48, layer 2 is all top; the embedding is no whole number of pages."""
    folder = tmp_path_factory.mktemp("pack") / "pack"
    pack(FakeSource(SPEC), make_plan(SPEC, [16, 48]), folder)
    return folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
        else:
            target.write_bytes(path.read_bytes())
    return tmp_path


def flip(path: Path, offset_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 1]))


def read(opened: PackStore, segment: SegmentId, check: CheckMode = CheckMode.ALWAYS) -> bytes:
    shape = opened.shape(segment)
    memory = allocate(shape.stored_bytes).numpy()
    opened.read_into(segment, memory, check)
    return memory[: shape.size_bytes].tobytes()


def test_every_segment_is_what_cutting_the_source_gives(folder: Path) -> None:
    packed, source = PackedModel.open(folder), FakeSource(SPEC)
    opened = PackStore(packed)
    assert len(packed.entries) == 9
    for segment, entry in packed.entries.items():
        expert = source.expert(segment.layer, segment.expert)
        assert read(opened, segment) == cut_expert(expert, entry.shape, segment.part)
    opened.close()


def test_the_trunk_is_the_sources_bit_for_bit(folder: Path) -> None:
    source = FakeSource(SPEC)
    opened = PackStore.open(folder)
    trunk = opened.load_trunk()
    assert list(trunk) == [info.name for info in SPEC.trunk]
    for info in SPEC.trunk:
        bits = trunk[info.name].view(torch.uint8).numpy().reshape(-1).view(BITS[info.dtype])
        assert trunk[info.name].shape == info.shape
        assert np.array_equal(bits.reshape(info.shape), source.trunk_tensor(info.name))
    opened.close()


def test_trunk_tensors_start_on_a_cache_line_in_one_block_of_the_stated_size(folder: Path) -> None:
    opened = PackStore.open(folder)
    trunk = opened.load_trunk()
    addresses = [tensor.data_ptr() for tensor in trunk.values()]
    last = trunk[SPEC.trunk[-1].name]
    assert all(address % 64 == 0 for address in addresses)
    assert addresses == sorted(addresses)
    taken = addresses[-1] + last.nbytes - addresses[0]
    assert taken <= trunk_bytes(SPEC) < SPEC.trunk_bytes + 64 * len(SPEC.trunk) + 4096
    opened.close()


def test_on_another_device_the_trunk_is_one_block_of_the_stated_size_too(folder: Path) -> None:
    """On torch's meta device, whose memory is sizes and offsets alone."""
    opened = PackStore.open(folder)
    sources = [opened, CheckpointStore(FakeSource(SPEC), SPEC, make_plan(SPEC, [16, 48]).layout)]
    for trunk in (source.load_trunk(device=torch.device("meta")) for source in sources):
        assert [tensor.shape for tensor in trunk.values()] == [info.shape for info in SPEC.trunk]
        for tensor in trunk.values():
            assert tensor.untyped_storage().nbytes() == trunk_bytes(SPEC)
            assert tensor.storage_offset() * tensor.element_size() % 64 == 0
    opened.close()


@pytest.mark.parametrize("check", [CheckMode.FIRST, CheckMode.ALWAYS])
def test_a_damaged_segment_is_named(damaged: Path, check: CheckMode) -> None:
    packed = PackedModel.open(damaged)
    segment = SegmentId(1, 2, "bottom")
    entry = packed.entry(segment)
    opened = PackStore(packed)
    flip(packed.path(entry), entry.offset_bytes + entry.size_bytes - 1)
    for _ in range(2):
        with pytest.raises(DamagedSegmentError, match=r"layer 1, expert 2, bottom \(base\)"):
            read(opened, segment, check)
    assert read(opened, SegmentId(1, 1, "bottom"), check)
    opened.close()


def test_first_checks_once_and_never_does_not_check(damaged: Path) -> None:
    packed = PackedModel.open(damaged)
    once, unseen = SegmentId(1, 0, "top"), SegmentId(1, 1, "top")
    opened = PackStore(packed)
    good = read(opened, once, CheckMode.FIRST)
    for segment in (once, unseen):
        flip(packed.path(packed.entry(segment)), packed.entry(segment).offset_bytes)
    assert read(opened, once, CheckMode.FIRST) != good
    assert read(opened, unseen, CheckMode.NEVER)
    with pytest.raises(DamagedSegmentError):
        read(opened, once, CheckMode.ALWAYS)
    opened.close()


def test_damaged_padding_is_no_damage(damaged: Path) -> None:
    packed = PackedModel.open(damaged)
    entry = packed.entry(SegmentId(1, 0, "top"))
    assert entry.stored_bytes > entry.size_bytes
    flip(packed.path(entry), entry.offset_bytes + entry.stored_bytes - 1)
    opened = PackStore(packed)
    assert read(opened, entry.id)
    opened.close()


def test_a_damaged_trunk_tensor_is_named(damaged: Path) -> None:
    packed = PackedModel.open(damaged)
    entry = packed.trunk[0]
    flip(packed.trunk_path, entry.offset_bytes + entry.size_bytes - 1)
    opened = PackStore(packed)
    with pytest.raises(DamagedSegmentError, match=r"trunk tensor embed\.weight"):
        opened.load_trunk()
    assert opened.load_trunk(CheckMode.NEVER)
    opened.close()


def test_a_trunk_larger_than_one_step_is_read_in_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = PackStore.open(folder)
    whole = opened.load_trunk()
    monkeypatch.setattr(store, "_TRUNK_STEP_BYTES", 8192)
    stepped = opened.load_trunk()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), stepped[name].view(torch.uint8))
    opened.close()


def test_a_shard_cut_short_after_opening_is_named(damaged: Path) -> None:
    packed = PackedModel.open(damaged)
    opened = PackStore(packed)
    entry = packed.entry(SegmentId(2, 2, "top"))
    os.truncate(packed.path(entry), entry.offset_bytes + 4096)
    with pytest.raises(
        TransferError, match=r"^layer 2, expert 2, top .*002\.top\.safetensors: the file ends"
    ):
        read(opened, entry.id)
    opened.close()


def test_a_shard_that_vanished_before_opening_is_named(damaged: Path) -> None:
    packed = PackedModel.open(damaged)
    (damaged / "experts" / "layer-002.top.safetensors").unlink()
    with pytest.raises(TransferError, match=r"layer-002.top.safetensors: No such file"):
        PackStore(packed)


def test_a_segment_that_is_not_there_is_named(folder: Path) -> None:
    opened = PackStore.open(folder)
    with pytest.raises(PackError, match=r"layer 2, expert 0, bottom \(base\)"):
        opened.shape(SegmentId(2, 0, "bottom"))
    opened.close()


def test_reading_through_the_page_cache_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(direct_io, "_is_memory", lambda _: True)
    with caplog.at_level(logging.WARNING):
        opened = PackStore.open(folder)
    assert not opened.direct
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is read through the page cache (its file system keeps files in memory)" in caplog.text
    assert read(opened, SegmentId(1, 0, "top"))
    opened.close()
