"""What an engine reports while it loads and while it runs a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.progress import Unit
from moepack_runtime.sampling import Sampler
from moepack_runtime.store import PackStore

from moepack.checkpoint import Checkpoint
from moepack.errors import TransferError
from moepack.pack import pack
from moepack.segments import SegmentId
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


class Told:
    """Remembers each piece of work: its name, total and unit, and how much of it was done."""

    def __init__(self) -> None:
        self.works: list[tuple[str, int | None, Unit, int]] = []
        self.under_way = False

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        assert not self.under_way
        self.under_way = True
        self.works.append((what, total, unit, 0))

    def advance(self, amount: int) -> None:
        assert self.under_way
        what, total, unit, done = self.works[-1]
        self.works[-1] = (what, total, unit, done + amount)

    def done(self) -> None:
        self.under_way = False


@pytest.mark.parametrize("packed", [False, True])
def test_loading_reports_every_byte_and_a_prompt_every_layer(
    checkpoint: Checkpoint, tmp_path: Path, packed: bool
) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(spec, layout, tops=3, bottoms=0, staging=2, context=96)
    store = None
    if packed:
        pack(checkpoint, plan_for(spec, layout, place), tmp_path / "pack")
        store = PackStore.open(tmp_path / "pack")
    told = Told()
    with open_engine(checkpoint, layout, place, store=store, progress=told) as engine:
        trunk_bytes = sum(info.size_bytes for info in spec.trunk)
        slots_bytes = place.memory.slots_bytes
        assert told.works == [
            ("load the trunk", trunk_bytes, "bytes", trunk_bytes),
            ("fill the slots", slots_bytes, "bytes", slots_bytes),
        ]
        told.works.clear()
        drawn = engine.generate([5] * 40, max_new_tokens=4, sampler=Sampler(), progress=told)
        assert len(list(drawn)) == 4
        assert told.works == [("run the prompt (layers)", len(spec.layers), "items", 3)]
    assert not told.under_way


class Failing(CheckpointStore):
    """Its experts cannot be read."""

    def read_into(self, segment: SegmentId, *_: object) -> NoReturn:
        raise TransferError(f"{segment}: gone")


def test_work_that_fails_is_over_all_the_same(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(spec, layout, tops=3, bottoms=0, staging=2, context=96)
    told = Told()
    store = Failing(checkpoint, spec, layout)
    with pytest.raises(TransferError, match="gone"):
        open_engine(checkpoint, layout, place, store=store, progress=told)
    assert told.works[-1][0] == "fill the slots"
    assert not told.under_way
