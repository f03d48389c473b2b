"""Plans whose experts are rounded: what they hold, what crosses the link, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from moepack_runtime.capabilities import CAPABILITIES

from moepack.budget import slow_bytes, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.errors import GroupMismatchError, PlanMismatchError
from moepack.explain import explain
from moepack.layouts import uniform_layout
from moepack.model_spec import LayerSpec, ModelSpec
from moepack.planner import Planner
from moepack.precision import QualityName, encoding_of, precision_of
from moepack.routing import RoutingProfile
from moepack.sweep import sweep
from moepack.units import MIB
from tests.conftest import TinyFolder
from tests.pack.fake_models import make_spec
from tests.support.plan_requests import drawn_routing, plan_request

#: Bits of a code, and 16 of a scale for every row; or 32 of scale and offset for every 32 weights.
QUALITIES: dict[QualityName, tuple[str, float]] = {
    "int8": ("INT8", 8 + 16 * (2 * 96 + 64) / (3 * 96 * 64)),
    "int4": ("INT4_G32", 4 + 32 / 32),
}


@pytest.fixture(scope="module")
def spec(tiny_folder: TinyFolder) -> ModelSpec:
    """Experts of 96 neurons, hidden states of 64, in float32."""
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec


@pytest.fixture(scope="module")
def routing(spec: ModelSpec) -> RoutingProfile:
    return drawn_routing(spec)


def planner(spec: ModelSpec, routing: RoutingProfile, quality: QualityName = "exact") -> Planner:
    stored = encoding_of(spec, quality)
    return Planner(plan_request(spec, routing, engine=CAPABILITIES, encoding=stored))


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_layer_and_every_baseline_is_stored_as_asked(
    spec: ModelSpec, routing: RoutingProfile, quality: QualityName
) -> None:
    name, bits = QUALITIES[quality]
    made = planner(spec, routing, quality)
    plan = made.plan(4 * MIB)
    assert plan.layout.encodings == {name}
    assert precision_of(spec, plan.layout).quality == quality
    assert precision_of(spec, plan.layout).mean_bits == pytest.approx(bits, rel=0.02)
    assert plan.placement.memory.total_bytes <= 4 * MIB
    assert plan.prediction.slow_bytes == slow_bytes(spec, plan.layout)
    exact = planner(spec, routing).plan(4 * MIB)
    assert exact.layout.encodings == {"F32"}
    assert precision_of(spec, exact.layout) == ("exact", 32.0)
    # Whatever keeps nothing and guesses nothing fetches every expert of a token, whole.
    whole = [uniform_layout(spec, 1.0, encodings=(stored,) * 3) for stored in (name, "F32")]
    sizes = [stored_bytes(spec, layout.layers[0], "top") for layout in whole]
    fetched = [each.baselines["on_demand"].link_bytes_per_token for each in (plan, exact)]
    assert fetched[0] / fetched[1] == pytest.approx(sizes[0] / sizes[1])
    # Segments of a few pages are padded to whole ones.
    assert bits / 32 <= sizes[0] / sizes[1] < 1.2 * bits / 32


@pytest.mark.parametrize("quality", QUALITIES)
def test_fewer_bytes_hold_more_experts_in_the_same_memory(
    spec: ModelSpec, routing: RoutingProfile, quality: QualityName
) -> None:
    rounded, exact = (planner(spec, routing, each).plan(4 * MIB) for each in (quality, "exact"))
    assert rounded.prediction.hit_rate > exact.prediction.hit_rate
    assert rounded.prediction.link_bytes_per_token < exact.prediction.link_bytes_per_token / 3


@pytest.mark.parametrize("quality", QUALITIES)
def test_a_kept_layout_keeps_its_encoding(
    spec: ModelSpec, routing: RoutingProfile, quality: QualityName
) -> None:
    name, _ = QUALITIES[quality]
    layout = uniform_layout(spec, 0.5, encodings=(name,) * 3)
    kept = Planner(plan_request(spec, routing, engine=CAPABILITIES, keep_layout=layout))
    plan = kept.plan(4 * MIB)
    assert plan.layout == layout
    fetched = plan.baselines["on_demand"].link_bytes_per_token
    fresh = planner(spec, routing, quality).plan(4 * MIB)
    assert fetched == fresh.baselines["on_demand"].link_bytes_per_token


def test_sweeps_and_explanations_stay_in_the_encoding(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    made = planner(spec, routing, "int8")
    swept = sweep(made, 4 * MIB, 5 * MIB)
    assert {name for plan in swept.plans for name in plan.layout.encodings} == {"INT8"}
    found = explain(made, swept.plans[0])
    forecast = swept.plans[0].prediction
    assert found.token.link_bytes == forecast.link_bytes_per_token > 0
    ample = [row for row in found.what_if if row.change == "memory"]
    assert ample
    assert max(row.hit_rate for row in ample) > forecast.hit_rate


def test_what_does_not_fit_is_refused_by_name() -> None:
    narrow = make_spec(hidden=96, width=80)
    assert encoding_of(narrow, "exact") == narrow.dtype
    assert encoding_of(narrow, "int8") == "INT8"
    with pytest.raises(GroupMismatchError, match=r"width of experts is 80, .* choose INT8"):
        encoding_of(narrow, "int4")
    wide = make_spec(hidden=128, width=64)
    assert encoding_of(wide, "int4") == "INT4_G32", "the smaller groups, where both fit"


def test_layers_of_other_widths_are_stored_in_what_fits_them_all() -> None:
    spec = make_spec(hidden=64, width=64)
    layer = spec.layers[1]
    assert layer.moe is not None
    odd = dataclasses.replace(layer.moe, intermediate_size=72)
    layers = (*spec.layers[:2], LayerSpec(layer.attention, odd, None))
    assert encoding_of(dataclasses.replace(spec, layers=layers), "int8") == "INT8"
    with pytest.raises(GroupMismatchError, match="is 72, expected a multiple of 32"):
        encoding_of(dataclasses.replace(spec, layers=layers), "int4")


def test_layers_that_differ_are_mixed(spec: ModelSpec) -> None:
    layout = uniform_layout(spec, 1.0, encodings=("INT8", "INT8", "INT4_G32"))
    found = precision_of(spec, layout)
    assert found.quality == "mixed"
    mean = (2 * QUALITIES["int8"][1] + QUALITIES["int4"][1]) / 3
    assert found.mean_bits == pytest.approx(mean)


def test_an_engine_that_cannot_compute_with_them_is_planned_nothing(
    spec: ModelSpec, routing: RoutingProfile
) -> None:
    engine = dataclasses.replace(CAPABILITIES, encodings=("F32",))
    asked = plan_request(spec, routing, engine=engine, encoding="INT8")
    with pytest.raises(PlanMismatchError, match="experts in INT8; this engine computes with F32"):
        Planner(asked)
