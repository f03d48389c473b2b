"""Packs with 4-bit experts run right under every instruction set that torch chooses among.

Its kernel reads another layout under each, and computes wrong numbers from any but its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore

from moepack.checkpoint import Checkpoint
from moepack.pack import pack
from tests.engine.quantised_run import FOLLOWING, PROMPT
from tests.support.dequantised import Dequantised
from tests.support.engines import all_logits, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.tiny_models import build_tiny

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("quantised_run.py")
CONTEXT = 96

#: By what is asked of torch: the tiles that its kernel for 4-bit weights reads.
TILES = {"default": None, "avx2": 32, "avx512": 64}


class Case(NamedTuple):
    """A pack, what it should compute, and how far off its dtype may be."""

    folder: Path
    expected: torch.Tensor
    usual_error: float


def resident(checkpoint: Checkpoint, source: Dequantised | Checkpoint) -> torch.Tensor:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(spec, layout, tops=99, bottoms=0, staging=1, context=CONTEXT)
    store = CheckpointStore(source, spec, layout)
    with open_engine(checkpoint, layout, place, store=store) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Models in bfloat16, which the kernels take; with biases of experts, and without."""
    made = []
    for family in ("mixtral", "gpt_oss"):
        folder = tmp_path_factory.mktemp(family)
        build_tiny(family, "plain").save_pretrained(folder / "wide")
        build_tiny(family, "plain").bfloat16().save_pretrained(folder / "model")
        wide, checkpoint = (Checkpoint.open(folder / name) for name in ("wide", "model"))
        usual = (resident(wide, wide) - resident(checkpoint, checkpoint)).abs().mean()
        for name in ("INT4_G32", "INT8"):
            spec = checkpoint.spec
            layout = mixed_layout(spec, (0.35, 1.0, 0.0), encodings=(name,))
            place = placement(spec, layout, tops=1, bottoms=1, staging=1, context=CONTEXT)
            pack(checkpoint, plan_for(spec, layout, place), folder / name)
            expected = resident(checkpoint, Dequantised(checkpoint, name))
            made.append(Case(folder / name, expected, float(usual)))
    return made


def run(capability: str, folders: list[Path]) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(CHILD), *map(str, folders)],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ATEN_CPU_CAPABILITY": capability,
        },
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found, done.stderr


@pytest.mark.parametrize("capability", TILES)
def test_packs_compute_the_dequantised_model_under_every_instruction_set(
    capability: str, cases: list[Case]
) -> None:
    found, said = run(capability, [case.folder for case in cases])
    if found["capability"] != capability.upper():
        pytest.skip(f"this processor has no {capability}")
    assert found["tile_rows"] == TILES[capability]
    # What is rebuilt or slower is said; where packs are read as they are there is nothing to say.
    assert ("4-bit weights" in said) == (capability != "avx512")
    for case, placements in zip(cases, found["logits"], strict=True):
        everything, streamed = map(torch.tensor, placements)
        assert torch.equal(everything, streamed), case.folder.name
        error = (everything - case.expected).abs().mean()
        assert error <= 1.5 * case.usual_error, case.folder
