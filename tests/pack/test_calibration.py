"""Rounding weighed by calibration: kept, checked, packed, and never mixed up with another's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import allocate
from moepack_runtime.store import CheckMode

from moepack.calibration import CALIBRATION_FILE, Calibration, LayerMoments, load_calibration
from moepack.encodings import encoding
from moepack.errors import PackFormatError, PlanMismatchError, ProfileError
from moepack.formats import PackedModel, check_plan_fits
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.plan import Plan
from moepack.quantise import quantise_expert
from moepack.segments import cut_expert
from moepack.verify import verify
from tests.pack.fake_models import SmoothSource, contents, make_plan, make_spec
from tests.pack.hostile import change_manifest

NAMES = ["INT4_G32", "BF16", "INT8"]
SPLITS = [64, 32, 128]


def model() -> ModelSpec:
    return make_spec(hidden=64, width=128, moe_layers=3)


def calibration_of(spec: ModelSpec, seed: int = 0) -> Calibration:
    random = np.random.default_rng(seed)

    def moments(layer: int) -> LayerMoments:
        moe = spec.moe(layer)
        sizes = (spec.hidden_size, moe.intermediate_size)
        shapes = [(moe.num_experts, size) for size in sizes]
        return LayerMoments(*(random.exponential(1, s).astype(np.float32) ** 3 for s in shapes))

    return Calibration.of({layer: moments(layer) for layer in spec.moe_layers})


def calibrated(plan: Plan, calibration: Calibration) -> Plan:
    return replace(plan, layout=replace(plan.layout, calibration=calibration.digest))


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = model()
    made = calibration_of(spec)
    made.save(tmp_path)
    found = load_calibration(tmp_path)
    assert found.digest == made.digest != calibration_of(spec, seed=1).digest
    assert found.layers == spec.moe_layers
    for layer in spec.moe_layers:
        for one, other in zip(found.moments(layer), made.moments(layer), strict=True):
            np.testing.assert_array_equal(one, other)
        hidden, neurons = found.importance(layer, 2)[:2]
        np.testing.assert_array_equal(hidden, made.moments(layer).hidden[2])
        np.testing.assert_array_equal(neurons, made.moments(layer).neurons[2])


@pytest.mark.parametrize("low", ["", "INT4_G64"])
def test_every_rounded_expert_is_weighed_by_its_own_inputs(tmp_path: Path, low: str) -> None:
    """In packs, and of a checkpoint that is cut on the fly."""
    spec, source = model(), SmoothSource(model())
    calibration = calibration_of(spec)
    names = ["BF16"] * 3 if low else NAMES
    plan = calibrated(make_plan(spec, [64] * 3 if low else SPLITS, encodings=names), calibration)
    plan = replace(plan, layout=replace(plan.layout, low=low))
    pack(source, plan, tmp_path / "pack", calibration=calibration)
    assert not verify(tmp_path / "pack").damages
    found = PackedModel.open(tmp_path / "pack")
    store = CheckpointStore(source, spec, plan.layout, calibration)
    differ = 0
    for segment, entry in found.entries.items():
        whole: Any = source.expert(segment.layer, segment.expert)
        plain = whole
        if entry.encoding != "BF16":
            stored = encoding(entry.encoding)
            importance = calibration.importance(segment.layer, segment.expert)
            plain = quantise_expert(whole, stored, "BF16", "it")
            whole = quantise_expert(whole, stored, "BF16", "it", importance=importance)
        packed = found.path(entry).read_bytes()[entry.offset_bytes :][: entry.size_bytes]
        assert packed == cut_expert(whole, entry.shape, segment.part)
        differ += packed != cut_expert(plain, entry.shape, segment.part)
        memory = allocate(entry.stored_bytes).numpy()
        store.read_into(segment, memory, CheckMode.NEVER)
        assert memory[: entry.size_bytes].tobytes() == packed
    assert differ == sum(entry.encoding != "BF16" for entry in found.entries.values())


def test_only_layers_of_the_same_calibration_are_linked(tmp_path: Path) -> None:
    spec, source = model(), SmoothSource(model())
    plan = make_plan(spec, SPLITS, encodings=NAMES)
    pack(source, plan, tmp_path / "plain")
    for number, written in ((0, {1, 3}), (1, {1, 3}), (1, set())):
        calibration = calibration_of(spec, number)
        source.asked.clear()
        pack(
            source,
            calibrated(plan, calibration),
            tmp_path / "new",
            reuse=tmp_path / "plain",
            calibration=calibration,
        )
        assert {layer for layer, _ in source.asked} == written
    fresh = calibration_of(spec, 1)
    pack(source, calibrated(plan, fresh), tmp_path / "fresh", calibration=fresh)
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


def test_layouts_without_calibration_are_what_they_were(tmp_path: Path) -> None:
    spec = model()
    plan = make_plan(spec, SPLITS, encodings=NAMES)
    assert replace(plan.layout, calibration="").digest == plan.layout.digest
    pack(SmoothSource(spec), plan, tmp_path / "one")
    pack(SmoothSource(spec), plan, tmp_path / "other", calibration=calibration_of(spec))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_another_calibration_than_the_plans_is_refused(tmp_path: Path) -> None:
    spec, source = model(), SmoothSource(model())
    mine, other = calibration_of(spec), calibration_of(spec, 1)
    plan = calibrated(make_plan(spec, SPLITS, encodings=NAMES), mine)
    with pytest.raises(PlanMismatchError, match=r"by calibration \w{12}, there is none; plan"):
        pack(source, plan, tmp_path / "pack")
    told = rf"by calibration {mine.digest[:12]}, the model has {other.digest[:12]}; plan again"
    with pytest.raises(PlanMismatchError, match=told):
        pack(source, plan, tmp_path / "pack", calibration=other)
    with pytest.raises(PlanMismatchError, match=told):
        CheckpointStore(source, spec, plan.layout, other)
    assert not list(tmp_path.iterdir())
    narrow = calibration_of(make_spec(hidden=64, width=96, moe_layers=3))
    with pytest.raises(PlanMismatchError, match=r"layer 1 is of shapes .* \(3, 96\)"):
        pack(source, calibrated(plan, narrow), tmp_path / "pack", calibration=narrow)


def test_a_plan_of_another_calibration_does_not_fit_a_pack(tmp_path: Path) -> None:
    spec = model()
    plan = make_plan(spec, SPLITS, encodings=NAMES)
    pack(SmoothSource(spec), plan, tmp_path / "pack")
    manifest = PackedModel.open(tmp_path / "pack").manifest
    with pytest.raises(
        PlanMismatchError, match=r"rounded: by no calibration, the plan by calibration \w{12}; pack"
    ):
        check_plan_fits(calibrated(plan, calibration_of(spec)), manifest, "the folder")


@pytest.mark.parametrize(("names", "digest"), [(NAMES, "abc"), (["BF16"] * 3, "0" * 64)])
def test_a_manifest_with_a_calibration_that_cannot_be_is_refused(
    tmp_path: Path, names: list[str], digest: str
) -> None:
    pack(SmoothSource(model()), make_plan(model(), SPLITS, encodings=names), tmp_path / "pack")
    found = PackedModel.open(tmp_path / "pack").manifest

    def claim(document: dict[str, Any]) -> None:
        document["layout"]["calibration"] = digest
        document["layout_digest"] = replace(found.layout, calibration=digest).digest

    change_manifest(tmp_path / "pack", claim, version=found.version)
    with pytest.raises(PackFormatError, match=f"the calibration '{digest}'; expected a SHA-256"):
        PackedModel.open(tmp_path / "pack")


def write(folder: Path, arrays: dict[str, Any]) -> None:
    np.savez(folder / CALIBRATION_FILE, **arrays)


def test_a_calibration_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"No such file.*profile --bits"):
        load_calibration(tmp_path)
    (tmp_path / CALIBRATION_FILE).write_bytes(b"neither arrays nor a zip")
    with pytest.raises(ProfileError, match="not one"):
        load_calibration(tmp_path)
    with (tmp_path / CALIBRATION_FILE).open("wb") as single:
        np.save(single, np.ones(3))
    with pytest.raises(ProfileError, match=r"not one \(a single array\)"):
        load_calibration(tmp_path)
    good = np.ones((3, 64), np.float32)
    for hidden, message in (
        (good.astype(np.float64), "float64 of shape"),
        (good[0], r"of shape \(64,\)"),
        (-good, "below 0, or not finite"),
        (good * np.float32("inf"), "below 0, or not finite"),
    ):
        write(tmp_path, {"1.hidden": hidden, "1.neurons": good})
        with pytest.raises(ProfileError, match=f"1.hidden.*{message}"):
            load_calibration(tmp_path)
    write(tmp_path, {"1.hidden": good})
    with pytest.raises(ProfileError, match=r"1\.neurons.*profile --bits"):
        load_calibration(tmp_path)
