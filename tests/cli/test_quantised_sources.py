"""The commands on checkpoints in FP8 and MXFP4: what is shown of them, and that they run."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from moepack.units import format_size
from tests.cli.conftest import Moepack
from tests.support.quantised_sources import quantised_model


@pytest.mark.parametrize("key", ["qwen3_moe-fp8", "gpt_oss-mxfp4"])
@pytest.mark.usefixtures("measured")
def test_a_quantised_model_is_inspected_planned_packed_and_run(
    tmp_path: Path, moepack: Moepack, key: str
) -> None:
    folder = quantised_model(key, tmp_path / key, "bfloat16")
    method = key.partition("-")[2].upper()
    tensors = load_file(folder / "model.safetensors").values()
    size_bytes = sum(tensor.nbytes for tensor in tensors)
    source = {"encoding": method, "size_bytes": size_bytes}

    inspected = moepack("inspect", folder, "--json").document
    assert inspected["source"] == source
    becomes_bytes = inspected["trunk_bytes"] + inspected["experts_bytes"]
    assert size_bytes < becomes_bytes
    held = f"{format_size(size_bytes)} in {method}"
    shown = moepack("inspect", folder).out
    assert f"{format_size(becomes_bytes)} in BF16, from {held}" in shown

    plan = ("plan", folder, "--vram", "8M", "--context", "256")
    planned = moepack(*plan, "--json")
    assert planned.document["source"] == source
    assert f"the checkpoint holds {held}; in BF16 that is" in planned.err
    packed = moepack("pack", "--json")
    assert packed.code == 0, packed.err
    assert (
        moepack("inspect", packed.document["folder"], "--json").document["model"]["digest"]
        == inspected["digest"]
    )
    done = moepack("run", "abc", "--max-new-tokens", "3")
    assert done.code == 0, done.err


def test_of_other_models_nothing_is_said(measured: Path, model: Path, moepack: Moepack) -> None:
    assert measured.is_dir()
    inspected = moepack("inspect", model, "--json").document
    weights_bytes = inspected["trunk_bytes"] + inspected["experts_bytes"]
    assert inspected["source"] == {"encoding": "F32", "size_bytes": weights_bytes}
    assert "from" not in moepack("inspect", model).out
    assert "the checkpoint holds" not in moepack("plan", model, "--vram", "4M").err
