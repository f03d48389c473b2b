"""Packs whose layers hold experts in several encodings: packed, checked, linked and refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest

from moepack import records
from moepack.budget import layer_bytes, layer_segment
from moepack.cli.inspect import pack_document
from moepack.encodings import encoding
from moepack.errors import (
    CapabilityError,
    GroupMismatchError,
    MoepackError,
    PackFormatError,
    PlanMismatchError,
)
from moepack.formats import PackedModel
from moepack.layout import LayerLayout
from moepack.layouts import cut_layout, mixed_layout
from moepack.model_spec import ModelSpec
from moepack.pack import check_plan_for, pack
from moepack.quantise import quantise_expert
from moepack.segments import PARTS, SegmentId, cut_expert
from moepack.verify import verify
from tests.pack.fake_models import SmoothSource, contents, make_plan, make_spec
from tests.pack.hostile import change_manifest

MIXED = ["INT4_G32", "INT8", "BF16", "INT8"]
OTHER = ["INT8", "INT8", "INT4_G64", "INT8"]


def mixed_spec(*, bias: bool = False) -> ModelSpec:
    return make_spec(hidden=64, width=128, experts=4, moe_layers=3, bias=bias)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Layers 1 to 3: mixed and whole, mixed and cut, all alike."""
    spec = mixed_spec(bias=True)
    plan = make_plan(spec, [128, 64, 64], encodings=[MIXED, OTHER, "INT8"])
    pack(SmoothSource(spec), plan, tmp_path / "pack")
    return tmp_path / "pack"


@pytest.mark.parametrize("bias", [False, True])
def test_every_expert_is_stored_in_its_encoding(tmp_path: Path, bias: bool) -> None:
    spec = mixed_spec(bias=bias)
    source = SmoothSource(spec)
    plan = make_plan(spec, [128, 64, 0], encodings=[MIXED, OTHER, MIXED])
    pack(source, plan, tmp_path / "pack")
    assert not verify(tmp_path / "pack").damages
    model = PackedModel.open(tmp_path / "pack")
    expected = 3 * 4 + 4  # one layer is cut
    assert len(model.entries) == expected
    for layer, names in ((1, MIXED), (2, OTHER), (3, MIXED)):
        sizes_bytes = 0
        for expert, name in enumerate(names):
            whole: Any = source.expert(layer, expert)
            if name != "BF16":
                whole = quantise_expert(whole, encoding(name), "BF16", "it")
            for part in PARTS:
                entry = model.entries.get(SegmentId(layer, expert, part))
                if entry is not None:
                    sizes_bytes += entry.stored_bytes
                    assert entry.encoding == name
                    stored = model.path(entry).read_bytes()[entry.offset_bytes :]
                    assert stored[: entry.size_bytes] == cut_expert(whole, entry.shape, part)
        assert layer_bytes(spec, plan.layout.layers[layer - 1]) == sizes_bytes


def test_what_is_inspected_says_how_many_experts_each_encoding_has(mixed: Path) -> None:
    document: Any = pack_document(PackedModel.open(mixed))
    found = [layer["experts_by_encoding"] for layer in document["layers"]]
    assert found == [
        {"BF16": 1, "INT8": 2, "INT4_G32": 1},
        {"INT8": 3, "INT4_G64": 1},
        {"INT8": 4},
    ]


def test_layers_whose_experts_are_stored_alike_are_linked(mixed: Path, tmp_path: Path) -> None:
    spec = mixed_spec(bias=True)
    source = SmoothSource(spec)
    plan = make_plan(spec, [128, 64, 64], encodings=[MIXED, [*OTHER[:3], "INT4_G32"], "INT8"])
    report = pack(source, plan, tmp_path / "new", reuse=mixed)
    assert {layer for layer, _ in source.asked} == {2}
    assert report.linked_bytes > 0
    pack(source, plan, tmp_path / "fresh")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


def test_a_layer_can_be_said_in_one_way_only() -> None:
    spec = mixed_spec()
    assert mixed_layout(spec, 1, ["INT8"] * 4) == cut_layout(spec, 1, 128, "INT8")
    whole = mixed_layout(spec, 1, MIXED)
    assert whole.classes == ("BF16", "INT8", "INT4_G32")
    assert whole.class_of(4) == (2, 1, 0, 1)
    for changes in ({"encodings": ("BF16",) * 4}, {"encoding": "INT8"}):
        with pytest.raises(ValueError, match="takes most bytes, and experts that differ"):
            dataclasses.replace(whole, **changes)


def test_a_layer_that_is_not_mixed_is_written_and_identified_as_before() -> None:
    """Its digest, known from packs of version 1, and its JSON."""
    cut = LayerLayout(3, 16, 48, 16, "BF16")
    assert records.encode(cut) == (
        '{"layer": 3, "split": 16, "width": 48, "granularity": 16, "encoding": "BF16"}'
    )
    canonical = b'{"encoding":"BF16","granularity":16,"layer":3,"split":16,"width":48}'
    assert records.digest(cut) == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize(
    ("split", "names", "error", "message"),
    [
        (128, ["INT8", "F32", "INT8", "INT8"], CapabilityError, "layer 1 as F32"),
        (48, ["INT8", "INT4_G32", "INT8", "INT8"], GroupMismatchError, "cut after 48 neurons"),
    ],
)
def test_a_mixed_layer_that_cannot_be_packed_says_why(
    split: int, names: list[str], error: type[MoepackError], message: str
) -> None:
    spec = mixed_spec()
    plan = make_plan(spec, [split, 128, 128], encodings=[names, "BF16", "BF16"])
    with pytest.raises(error, match=message):
        check_plan_for(spec, plan)


def test_encodings_of_another_number_of_experts_are_refused() -> None:
    spec = mixed_spec()
    plan = make_plan(make_spec(hidden=64, width=128, experts=5, moe_layers=3), [128] * 3)
    layers = tuple(
        dataclasses.replace(cut, encodings=("BF16", "INT8", "INT8", "INT8", "INT8"))
        for cut in plan.layout.layers
    )
    layout = dataclasses.replace(plan.layout, layers=layers, model_digest=spec.digest)
    wrong = dataclasses.replace(plan, layout=layout, model_digest=spec.digest)
    with pytest.raises(PlanMismatchError, match="stores 5 experts of layer 1, the model has 4"):
        check_plan_for(spec, wrong)


LIES: list[tuple[tuple[str, ...], str]] = [
    (("INT4_G32", "INT8", "BF16"), "layer 1 has encodings of 3 experts, and 4"),
    (("INT4_G32", "INT3", "BF16", "INT8"), "layer 1 is encoded as 'INT3'"),
    (("INT4_G32", "INT8", "BF16", "F16"), "layer 1 mixes F16 with other encodings"),
    (("INT4_G32", "BF16", "INT8", "INT8"), "lists expert 2 as BF16, the layout does not"),
    (("INT4_G64", "INT8", "BF16", "INT8"), "not cut as the layout says"),
    ((), "not cut as the layout says"),
]


@pytest.mark.parametrize(("names", "message"), LIES)
def test_a_manifest_that_lies_about_its_experts_is_refused(
    mixed: Path, names: tuple[str, ...], message: str
) -> None:
    def lie(document: dict[str, Any]) -> None:
        layout = PackedModel.open(mixed).layout
        first = dataclasses.replace(layout.layers[0], encodings=())
        if names:
            largest = "F16" if "F16" in names else "BF16"
            first = dataclasses.replace(first, encodings=names, encoding=largest)
        lied = dataclasses.replace(layout, layers=(first, *layout.layers[1:]))
        document["layout"] = records.to_data(lied)
        document["layout_digest"] = lied.digest

    change_manifest(mixed, lie, version=2)
    with pytest.raises(PackFormatError, match=message):
        PackedModel.open(mixed)


def test_an_expert_that_the_index_lists_in_two_encodings_is_refused(mixed: Path) -> None:
    def lie(document: dict[str, Any]) -> None:
        first, second = document["groups"][:2]
        second["segments"].append(first["segments"][0])

    change_manifest(mixed, lie, version=2)
    with pytest.raises(PackFormatError, match="lists expert 2 as INT8, the layout does not"):
        PackedModel.open(mixed)


def test_what_is_asked_of_a_mixed_layer_without_an_encoding_is_the_largest() -> None:
    """So memory that is sized without looking is large enough."""
    spec = mixed_spec(bias=True)
    cut = mixed_layout(spec, 1, MIXED)
    shapes = [layer_segment(spec, cut, "top", name) for name in cut.classes]
    assert layer_segment(spec, cut, "top") == shapes[0]
    sizes_bytes = [shape.size_bytes for shape in shapes if shape is not None]
    assert sizes_bytes == sorted(sizes_bytes, reverse=True)
