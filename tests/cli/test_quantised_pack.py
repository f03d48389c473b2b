"""``moepack pack`` for plans whose experts are quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Moepack


def store_experts_as(home: Path, name: str) -> None:
    """Change the newest plan."""
    (path,) = home.glob("models/*/plan.json")
    plan = json.loads(path.read_text())
    for cut in plan["layout"]["layers"]:
        cut |= {"encoding": name, "split": cut["width"]}
    path.write_text(json.dumps(plan))


def experts_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "experts").iterdir())


@pytest.mark.parametrize(("name", "ratio"), [("INT8", 1 / 4), ("INT4_G32", 0.625 / 4)])
def test_packing_quantises_what_the_plan_says(
    packed: Path, measured: Path, moepack: Moepack, name: str, ratio: float
) -> None:
    exact_bytes = experts_bytes(packed)
    store_experts_as(measured, name)
    done = moepack("pack", "--json")
    assert done.code == 0, done.err
    assert done.document["linked_bytes"] > 0  # the trunk
    assert (
        ratio < experts_bytes(packed) / exact_bytes < 1.2 * ratio
    )  # segments of a few pages, padded
    assert moepack("verify").code == 0
    layers = moepack("inspect", packed, "--json").document["layers"]
    assert {layer["encoding"] for layer in layers} == {name}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("INT3", "the plan's layer 0: 'INT3' is not an encoding of experts, expected one of F64,"),
        (
            "INT4_G64",
            "GroupMismatchError: the plan's layer 0: INT4_G64: the width of experts is 96",
        ),
        ("BF16", "the plan stores layer 0 as BF16, the checkpoint holds F32; packing keeps that"),
    ],
)
def test_an_encoding_that_cannot_be_written_is_named(
    packed: Path, measured: Path, moepack: Moepack, name: str, message: str
) -> None:
    store_experts_as(measured, name)
    refused = moepack("pack")
    assert refused.code == 1
    assert message in refused.err.splitlines()[-1]
    assert "Traceback" not in refused.err
