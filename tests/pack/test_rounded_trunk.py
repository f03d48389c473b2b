"""Packs whose trunk is rounded: which matrices, how well, under which version, and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.errors import (
    NonFiniteWeightError,
    PackFormatError,
    PackVersionError,
    PlanMismatchError,
    UnknownEncodingError,
)
from moepack.formats import PackedModel
from moepack.model_spec import ModelSpec, TensorInfo
from moepack.pack import pack, replace_plan
from moepack.plan import Plan
from moepack.quantise import stored_tensors
from moepack.rounding import from_bf16
from moepack.segments import Bits
from moepack.trunk import TrunkPart, rounded_matrices, trunk_parts
from moepack.verify import verify
from tests.pack import plain_rounding as plain
from tests.pack.fake_models import FakeSource, SmoothSource, _normal_bf16, contents, make_plan
from tests.pack.fake_models import make_spec as make_small_spec
from tests.pack.hostile import change_manifest

MATRICES = {
    "attn.q.weight": (128, 64),
    "attn.k.weight": (32, 64),  # too small to gain
    "attn.q_norm.weight": (96,),
    "attn.q.bias": (96,),
    "attn.kv_b.weight": (256, 64),
    "shared.gate.weight": (160, 64),
    "shared_gate.weight": (1, 64),
    "router.weight": (512, 64),
}


def make_spec() -> ModelSpec:
    """One layer of experts, with what a trunk may hold."""
    spec = make_small_spec(hidden=64, width=64, moe_layers=1, dense_layers=0, vocab=150)
    kept = [info for info in spec.trunk if "router" not in info.name]
    extra = [TensorInfo(f"layers.0.{name}", "BF16", shape) for name, shape in MATRICES.items()]
    return dataclasses.replace(spec, trunk=(*kept, *extra))


class SmoothTrunk(SmoothSource):
    """A trunk like trained ones, too."""

    def trunk_tensor(self, name: str) -> Bits:
        return _normal_bf16(super().trunk_tensor(name))


def rounded(plan: Plan, trunk: str = "INT8") -> Plan:
    return dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, trunk=trunk))


@pytest.fixture
def source() -> SmoothTrunk:
    return SmoothTrunk(make_spec())


@pytest.fixture
def folder(source: SmoothTrunk, tmp_path: Path) -> Path:
    pack(source, rounded(make_plan(source.spec, [64])), tmp_path / "pack")
    return tmp_path / "pack"


def test_large_matrices_alone_are_rounded(source: SmoothTrunk, folder: Path) -> None:
    """And everything else is what the checkpoint holds, bit for bit."""
    assert not verify(folder).damages
    with safetensors.safe_open(folder / "trunk.safetensors", "np") as shard:
        names = {name for name in sorted(shard.keys()) if not name.startswith("__")}
        kinds = {name: shard.get_slice(name).get_dtype() for name in names}
    codes = {name for name, dtype in kinds.items() if dtype == "I8"}
    assert codes == {"embed.weight", "layers.0.attn.q.weight", "layers.0.shared.gate.weight"}
    scales = {name.replace(".weight", ".scale") for name in codes}
    assert names == {info.name for info in source.spec.trunk} | scales
    data = (folder / "trunk.safetensors").read_bytes()
    for tensor in PackedModel.open(folder).trunk:
        if tensor.name not in codes | scales:
            found = data[tensor.offset_bytes :][: tensor.size_bytes]
            assert found == source.trunk_tensor(tensor.name).tobytes(), tensor.name


def test_a_matrix_is_rounded_where_that_takes_fewer_pages() -> None:
    """In BF16 more than 4096 weights; in F32 fewer gain already."""
    spec = make_spec()
    for dtype, rows, gains in (("BF16", 64, False), ("BF16", 160, True), ("F32", 64, True)):
        head = TensorInfo("head.weight", dtype, (rows, 64))
        found = rounded_matrices(dataclasses.replace(spec, trunk=(head,)), "INT8")
        assert bool(found) == gains, (dtype, rows)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    inputs=st.sampled_from([1, 3, 16, 50, 128]),
    seed=st.integers(0, 1 << 32),
    exponent=st.integers(-30, 30),
)
def test_no_row_is_worse_than_by_plain_rounding(
    rows: int, inputs: int, seed: int, exponent: int
) -> None:
    draw = np.random.default_rng(seed)
    weights = (draw.standard_normal((rows, inputs)) * 2.0**exponent).astype(np.float32)
    weights[draw.random(rows) < 0.2] = 0
    info = TensorInfo("head.weight", "F32", (rows, inputs))
    part = dataclasses.replace(make_spec(), trunk=(info,))
    (tensors,) = (item.tensors for item in trunk_parts(part, ""))
    stored = TrunkPart(info, (*tensors, *tensors))  # whatever its size
    codes, scale = stored_tensors(weights.view(np.uint32), stored)
    values = codes.view(np.int8).reshape(rows, inputs) * from_bf16(scale.view(np.uint16))[:, None]
    for row in range(rows):
        ones = [1.0] * inputs
        exact = [float(value) for value in weights[row]]
        naive = plain.loss(exact, ones, plain.naive_int8(exact))
        assert plain.loss(exact, ones, [float(value) for value in values[row]]) <= naive * 1.0001


def test_equal_layouts_give_equal_bytes_and_reuse_experts(
    source: SmoothTrunk, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    exact = pack(source, make_plan(source.spec, [64]), other, reuse=folder)
    assert exact.linked_bytes > 0, "the experts are the same"
    assert (other / "experts/layer-000.top.safetensors").samefile(
        folder / "experts/layer-000.top.safetensors"
    )
    before = contents(folder)
    again = pack(SmoothTrunk(source.spec), rounded(make_plan(source.spec, [64])), other)
    assert again.written_bytes > 0
    assert contents(other) == before
    assert before["trunk.safetensors"].count(b'"version":"3"') == 1


def test_an_older_moepack_is_told_that_the_pack_is_newer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((folder / "manifest.json").read_text())["version"] == 3
    monkeypatch.setattr("moepack.manifest.VERSIONS", (1, 2))
    with pytest.raises(PackVersionError, match=r"format version 3, .* reads 1 and 2; update"):
        PackedModel.open(folder)


def test_a_plan_for_another_trunk_is_named(source: SmoothTrunk, folder: Path) -> None:
    with pytest.raises(PlanMismatchError, match="the plan's trunk is exact, the folder's int8"):
        replace_plan(folder, make_plan(source.spec, [64]))


def test_an_unknown_encoding_is_refused(source: SmoothTrunk, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownEncodingError, match="a trunk in int4_g32, expected one in exact or int8"
    ):
        pack(source, rounded(make_plan(source.spec, [64]), "INT4_G32"), tmp_path / "other")


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    """Random bits hold some; what is stored exactly may."""
    spec = make_spec()
    with pytest.raises(NonFiniteWeightError, match=r"trunk tensor embed\.weight: .* in row"):
        pack(FakeSource(spec), rounded(make_plan(spec, [64])), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_trunk_that_is_not_what_the_layout_says_is_refused(folder: Path) -> None:
    def drop(manifest: dict[str, list[object]]) -> None:
        del manifest["trunk"][1]

    change_manifest(folder, drop, version=3)
    with pytest.raises(PackFormatError, match="does not list the model's trunk tensors in order"):
        PackedModel.open(folder)
