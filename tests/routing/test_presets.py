from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from moepack.checkpoint import Checkpoint
from moepack.errors import PresetNotFoundError, ProfileError
from moepack.model_spec import ModelSpec
from moepack.presets import preset_names, preset_path
from moepack.routing_figures import FIGURES, RoutedTexts
from moepack.routing_fit import band_average, drawn_figures
from moepack.routing_model import RoutingModel, load_routing_model
from moepack.routing_presets import find_routing, is_sampled, synthetic_profile
from tests.conftest import TinyFolder
from tests.support.recordings import load_recording

NAMES = preset_names("routing")
PARAMETERS = {"popularity", "text", "context", "context_tokens", "first_recall", "recall"}

#: Recorded traces, and the presets fitted to them.
TRACED = {
    "olmoe-1b-7b": "olmoe",
    "qwen1.5-moe-a2.7b": "qwen",
    "switch-base-8": "switch_base_8",
}


def load(name: str) -> RoutingModel:
    return load_routing_model(preset_path(name, "routing"))


@pytest.fixture
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


def test_the_presets_that_the_documentation_names_are_there() -> None:
    assert {
        *("uniform", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "switch-base-8", "mixtral-8x7b"),
        *("glm-5.2", "qwen3-30b-a3b", "qwen1.5-moe-paper", "mixtral-paper"),
    } == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_says_where_each_number_comes_from(name: str) -> None:
    model = load(name)
    assert model.name == name
    assert model.how
    assert set(model.sources) == PARAMETERS
    assert all(model.sources.values())
    assert bool(model.fit) == (model.sample is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_survives_its_file(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    load(name).save(copy)
    assert copy.read_bytes() == preset_path(name, "routing").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if load(name).fit])
def test_the_stated_fit_is_what_the_preset_gives(name: str) -> None:
    """Only its first draw, which is near the average of all: 0.04 is what small models vary by."""
    model = load(name)
    assert model.sample is not None
    sample = dataclasses.replace(model.sample, draws=1)
    found = drawn_figures(model, [(line.name, line.depths) for line in model.fit], sample)
    errors = np.abs(found - [line.fitted for line in model.fit])
    assert errors.mean() < 0.02
    assert errors.max() < 0.1


@pytest.mark.parametrize("name", TRACED)
def test_what_a_preset_calls_recorded_is_in_the_recording(name: str) -> None:
    recording = load_recording(TRACED[name], shortest=1)
    texts = RoutedTexts(recording.texts, recording.layers[0].num_experts)
    model = load(name)
    assert model.sample is not None
    assert model.sample.text_tokens == tuple(len(text) for text in recording.texts)
    for line in model.fit:
        value = band_average(FIGURES[line.name](texts), line.depths)
        assert line.recorded == pytest.approx(value, abs=6e-5), line


@pytest.mark.parametrize(
    ("name", "mean", "worst"),
    [
        ("olmoe-1b-7b", 0.015, 0.055),
        ("qwen1.5-moe-a2.7b", 0.012, 0.03),
        ("switch-base-8", 0.025, 0.04),
        ("mixtral-8x7b", 0.015, 0.08),
        ("glm-5.2", 0.003, 0.005),
        ("qwen3-30b-a3b", 0.003, 0.005),
        ("qwen1.5-moe-paper", 0.02, 0.04),
    ],
)
def test_presets_fit_as_well_as_the_documentation_says(
    name: str, mean: float, worst: float
) -> None:
    errors = [abs(line.fitted - line.recorded) for line in load(name).fit]
    assert np.mean(errors) < mean
    assert max(errors) < worst


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen1.5-moe-a2.7b"])
def test_presets_of_recorded_traces_hit_as_the_recording_does(name: str) -> None:
    hits = [line for line in load(name).fit if line.name.startswith(("lru", "lfu"))]
    assert len(hits) == 18
    assert max(abs(line.fitted - line.recorded) for line in hits) < 0.03


def test_a_preset_is_planned_with_by_its_name_or_its_file(spec: ModelSpec, tmp_path: Path) -> None:
    named = find_routing("mixtral-8x7b", spec)
    assert is_sampled(named)
    assert "mixtral-8x7b" in named.summary.how
    assert named.summary.model_digest == spec.digest
    assert [layer.layer for layer in named.layers] == list(spec.moe_layers)
    mine = tmp_path / "mine.yaml"
    load("mixtral-8x7b").save(mine)
    by_path = find_routing(str(mine), spec)
    assert by_path.summary == named.summary
    assert (by_path.trace.ids == named.trace.ids).all()


def test_a_recorded_profile_is_planned_with_by_its_folder_or_its_file(
    spec: ModelSpec, tmp_path: Path
) -> None:
    recorded = synthetic_profile(load("olmoe-1b-7b"), spec, tokens=40, texts=2)
    recorded.save(tmp_path)
    for path in (tmp_path, tmp_path / "routing.yaml"):
        assert find_routing(str(path), spec).summary == recorded.summary
    (tmp_path / "routing.npz").unlink()
    with pytest.raises(ProfileError, match=r"routing\.npz: No such file"):
        find_routing(str(tmp_path / "routing.yaml"), spec)


def test_what_is_neither_a_preset_nor_a_file_is_refused_by_name(
    spec: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(PresetNotFoundError, match=r"'mixtral-8x7'.*did you mean mixtral-8x7b\?"):
        find_routing("mixtral-8x7", spec)
    with pytest.raises(ProfileError, match=r"gone\.yaml: No such file or directory"):
        find_routing(str(tmp_path / "gone.yaml"), spec)
    with pytest.raises(PresetNotFoundError):
        find_routing("x" * 5000, spec)


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ("recall: 0.85", "recall: 1.5", "a recall is not between 0 and 1"),
        ("recall: 0.85", "recall: most", "recall.*most"),
        ("recall: 0.85", "recal: 0.85", "recal.*did you mean recall"),
        ("context_tokens:", "context_tokens: 0 #", "context_tokens is 0"),
        ("text:", "text: [0.1] #", "text has 1 numbers for 3 depths"),
        ("text:", "text: [0.1, -1, 0.1] #", "text is .*-1"),
        ("popularity:", "popularity: [.nan, 1.0, 1.0] #", "popularity"),
        ("depths:", "depths: [0.0, 0.5, 0.5] #", "depths.*ascending"),
        ("depths:", "depths: [0.0, 0.5, 2.0] #", "depths.*outside"),
        ("depths:", "depths: [] #", "depths.*one or more"),
        ("version: 1", "version: 9", "version 9, this moepack reads 1"),
        ("version: 1", "version: [", "not YAML"),
    ],
)
def test_a_wrong_field_is_named(
    spec: ModelSpec, tmp_path: Path, line: str, instead: str, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    text = preset_path("mixtral-8x7b", "routing").read_text()
    assert f"\n{line}" in text
    path.write_text(text.replace(f"\n{line}", f"\n{instead}", 1))
    with pytest.raises(ProfileError, match=rf"wrong\.yaml.*{message}"):
        find_routing(str(path), spec)


def test_94_layers_of_128_experts_are_drawn_quickly(spec: ModelSpec) -> None:
    layer = next(layer for layer in spec.layers if layer.moe is not None)
    assert layer.moe is not None
    large = dataclasses.replace(layer.moe, num_experts=128, top_k=8)
    deep = dataclasses.replace(spec, layers=(dataclasses.replace(layer, moe=large),) * 94)
    began_s = time.perf_counter()
    profile = synthetic_profile(load("qwen3-30b-a3b"), deep)
    # A plan may take 5 s; this took 1.5 s on a busy machine of two cores.
    assert time.perf_counter() - began_s < 10
    assert profile.summary.tokens == 320
