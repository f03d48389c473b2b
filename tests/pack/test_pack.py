"""What is packed is the source: cut, aligned, and readable by anybody's safetensors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.errors import CapabilityError, PlanMismatchError
from moepack.formats import PackedModel
from moepack.layout import LayerLayout, Layout
from moepack.model_spec import DTYPE_BYTES
from moepack.pack import disk_space, pack, replace_plan
from moepack.progress import Unit
from moepack.segments import Bits, SegmentId
from moepack.shard_writer import Source
from tests.pack.fake_models import BITS, FakeSource, contents, make_plan, make_spec


def read_all(path: Path) -> dict[str, tuple[str, Bits]]:
    """Every tensor of a shard as the safetensors library sees it: dtype and bits."""
    found = {}
    parsed = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    for name, fields in parsed:
        kind = BITS.get(fields["dtype"], np.uint8)
        bits = np.frombuffer(fields["data"], kind).reshape(fields["shape"])
        found[name] = (fields["dtype"], bits)
    return found


def assert_pack_is_source(folder: Path, source: Source) -> None:
    """Put every expert together again from the shards alone, by what the format says."""
    spec = source.spec
    trunk = read_all(folder / "trunk.safetensors")
    for info in spec.trunk:
        dtype, bits = trunk[info.name]
        assert dtype == info.dtype
        np.testing.assert_array_equal(bits, source.trunk_tensor(info.name).view(bits.dtype))
    for layer in spec.moe_layers:
        halves = [
            read_all(path)
            for part in ("top", "bottom")
            if (path := folder / f"experts/layer-{layer:03d}.{part}.safetensors").exists()
        ]
        for expert in range(spec.moe(layer).num_experts):
            for name, whole in source.expert(layer, expert).items():
                key = f"layers.{layer}.experts.{expert}.{name}"
                pieces = [half[key][1] for half in halves if key in half]
                axis = 1 if name == "down.weight" else 0
                if name == "down.bias":
                    assert len(pieces) == 1, "the bias of the output counts once"
                together = np.concatenate(pieces, axis)
                np.testing.assert_array_equal(together, whole.view(together.dtype))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_top_and_bottom_of_every_expert_make_up_the_source(data: st.DataObject) -> None:
    spec = make_spec(
        hidden=2 * data.draw(st.integers(1, 40)),
        width=data.draw(st.integers(1, 90)),
        experts=data.draw(st.integers(1, 5)),
        moe_layers=data.draw(st.integers(1, 3)),
        dense_layers=data.draw(st.integers(0, 1)),
        dtype=data.draw(st.sampled_from(sorted(DTYPE_BYTES))),
        bias=data.draw(st.booleans()),
    )
    splits = [data.draw(st.integers(0, spec.moe(i).intermediate_size)) for i in spec.moe_layers]
    source = FakeSource(spec, seed=data.draw(st.integers(0, 3)))
    with TemporaryDirectory() as folder:
        out = Path(folder, "pack")
        pack(source, make_plan(spec, splits), out)
        assert_pack_is_source(out, source)
        model = PackedModel.open(out)
        for entry in model.entries.values():
            assert entry.offset_bytes % 4096 == 0
            assert entry.stored_bytes % 4096 == 0


def test_one_read_of_the_stored_bytes_brings_a_whole_segment(packed: Path) -> None:
    model = PackedModel.open(packed)
    source = FakeSource(model.spec)
    entry = model.entry(SegmentId(1, 2, "bottom"))
    with model.path(entry).open("rb") as file:
        file.seek(entry.offset_bytes)
        stored = file.read(entry.stored_bytes)
    assert len(stored) == entry.stored_bytes
    whole = source.expert(1, 2)
    expected = b"".join(
        np.ascontiguousarray(piece).tobytes()
        for piece in (
            whole["gate.weight"][16:],
            whole["up.weight"][16:],
            whole["down.weight"][:, 16:],
            whole["gate.bias"][16:],
            whole["up.bias"][16:],
            whole["down.bias"],
        )
    )
    assert stored[: entry.size_bytes] == expected
    assert not any(stored[entry.size_bytes :])


def test_safetensors_opens_every_shard_lazily(packed: Path) -> None:
    shards = sorted(packed.rglob("*.safetensors"))
    assert [path.name for path in shards] == [
        "layer-001.bottom.safetensors",
        "layer-001.top.safetensors",
        "layer-002.top.safetensors",
        "trunk.safetensors",
    ]
    for path in shards:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            assert file.metadata()["format"] == "moepack"
            for name in names:
                assert math.prod(file.get_slice(name).get_shape()) > 0
                file.get_tensor(name)


def test_equal_layouts_give_equal_bytes_whatever_the_plan_and_the_name(tmp_path: Path) -> None:
    spec = make_spec()
    other = dataclasses.replace(spec, name="/home/somebody/fake")
    pack(FakeSource(spec), make_plan(spec, [16, 0], new_tokens=8), tmp_path / "one")
    pack(FakeSource(other), make_plan(spec, [16, 0], new_tokens=9), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("plan.json") != two.pop("plan.json")
    assert one == two
    assert b"somebody" not in b"".join(two.values())


def test_a_plan_of_the_same_layout_replaces_the_plan_and_no_other_does(tmp_path: Path) -> None:
    spec = make_spec()
    plan = make_plan(spec, [16, 32])
    pack(FakeSource(spec), plan, tmp_path / "pack")
    before = contents(tmp_path / "pack")
    again = make_plan(spec, [16, 32], new_tokens=99)
    replace_plan(tmp_path / "pack", again)
    assert PackedModel.open(tmp_path / "pack").plan() == again
    with pytest.raises(PlanMismatchError, match="in layers 2; pack again"):
        replace_plan(tmp_path / "pack", make_plan(spec, [16, 48]))
    with pytest.raises(PlanMismatchError, match="in the prefill block"):
        replace_plan(tmp_path / "pack", make_plan(spec, [16, 32], block_tokens=256))
    after = contents(tmp_path / "pack")
    assert before.pop("plan.json") != after.pop("plan.json")
    assert before == after


def test_a_plan_for_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec, other = make_spec(), make_spec(width=64)
    with pytest.raises(PlanMismatchError, match="plan this model first"):
        pack(FakeSource(spec), make_plan(other, [16, 32]), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cuts", "error", "message"),
    [
        ([LayerLayout(1, 16, 48, 16, "BF16")], PlanMismatchError, "cuts layers"),
        (
            [LayerLayout(1, 49, 48, 16, "BF16"), LayerLayout(2, 0, 48, 16, "BF16")],
            PlanMismatchError,
            "layer 1 at 49 of 48",
        ),
        (
            [LayerLayout(1, 16, 48, 16, "BF16"), LayerLayout(2, 0, 48, 16, "F16")],
            CapabilityError,
            "layer 2 as F16",
        ),
    ],
)
def test_a_plan_that_cannot_be_packed_says_why(
    tmp_path: Path, cuts: list[LayerLayout], error: type[Exception], message: str
) -> None:
    spec = make_spec()
    plan = make_plan(spec, [16, 32])
    placed = plan.placement.layers[: len(cuts)]
    plan = dataclasses.replace(
        plan,
        layout=Layout(spec.digest, tuple(cuts)),
        placement=dataclasses.replace(plan.placement, layers=placed),
    )
    with pytest.raises(error, match=message):
        pack(FakeSource(spec), plan, tmp_path / "pack")


def test_a_pack_keeps_no_time_and_no_path_in_its_manifest(packed: Path) -> None:
    text = (packed / "manifest.json").read_text()
    assert str(packed.parent) not in text
    assert json.loads(text)["spec"]["name"] == ""


def test_every_expert_is_read_once_and_progress_adds_up(tmp_path: Path) -> None:
    spec = make_spec()
    source = FakeSource(spec)
    recorder = Recorder()
    report = pack(source, make_plan(spec, [16, 32]), tmp_path / "pack", progress=recorder)
    assert source.asked == [(layer, expert) for layer in (1, 2) for expert in range(3)]
    assert recorder.advanced == recorder.total == report.size_bytes == report.written_bytes
    assert recorder.ended
    assert disk_space(spec, make_plan(spec, [16, 32]), tmp_path).needed_bytes > report.size_bytes


class Recorder:
    def __init__(self) -> None:
        self.total = 0
        self.advanced = 0
        self.ended = False

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        assert total is not None
        assert unit == "bytes"
        assert what
        self.total = total

    def advance(self, amount: int) -> None:
        assert amount >= 0
        self.advanced += amount

    def done(self) -> None:
        self.ended = True
