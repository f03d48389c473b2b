"""A model several times larger than the memory that its process may take runs in it.

The process is in a control group of its own, so that everything counts: interpreter, libraries,
what the plan reserves, and whatever of the page cache the reads bring in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.control_group import ControlGroup, Interface, NoControlGroupError
from benchmarks.synthetic import shape_config
from benchmarks.synthetic_folder import write_checkpoint
from moepack.budget import slow_bytes
from moepack.checkpoint import Checkpoint
from moepack.layouts import uniform_layout
from moepack.pack import pack
from moepack.plan import Placement
from moepack.presets import preset_path
from moepack.routing_model import load_routing_model
from moepack.units import MIB
from tests.support.packs import plan_for
from tests.support.plans import placement

CHILD = Path(__file__).with_name("limited_run.py")
ROOT = Path(__file__).resolve().parents[2]

#: At its edge a control group makes the kernel read the program's own pages again and again.
SPARE_BYTES = 100 * MIB

#: What is not the model's: stacks, kernels that torch makes as it goes, the allocator's slack.
SLACK_BYTES = 64 * MIB

WIDER = {
    "hidden_size": 768,
    "intermediate_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4200,
    "max_position_embeddings": 1024,
}


class Packed:
    """A pack of 1.7 GB under a plan of some 50 MB."""

    def __init__(self, folder: Path) -> None:
        routing = load_routing_model(preset_path("olmoe-1b-7b", "routing"))
        write_checkpoint(shape_config("olmoe-1b-7b", layers=8) | WIDER, routing, folder / "model")
        checkpoint = Checkpoint.open(folder / "model")
        spec = checkpoint.spec
        layout = uniform_layout(spec, 1.0)
        self.place: Placement = placement(
            spec, layout, tops=0, bottoms=0, staging=12, context=512, prefetch="all", depth=4
        )
        self.model_bytes = slow_bytes(spec, layout)
        self.folder = folder / "pack"
        pack(checkpoint, plan_for(spec, layout, self.place), self.folder)
        shutil.rmtree(folder / "model")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packed]:
    try:
        Interface.find()
    except NoControlGroupError as failure:
        pytest.skip(str(failure))
    folder = tmp_path_factory.mktemp("limit")
    yield Packed(folder)
    shutil.rmtree(folder)


def run(packed: Packed, group: ControlGroup | None) -> dict[str, Any]:
    command = [sys.executable, str(CHILD), str(packed.folder), "256", "16"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command if group is None else group.inside(command),
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert isinstance(measured, dict)
    return measured


@pytest.mark.slow
def test_a_model_several_times_larger_than_the_limit_runs(packed: Packed) -> None:
    planned_bytes = packed.place.memory.total_bytes
    free = run(packed, None)
    base_bytes = free["process_base_bytes"]
    limit_bytes = base_bytes + planned_bytes + SLACK_BYTES + SPARE_BYTES
    assert packed.model_bytes > 3 * limit_bytes
    try:
        group = ControlGroup("limit", limit_bytes)
    except NoControlGroupError as failure:
        pytest.skip(str(failure))
    with group:
        measured = run(packed, group)
        assert group.kills == 0
        peak_bytes = group.peak_bytes
        cached_bytes = page_cache_bytes(group)
    assert measured["tokens"] == 16
    assert measured["link_bytes_per_token"] > planned_bytes / 4, "the experts really are streamed"
    # The same memory with the limit and without: nothing was squeezed.
    for one in (free, measured):
        assert one["peak_process_bytes"] <= one["process_base_bytes"] + planned_bytes + SLACK_BYTES
    assert peak_bytes is None or peak_bytes <= limit_bytes - SPARE_BYTES / 4
    # What is in the cache is the interpreter's and the libraries' files, not the model's.
    assert cached_bytes < base_bytes


def page_cache_bytes(group: ControlGroup) -> int:
    """File pages that are charged to a group."""
    for line in (group.folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in {"cache", "file"}:
            return int(value)
    raise AssertionError("a control group without statistics")
