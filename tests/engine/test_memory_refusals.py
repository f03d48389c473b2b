"""What torch says when there is no memory becomes an error of ours, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.memory import refusals_named
from moepack_runtime.store import CheckMode, PackStore

from moepack.checkpoint import Checkpoint
from moepack.errors import DamagedSegmentError, OutOfMemoryError
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.pack import pack
from moepack.plan import Placement
from moepack.units import MIB
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def ask_for_too_much(*_: object, **__: object) -> NoReturn:
    """More than any machine addresses: torch's own refusal."""
    torch.empty(1 << 56, dtype=torch.uint8)
    raise AssertionError("this machine has 64 PiB")


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


@pytest.fixture(scope="module")
def planned(checkpoint: Checkpoint) -> tuple[Layout, Placement]:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    return layout, placement(checkpoint.spec, layout, tops=2, bottoms=0, staging=1)


def test_a_host_without_memory_names_what_the_plan_takes() -> None:
    expected = r"^cpu does not give the 3\.00 MiB that the plan takes \(.*DefaultCPUAlloc.*--ram$"
    with pytest.raises(OutOfMemoryError, match=expected), refusals_named(CPU, 3 * MIB):
        ask_for_too_much()


@pytest.mark.parametrize(
    "refusal",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("CUDA error: out of memory\nMore."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    ],
)
def test_a_gpu_without_memory_names_what_the_plan_takes(refusal: Exception) -> None:
    expected = r"^cuda does not give the 3\.00 MiB that the plan takes \(CUDA .*--vram$"
    with pytest.raises(OutOfMemoryError, match=expected), refusals_named(GPU, 3 * MIB):
        raise refusal


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"), refusals_named(CPU, 0):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_an_engine_that_gets_no_cache_says_so(
    checkpoint: Checkpoint, planned: tuple[Layout, Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvCache, "allocate", ask_for_too_much)
    with pytest.raises(OutOfMemoryError, match="cpu does not give"):
        open_engine(checkpoint, *planned)


@pytest.mark.parametrize("step", ["embed", "logits"])
def test_a_step_that_gets_no_memory_says_so(
    checkpoint: Checkpoint,
    planned: tuple[Layout, Placement],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    with open_engine(checkpoint, *planned) as engine:
        monkeypatch.setattr(engine.decoder, step, ask_for_too_much)
        with pytest.raises(OutOfMemoryError, match="cpu does not give"):
            engine.prefill([3, 4, 5])


def test_the_trunk_is_checked_as_the_engine_is_told(
    checkpoint: Checkpoint, planned: tuple[Layout, Placement], tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    pack(checkpoint, plan_for(checkpoint.spec, *planned), out)
    packed = PackedModel.open(out)
    with packed.trunk_path.open("r+b") as trunk:
        trunk.seek(packed.trunk[0].offset_bytes)
        byte = trunk.read(1)[0]
        trunk.seek(packed.trunk[0].offset_bytes)
        trunk.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedSegmentError, match="trunk tensor"):
        open_engine(checkpoint, *planned, store=PackStore.open(out))
    with open_engine(checkpoint, *planned, store=PackStore.open(out), check=CheckMode.NEVER):
        pass
