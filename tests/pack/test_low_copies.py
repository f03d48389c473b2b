"""Packs with a low copy of every expert: written, checked, linked, and refused by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moepack.encodings import encoding
from moepack.errors import GroupMismatchError, PackFormatError, PlanError, PlanMismatchError
from moepack.formats import PackedModel, check_plan_fits
from moepack.model_spec import ModelSpec
from moepack.pack import check_plan_for, pack
from moepack.plan import OnMiss, Plan
from moepack.quantise import quantise_expert
from moepack.segments import LOW, SegmentId, cut_expert
from moepack.verify import verify
from tests.pack.fake_models import SmoothSource, contents, make_plan, make_spec
from tests.pack.hostile import change_manifest

SPLITS = [128, 64, 0]


def model() -> ModelSpec:
    return make_spec(hidden=64, width=128, experts=4, moe_layers=3, bias=True)


def with_low(plan: Plan, name: str) -> Plan:
    return replace(plan, layout=replace(plan.layout, low=name))


@pytest.mark.parametrize("name", ["INT8", "INT4_G32"])
def test_every_part_has_a_low_copy_cut_from_the_whole_expert(tmp_path: Path, name: str) -> None:
    spec = model()
    source = SmoothSource(spec)
    pack(source, with_low(make_plan(spec, SPLITS), name), tmp_path / "pack")
    assert not verify(tmp_path / "pack").damages
    found = PackedModel.open(tmp_path / "pack")
    assert found.manifest.version == 2
    copies = [entry for entry in found.entries.values() if entry.id.variant == LOW]
    assert 2 * len(copies) == len(found.entries)
    for entry in copies:
        exact = found.entry(replace(entry.id, variant="base"))
        assert entry.encoding == name
        assert entry.stored_bytes < exact.stored_bytes
        assert entry.path == exact.path.replace(".safetensors", ".low.safetensors")
        weights = source.expert(entry.id.layer, entry.id.expert)
        whole = quantise_expert(weights, encoding(name), "BF16", "it")
        stored = found.path(entry).read_bytes()[entry.offset_bytes :][: entry.size_bytes]
        assert stored == cut_expert(whole, entry.shape, entry.id.part)


def test_a_pack_without_low_copies_gives_one_with_them_all_the_rest(tmp_path: Path) -> None:
    spec = model()
    plan = make_plan(spec, SPLITS)
    plain = pack(SmoothSource(spec), plan, tmp_path / "plain")
    source = SmoothSource(spec)
    report = pack(source, with_low(plan, "INT4_G32"), tmp_path / "new", reuse=tmp_path / "plain")
    assert report.linked_bytes == plain.size_bytes
    pack(SmoothSource(spec), with_low(plan, "INT4_G32"), tmp_path / "fresh")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")
    back = pack(SmoothSource(spec), plan, tmp_path / "back", reuse=tmp_path / "new")
    assert back.linked_bytes == back.size_bytes
    assert contents(tmp_path / "back") == contents(tmp_path / "plain")


def test_layouts_without_low_copies_are_identified_as_before() -> None:
    layout = make_plan(model(), SPLITS).layout
    assert layout.digest != replace(layout, low="INT8").digest
    assert replace(layout, low="").digest == layout.digest
    assert not layout.low_layers


def test_damage_of_a_low_copy_is_named(tmp_path: Path) -> None:
    pack(SmoothSource(model()), with_low(make_plan(model(), SPLITS), "INT8"), tmp_path / "pack")
    found = PackedModel.open(tmp_path / "pack")
    entry = found.entry(SegmentId(2, 3, "bottom", LOW))
    with found.path(entry).open("r+b") as file:
        file.seek(entry.offset_bytes + 5)
        byte = file.read(1)
        file.seek(entry.offset_bytes + 5)
        file.write(bytes([byte[0] ^ 1]))
    (damage,) = verify(tmp_path / "pack").damages
    assert damage.what == "layer 2, expert 3, bottom (low)"


def test_a_pack_that_lacks_low_copies_of_its_layout_is_refused(tmp_path: Path) -> None:
    pack(SmoothSource(model()), with_low(make_plan(model(), SPLITS), "INT8"), tmp_path / "pack")

    def lose(document: dict[str, Any]) -> None:
        groups = document["groups"]
        document["groups"] = [
            group for group in groups if (group["layer"], group["variant"]) != (2, LOW)
        ]

    change_manifest(tmp_path / "pack", lose, version=2)
    with pytest.raises(PackFormatError, match=r"layer 2, top \(low\) lacks 4 experts"):
        PackedModel.open(tmp_path / "pack")


def test_plans_that_want_low_copies_are_refused_by_packs_without_them(tmp_path: Path) -> None:
    plan = make_plan(model(), SPLITS)
    pack(SmoothSource(model()), plan, tmp_path / "pack")
    manifest = PackedModel.open(tmp_path / "pack").manifest
    with pytest.raises(PlanMismatchError, match=r"low copies in INT8, the folder has none; pack"):
        check_plan_fits(with_low(plan, "INT8"), manifest, "the folder")
    other = replace(manifest, layout=replace(manifest.layout, low="INT4_G32"))
    with pytest.raises(PlanMismatchError, match=r"low copies in INT8, the folder has INT4_G32"):
        check_plan_fits(with_low(plan, "INT8"), other, "the folder")


def test_low_copies_that_experts_do_not_fit_are_refused() -> None:
    spec = model()
    with pytest.raises(GroupMismatchError, match=r"low copies: INT4_G32: experts cut after 48"):
        check_plan_for(spec, with_low(make_plan(spec, [48, 64, 0]), "INT4_G32"))
    mixed = make_plan(spec, SPLITS, encodings=[["BF16", "INT8", "INT8", "INT8"], "BF16", "BF16"])
    with pytest.raises(PlanMismatchError, match="expected experts that are stored alike"):
        check_plan_for(spec, with_low(mixed, "INT4_G32"))
    small = make_plan(spec, SPLITS, encodings=["INT4_G32"] * 3)
    for name in ("INT4_G32", "INT8", "BF16"):
        with pytest.raises(PlanMismatchError, match="expected fewer"):
            check_plan_for(spec, with_low(small, name))


def test_a_plan_names_thresholds_that_are_none() -> None:
    for given in ((-0.1, 0.5), (0.6, 0.5), (0.5, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="expected 0 <= T1 <= T2 <= 1"):
            OnMiss(*given)
    plan = make_plan(model(), SPLITS)
    with pytest.raises(ValueError, match="the layout has none"):
        replace(plan, placement=replace(plan.placement, on_miss=OnMiss()))
    assert issubclass(PlanMismatchError, PlanError)


def test_what_the_layouts_digest_is_of_is_all_that_low_copies_change(tmp_path: Path) -> None:
    """The shards of the experts themselves are the same files."""
    spec = model()
    plan = make_plan(spec, SPLITS)
    pack(SmoothSource(spec), plan, tmp_path / "plain")
    pack(SmoothSource(spec), with_low(plan, "INT8"), tmp_path / "both")
    for path in sorted((tmp_path / "plain" / "experts").iterdir()):
        digests = [
            hashlib.sha256((tmp_path / name / "experts" / path.name).read_bytes()).digest()
            for name in ("plain", "both")
        ]
        assert digests[0] == digests[1]
