"""Packs whose experts are quantised: the codes of the whole expert, resumed, reused and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moepack.encodings import QUANTISED, encoding
from moepack.errors import (
    GroupMismatchError,
    MoepackError,
    NonFiniteWeightError,
    PackFormatError,
    UnknownEncodingError,
)
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.layouts import layer_layout, uniform_layout
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.quantise import quantise_expert
from moepack.rounding import from_bf16
from moepack.segments import PARTS, Bits, SegmentId, cut_expert
from moepack.verify import verify
from tests.pack import plain_rounding as plain
from tests.pack.fake_models import FakeSource, SmoothSource, contents, make_plan, make_spec
from tests.pack.hostile import change_manifest

MIXED = ["INT4_G32", "INT8", "BF16", "INT4_G64"]
SPLITS = [64, 48, 16, 128]


def mixed_spec(*, bias: bool = False) -> ModelSpec:
    return make_spec(hidden=64, width=128, moe_layers=4, bias=bias)


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """Layers 1 to 4 in four encodings, with biases."""
    spec = mixed_spec(bias=True)
    pack(SmoothSource(spec), make_plan(spec, SPLITS, encodings=MIXED), tmp_path / "pack")
    return tmp_path / "pack"


@pytest.mark.parametrize("bias", [False, True])
def test_every_segment_is_cut_from_the_quantised_expert(tmp_path: Path, bias: bool) -> None:
    spec = mixed_spec(bias=bias)
    source = SmoothSource(spec)
    pack(source, make_plan(spec, SPLITS, encodings=MIXED), tmp_path / "pack")
    assert not verify(tmp_path / "pack").damages
    model = PackedModel.open(tmp_path / "pack")
    for (layer, name), expert in ((pair, e) for pair in enumerate(MIXED, 1) for e in range(3)):
        whole: Any = source.expert(layer, expert)
        if name != "BF16":
            whole = quantise_expert(whole, encoding(name), "BF16", "it")
        for part in PARTS:
            entry = model.entries.get(SegmentId(layer, expert, part))
            if entry is None:
                assert (layer, part) == (4, "bottom")
                continue
            assert entry.encoding == name
            stored = model.path(entry).read_bytes()[entry.offset_bytes :][: entry.size_bytes]
            assert stored == cut_expert(whole, entry.shape, part)


def test_safetensors_reads_what_the_format_chapter_says(quantised: Path) -> None:
    """By the library and loops over weights alone: near the source."""
    source = SmoothSource(mixed_spec(bias=True))
    experts = quantised / "experts"
    for part, columns in (("top", slice(0, 64)), ("bottom", slice(64, 128))):
        path = experts / f"layer-001.{part}.safetensors"
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata()["encoding"] == "INT4_G32"
            assert file.metadata()["version"] == "2"
            prefix = "layers.1.experts.2.down"
            codes = file.get_tensor(f"{prefix}.codes")
            assert (codes.dtype, codes.shape) == (np.uint8, (64, 32))
            group = codes.tobytes() + raw(path, f"{prefix}.scales")
        values = np.array(plain.int4_from_bytes(group, 64, 64, 32))
        weights = from_bf16(source.expert(1, 2)["down.weight"].view(np.uint16))[:, columns]
        assert np.square(values - weights).mean() < 0.01 * np.square(weights).mean()


def raw(path: Path, name: str) -> bytes:
    """A tensor's bytes, by its header: numpy has no BF16."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    return data[start + begin : start + end]


def first_line(folder: Path) -> str:
    return (folder / "manifest.json").read_text().splitlines()[0]


def test_the_version_is_2_only_where_experts_are_quantised(quantised: Path, tmp_path: Path) -> None:
    assert '"version":2' in first_line(quantised)
    spec = mixed_spec(bias=True)
    pack(SmoothSource(spec), make_plan(spec, SPLITS), tmp_path / "plain")
    assert '"version":1' in first_line(tmp_path / "plain")
    for name in ("trunk.safetensors", "experts/layer-003.top.safetensors"):
        assert (quantised / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("reused", [False, True])
def test_layers_in_the_same_encoding_are_linked(tmp_path: Path, reused: bool) -> None:
    """From a pack of version 1 to one of version 2 and on to other encodings."""
    spec = mixed_spec()
    source = SmoothSource(spec)
    packs = [["BF16"] * 4, MIXED, ["INT4_G64", *MIXED[1:]]]
    for number, names in enumerate(packs):
        source.asked.clear()
        out, before = tmp_path / f"pack {number}", tmp_path / f"pack {number - 1}"
        plan = make_plan(spec, SPLITS, encodings=names)
        report = pack(source, plan, out, reuse=before if reused and number else None)
        if reused:
            written = [{1, 2, 3, 4}, {1, 2, 4}, {1}][number]
            assert {layer for layer, _ in source.asked} == written
            assert (report.linked_bytes > 0) == (number > 0)
        pack(source, plan, tmp_path / "fresh")
        assert contents(out) == contents(tmp_path / "fresh")


def test_codes_of_another_search_are_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = mixed_spec()
    source, plan = SmoothSource(spec), make_plan(spec, SPLITS, encodings=MIXED)
    pack(source, plan, tmp_path / "old")
    source.asked.clear()
    monkeypatch.setattr("moepack.shards.ROUNDING", 2)
    pack(source, plan, tmp_path / "new", reuse=tmp_path / "old")
    assert {layer for layer, _ in source.asked} == {1, 2, 4}


class InterruptedSource(SmoothSource):
    """Ctrl-C while the last layer is read."""

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        if (layer, expert) == (4, 1):
            raise KeyboardInterrupt
        return super().expert(layer, expert)


def test_an_interrupted_pack_goes_on_with_the_layer_that_it_was_at(tmp_path: Path) -> None:
    spec = mixed_spec()
    plan = make_plan(spec, SPLITS, encodings=MIXED)
    with pytest.raises(KeyboardInterrupt):
        pack(InterruptedSource(spec), plan, tmp_path / "pack")
    source = SmoothSource(spec)
    report = pack(source, plan, tmp_path / "pack")
    assert {layer for layer, _ in source.asked} == {4}
    assert report.resumed_bytes > 0
    pack(source, plan, tmp_path / "fresh")
    assert contents(tmp_path / "pack") == contents(tmp_path / "fresh")


def test_a_weight_that_is_no_number_stops_packing_and_is_named(tmp_path: Path) -> None:
    """A dtype kept as it is carries any bits; rounding needs numbers."""
    spec = mixed_spec()

    class Broken(SmoothSource):
        def expert(self, layer: int, expert: int) -> dict[str, Bits]:
            found = super().expert(layer, expert)
            if (layer, expert) == (2, 1):
                found["up.weight"][3, 5] = 0x7FC0
            return found

    message = r"layer 2, expert 1: up\.weight: nan in row 3, column 5"
    with pytest.raises(NonFiniteWeightError, match=message):
        pack(Broken(spec), make_plan(spec, SPLITS, encodings=MIXED), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    pack(Broken(spec), make_plan(spec, SPLITS), tmp_path / "pack")


@pytest.mark.parametrize("name", QUANTISED)
def test_an_expert_of_zeros_packs_and_stays_one(tmp_path: Path, name: str) -> None:
    spec = make_spec(hidden=64, width=128)

    class Zeros(FakeSource):
        def expert(self, layer: int, expert: int) -> dict[str, Bits]:
            found = super().expert(layer, expert)
            return {tensor: np.zeros_like(bits) for tensor, bits in found.items()}

    pack(Zeros(spec), make_plan(spec, [64, 128], encodings=[name] * 2), tmp_path / "pack")
    for path in (tmp_path / "pack" / "experts").iterdir():
        data = path.read_bytes()
        payload = data[8 + int.from_bytes(data[:8], "little") :]
        # Code 8 of a grid without a step is zero; INT8 is all zeros.
        assert set(payload) <= ({0} if name == "INT8" else {0, 0x88})


@pytest.mark.parametrize(
    ("name", "width", "split", "error", "message"),
    [
        ("INT3", 128, 64, UnknownEncodingError, "layer 1: 'INT3' is not an encoding"),
        ("INT4_G64", 96, 96, GroupMismatchError, "layer 1: INT4_G64: the width of experts is 96"),
        ("INT4_G32", 96, 48, GroupMismatchError, "layer 1: INT4_G32: experts cut after 48"),
    ],
)
def test_a_plan_that_cannot_be_packed_says_why(
    tmp_path: Path, name: str, width: int, split: int, error: type[MoepackError], message: str
) -> None:
    spec = make_spec(hidden=64, width=width)
    plan = make_plan(spec, [split, split], encodings=[name] * 2)
    with pytest.raises(error, match=message):
        pack(SmoothSource(spec), plan, tmp_path / "pack")
    assert not any(tmp_path.iterdir())


def test_layouts_take_an_encoding_and_cut_where_it_can_be_cut() -> None:
    spec = mixed_spec()
    for name, step in (("INT4_G32", 32), ("INT4_G64", 64), ("INT8", 16)):
        for ratio in np.linspace(0, 1, 9):
            cut = layer_layout(spec, 1, float(ratio), name)
            assert cut.encoding == name
            assert cut.granularity == step
            assert cut.split % step == 0
            assert abs(cut.split - ratio * 128) <= step / 2
    rounded = ("INT4_G32",) * len(spec.moe_layers)
    layout = uniform_layout(spec, 0.5, encodings=rounded)
    assert {cut.encoding for cut in layout.layers} == {"INT4_G32"}
    assert uniform_layout(spec, 0.5) != layout
    with pytest.raises(GroupMismatchError):
        uniform_layout(make_spec(hidden=48, width=128), 0.5, encodings=rounded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "INT3"}, "layer 1 is encoded as 'INT3'"),
        ({"split": 48}, "layer 1: INT4_G32: experts cut after 48 neurons"),
        ({"encoding": "INT4_G64"}, "not cut as the layout says"),
        ({"encoding": "INT8"}, "not cut as the layout says"),
    ],
)
def test_a_manifest_that_lies_about_an_encoding_is_refused(
    quantised: Path, changes: dict[str, Any], message: str
) -> None:
    def lie(document: dict[str, Any]) -> None:
        document["layout"]["layers"][0] |= changes
        model = PackedModel.open(quantised)
        first = dataclasses.replace(model.layout.layers[0], **changes)
        lied = dataclasses.replace(model.layout, layers=(first, *model.layout.layers[1:]))
        document["layout_digest"] = lied.digest

    change_manifest(quantised, lie, version=2)
    with pytest.raises(PackFormatError, match=message):
        PackedModel.open(quantised)


def test_a_version_that_does_not_know_the_encodings_is_refused(quantised: Path) -> None:
    change_manifest(quantised, lambda _: None, version=1)
    with pytest.raises(PackFormatError, match="version 1, its layout is one of version 2"):
        PackedModel.open(quantised)


def test_damaged_codes_are_named(quantised: Path) -> None:
    entry = PackedModel.open(quantised).entry(SegmentId(1, 1, "bottom"))
    path = quantised / entry.path
    data = bytearray(path.read_bytes())
    data[entry.offset_bytes + 7] ^= 1
    path.write_bytes(data)
    (damage,) = verify(quantised).damages
    assert damage.what == "layer 1, expert 1, bottom (base)"


def test_layouts_of_different_encodings_have_different_digests() -> None:
    spec = mixed_spec()
    layers = len(spec.moe_layers)
    every = (None, *((name,) * layers for name in QUANTISED))
    layouts = {uniform_layout(spec, 1.0, encodings=each).digest for each in every}
    assert len(layouts) == 4
    assert isinstance(uniform_layout(spec, 1.0), Layout)
