"""Files of another version are refused by it; of the same one, older ones are read as they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moepack import records
from moepack.compute import load_compute
from moepack.damage import DAMAGE_FILE, load_damage
from moepack.drift import slowness
from moepack.errors import MoepackError, PlanError, ProfileError
from moepack.hardware import load_hardware
from moepack.links import load_link
from moepack.plan import load_plan
from moepack.routing import load_summary
from moepack.routing_model import load_routing_model
from moepack.yardstick import Pace

#: As the first moepack of this version wrote it.
OLDEST_PLAN: dict[str, Any] = {
    "version": 3,
    "model_name": "one",
    "model_digest": "1" * 64,
    "max_context_tokens": 64,
    "layout": {
        "model_digest": "1" * 64,
        "layers": [{"layer": 0, "split": 16, "width": 32, "granularity": 16, "encoding": "BF16"}],
        "prefill_block_tokens": 512,
    },
    "placement": {
        "device": "cpu",
        "fast_budget_bytes": 4096,
        "staging_experts": 2,
        "context_tokens": 64,
        "prompt_tokens": 8,
        "new_tokens": 8,
        "memory": {
            "trunk_bytes": 1,
            "kv_bytes": 2,
            "hidden_bytes": 3,
            "workspace_bytes": 4,
            "staging_bytes": 5,
            "slots_bytes": 6,
        },
        "layers": [
            {
                "layer": 0,
                "budget_bytes": 6,
                "top_slots": 1,
                "bottom_slots": 0,
                "policy": "lru",
                "hot": [1, 0],
                "prefetch": "off",
                "prefetch_depth": 0,
                "half_life_tokens": None,
            }
        ],
        "ram_budget_bytes": None,
        "threads": 1,
        "readers": 4,
        "pool": None,
    },
    "prediction": {
        "ttft_s": 0.5,
        "tpot_s": 0.1,
        "tokens_per_s": 10.0,
        "hit_rate": 0.5,
        "ready_rate": 0.5,
        "link_bytes_per_token": 100.0,
        "fast_bytes": 21,
        "slow_bytes": 100,
        "band": 1.25,
    },
    "baselines": {
        "lru": {
            "ttft_s": 0.5,
            "tpot_s": 0.1,
            "hit_rate": 0.5,
            "link_bytes_per_token": 100.0,
            "eligible": True,
            "why_not": "",
        }
    },
    "provenance": {
        "hardware": "a machine",
        "hardware_is_this_machine": True,
        "compute": "measured",
        "routing": "recorded",
        "assumptions": [],
    },
    "planner": {"seconds": 1.0, "chosen": "lru", "gap_to_exact": None, "replayed_events": 8},
    "assumed_engine": False,
    "link": None,
}

#: What a document may leave out, because it stands for what was the only possibility.
OPTIONAL = {
    *("prefill_block_tokens", "prefetch", "prefetch_depth", "half_life_tokens", "ram_budget_bytes"),
    *("threads", "readers", "pool", "why_not", "assumptions", "assumed_engine", "link"),
}

CURVE = {"tokens": [1], "seconds": [0.001]}

#: Likewise, of the compute of a model with dense layers alone.
OLDEST_COMPUTE: dict[str, Any] = {
    "version": 3,
    "model_name": "one",
    "model_digest": "1" * 64,
    "device": "cpu",
    "threads": 1,
    "source": "measured",
    "how": "walks",
    "recorded_utc": "2026-01-01T00:00:00+00:00",
    "context_tokens": 8,
    "head_s": 0.001,
    "spread": 0.01,
    "layers": [
        {
            "layers": [0],
            "attention": CURVE,
            "router": CURVE,
            "expert": CURVE,
            "expert_split": CURVE,
            "ffn": None,
            "transfer_s": 1e-5,
            "fixed": CURVE,
            "burst_s": 2e-5,
            "quantised": [],
        }
    ],
}


def maps(item: Any) -> Iterator[dict[str, Any]]:
    """Every map of a document, itself included."""
    if isinstance(item, dict):
        yield item
    for value in item.values() if isinstance(item, dict) else item:
        if isinstance(value, dict | list):
            yield from maps(value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document"


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))  # which is YAML as well
    return path


def test_a_plan_without_what_was_added_is_read_as_it_was_meant(path: Path) -> None:
    plan = load_plan(write(path, OLDEST_PLAN))
    assert (plan.layout.trunk, plan.layout.low, plan.layout.calibration) == ("", "", "")
    assert plan.placement.on_miss is None
    assert plan.placement.host is None
    # How fast the processor was is not known: so nothing measured now is told for another speed.
    assert slowness(plan.prediction, Pace(1.0, 1.0)) is None
    again = records.to_data(plan)
    assert again["prediction"].pop("disk_bytes_per_token") == 0.0
    assert again["placement"].pop("host") is None
    assert again == OLDEST_PLAN, "what an older moepack does not know is left out where unused"


def test_a_compute_profile_without_what_was_added_says_that_it_is_not_known(path: Path) -> None:
    compute = load_compute(write(path, OLDEST_COMPUTE))
    entry = compute.layers[0]
    assert compute.yardstick_s == 0.0
    assert entry.of_prompt == (1e-5, 2e-5), "measured together with what tokens transfer"
    with pytest.raises(ProfileError, match="made by an older moepack; run moepack profile"):
        compute.with_trunk("INT8")


def test_a_key_that_is_not_known_is_refused_wherever_it_stands(path: Path) -> None:
    for number in range(len(list(maps(OLDEST_PLAN)))):
        document = copy.deepcopy(OLDEST_PLAN)
        list(maps(document))[number]["weather"] = "fine"
        with pytest.raises(PlanError, match=r"weather: |unless a newer moepack wrote it"):
            load_plan(write(path, document))


def test_a_key_that_is_missing_is_named(path: Path) -> None:
    for number, found in enumerate(maps(OLDEST_PLAN)):
        for key in found.keys() - OPTIONAL - {"lru"}:
            document = copy.deepcopy(OLDEST_PLAN)
            del list(maps(document))[number][key]
            with pytest.raises(PlanError, match=rf"\b{key}: missing, expected"):
                load_plan(write(path, document))


@pytest.mark.parametrize(
    ("load", "name", "version"),
    [
        (load_plan, "plan.json", 3),
        (load_compute, "compute.yaml", 3),
        (load_summary, "routing.yaml", 2),
        (load_damage, DAMAGE_FILE, 1),
        (load_hardware, "hardware.yaml", 1),
        (load_link, "link.yaml", 1),
        (load_routing_model, "routing.yaml", 1),
    ],
)
def test_another_version_is_told_by_it_and_not_by_its_fields(
    tmp_path: Path, load: Callable[[Path], object], name: str, version: int
) -> None:
    other = write(tmp_path / name, {"version": version + 1, "weather": "fine"})
    with pytest.raises(MoepackError) as newer:
        load(other)
    assert f"version {version + 1}, this moepack reads {version}; update moepack" in str(
        newer.value
    )
    write(other, {"version": version - 1, "weather": "fine"})
    with pytest.raises(MoepackError) as older:
        load(other)
    assert f"version {version - 1}, this moepack reads {version}; " in str(older.value)
    assert "update" not in str(older.value)


@pytest.mark.parametrize(
    ("field", "value"), [("band", 0.5), ("band", float("nan")), ("ttft_s", -1.0), ("tpot_s", -0.1)]
)
def test_a_prediction_that_nothing_can_be_compared_with_is_refused(
    path: Path, field: str, value: float
) -> None:
    document = copy.deepcopy(OLDEST_PLAN)
    document["prediction"][field] = value
    with pytest.raises(PlanError, match=f"prediction: .*{field}"):
        load_plan(write(path, document))


def test_a_document_too_deep_to_be_read_is_named(path: Path) -> None:
    path.write_text('{"version": ' + "[" * 100_000)
    with pytest.raises(PlanError, match="plan "):
        load_plan(path)
