from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import allocate
from moepack_runtime.store import CheckMode, PackStore

from moepack.errors import PlanMismatchError
from moepack.formats import PackedModel
from moepack.pack import pack
from moepack.segments import SegmentId
from tests.pack.fake_models import FakeSource, make_plan, make_spec

SPEC = make_spec(bias=True)
PLAN = make_plan(SPEC, [16, 0])


def read(store: CheckpointStore | PackStore, segment: SegmentId) -> bytes:
    shape = store.shape(segment)
    memory = allocate(shape.stored_bytes).numpy()
    store.read_into(segment, memory, CheckMode.FIRST)
    return memory[: shape.size_bytes].tobytes()


def test_a_checkpoint_gives_what_its_pack_gives(tmp_path: Path) -> None:
    pack(FakeSource(SPEC), PLAN, tmp_path / "pack")
    packed = PackedModel.open(tmp_path / "pack")
    from_pack = PackStore(packed)
    from_checkpoint = CheckpointStore(FakeSource(SPEC), SPEC, PLAN.layout)
    for segment in packed.entries:
        assert from_checkpoint.shape(segment) == from_pack.shape(segment)
        assert read(from_checkpoint, segment) == read(from_pack, segment)
    trunk = from_checkpoint.load_trunk()
    for name, tensor in from_pack.load_trunk().items():
        assert trunk[name].dtype is tensor.dtype
        assert trunk[name].data_ptr() % 64 == tensor.data_ptr() % 64
        assert torch.equal(trunk[name].view(torch.uint8), tensor.view(torch.uint8))
    from_pack.close()
    from_checkpoint.close()


def test_top_and_bottom_of_one_expert_read_it_once() -> None:
    source = FakeSource(SPEC)
    store = CheckpointStore(source, SPEC, PLAN.layout)
    for expert in (0, 1, 2):
        read(store, SegmentId(1, expert, "top"))
        read(store, SegmentId(1, expert, "bottom"))
    assert source.asked == [(1, 0), (1, 1), (1, 2)]
    read(store, SegmentId(1, 0, "top"))
    assert source.asked[3:] == [(1, 0)]  # no more than two are kept


@pytest.mark.parametrize("segment", [SegmentId(0, 0, "top"), SegmentId(2, 0, "top")])
def test_a_segment_that_the_layout_lacks_is_named(segment: SegmentId) -> None:
    store = CheckpointStore(FakeSource(SPEC), SPEC, PLAN.layout)
    with pytest.raises(PlanMismatchError, match=rf"layer {segment.layer}, expert 0, top"):
        store.shape(segment)


def test_another_dtype_than_the_models_is_refused() -> None:
    layers = tuple(dataclasses.replace(cut, encoding="F16") for cut in PLAN.layout.layers)
    layout = dataclasses.replace(PLAN.layout, layers=layers)
    with pytest.raises(PlanMismatchError, match="planned as F16, the checkpoint holds BF16"):
        CheckpointStore(FakeSource(SPEC), SPEC, layout)
