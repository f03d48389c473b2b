"""Whatever a plan, a link or a user does to the engine: the same bits, named errors, no traces."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import Buffer, Wanted
from moepack_runtime.engine import Engine
from moepack_runtime.memory import resident_bytes
from moepack_runtime.sampling import Sampler
from moepack_runtime.store import CheckMode
from moepack_runtime.transfer import HostileTransfer
from typing_extensions import override

from moepack.checkpoint import Checkpoint
from moepack.errors import RunError, TransferError
from moepack.layout import Layout
from moepack.plan import Placement
from moepack.segments import SegmentId
from moepack.units import MIB
from tests.conftest import TinyFolder
from tests.support.conditions import any_placement, any_predictor, any_twin, plain
from tests.support.engines import all_logits, open_engine
from tests.support.plans import mixed_layout, placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(20)]
OTHER = [(11 * place + 170) % 250 + 3 for place in range(33)]
FOLLOWING = [17, 99, 4]
CONTEXT = 96

#: Random placements that are tried: of a pack that is cut here and there, and of one that is not.
CUT_TRIALS, WHOLE_TRIALS = 800, 200


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    """8 experts, of which a token uses 2, in each of 3 layers."""
    return Checkpoint.open(tiny_folder("mixtral", "plain"))


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def changed(folder: Path, out: Path, **config: int) -> Checkpoint:
    """The same weights under another configuration."""
    shutil.copytree(folder, out)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Checkpoint.open(out)


def resident(checkpoint: Checkpoint, layout: Layout, prompt: list[int]) -> torch.Tensor:
    place = placement(checkpoint.spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    with open_engine(checkpoint, layout, place) as engine:
        return all_logits(engine, prompt, FOLLOWING)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ratios", "trials"), [((0.3, 1.0, 0.0), CUT_TRIALS), ((1.0,), WHOLE_TRIALS)]
)
def test_a_thousand_placements_give_the_same_bits(
    checkpoint: Checkpoint, ratios: tuple[float, ...], trials: int
) -> None:
    layout = mixed_layout(checkpoint.spec, ratios)
    prompt = PROMPT[:9]  # a block and one token
    expected = resident(checkpoint, layout, prompt)
    random = Random(len(ratios))
    for trial in range(trials):
        pooled = len(ratios) == 1 and trial % 2 == 0
        place = any_placement(checkpoint, layout, random, pooled=pooled)
        twin, predictor = any_twin(random), any_predictor(8, random)
        with open_engine(checkpoint, layout, place, twin=twin, predictor=predictor) as engine:
            assert torch.equal(all_logits(engine, prompt, FOLLOWING), expected), (trial, place)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prefetch", ["off", "all"])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=["prompt", "one-token"])
def test_every_token_may_use_every_expert_with_room_for_one(
    tiny_folder: TinyFolder, tmp_path: Path, ratio: float, prefetch: str, prompt: list[int]
) -> None:
    folder = tiny_folder("mixtral", "plain")
    checkpoint = changed(folder, tmp_path / "all", num_experts_per_tok=8)
    layout = mixed_layout(checkpoint.spec, (ratio,))
    expected = resident(checkpoint, layout, prompt)
    for slots in (0, 1, 7):
        place = placement(
            checkpoint.spec,
            layout,
            tops=slots,
            bottoms=slots,
            staging=1,
            context=CONTEXT,
            prefetch="all" if prefetch == "all" else "off",
            depth=8 if prefetch == "all" else 0,
        )
        for twin in (partial(HostileTransfer, seed=slots), plain):
            with open_engine(checkpoint, layout, place, twin=twin) as engine:
                assert torch.equal(all_logits(engine, prompt, FOLLOWING), expected), slots


def test_a_prompt_may_be_many_blocks_long(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    checkpoint = changed(
        tiny_folder("mixtral", "plain"), tmp_path / "long", max_position_embeddings=4096
    )
    layout = mixed_layout(checkpoint.spec, (0.5,), block_tokens=512)
    prompt = PROMPT * 150
    found = []
    for slots, staging, twin in (
        (8, 1, plain),
        (1, 1, partial(HostileTransfer, seed=1)),
        (2, 5, partial(HostileTransfer, seed=2)),
    ):
        place = placement(
            checkpoint.spec,
            layout,
            tops=slots,
            bottoms=slots,
            staging=staging,
            context=3100,
            prefetch="all",
            depth=2,
        )
        with open_engine(checkpoint, layout, place, twin=twin) as engine:
            logits = engine.prefill(prompt)
            found.append(torch.stack([logits, *map(engine.decode, FOLLOWING)]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def streaming(checkpoint: Checkpoint) -> tuple[Layout, Placement]:
    layout = mixed_layout(checkpoint.spec, (0.5, 1.0))
    place = placement(
        checkpoint.spec,
        layout,
        tops=3,
        bottoms=0,
        staging=3,
        context=CONTEXT,
        policy="lcp",
        prefetch="all",
        depth=3,
    )
    return layout, place


def drawn(engine: Engine, prompt: list[int], count: int = 12) -> list[int]:
    return list(engine.generate(prompt, max_new_tokens=count, sampler=Sampler()))


def test_one_request_after_another_finds_what_each_alone_finds(checkpoint: Checkpoint) -> None:
    """Also after one that was stopped half-way, while experts were on their way for it."""
    layout, place = streaming(checkpoint)
    twin = partial(HostileTransfer, seed=4)
    alone = []
    for prompt in (PROMPT, OTHER):
        with open_engine(checkpoint, layout, place) as engine:
            alone.append(drawn(engine, prompt))
    with open_engine(checkpoint, layout, place, twin=twin) as engine:
        for _ in range(2):
            assert [drawn(engine, PROMPT), drawn(engine, OTHER)] == alone
            stopped = engine.generate(PROMPT, max_new_tokens=12, sampler=Sampler())
            assert [next(stopped) for _ in range(5)] == alone[0][:5]
            stopped.close()
            assert drawn(engine, OTHER, 3) == alone[1][:3]
            rest = engine.resume(max_new_tokens=9, sampler=Sampler())
            assert list(rest) == alone[1][3:]


class Failing(CheckpointStore):
    """Every so many reads one fails."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, every: int) -> None:
        super().__init__(checkpoint, checkpoint.spec, layout)
        self.every = every
        self.reads = 0

    @override
    def read_into(
        self,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        self.reads += 1
        if self.reads % self.every == 0:
            raise TransferError(f"{segment}: the disk does not answer")
        return super().read_into(segment, destination, check, wanted)


@pytest.mark.parametrize("every", [1, 4, 15, 20, 33])
@pytest.mark.parametrize("hostile", [False, True], ids=["host", "hostile"])
def test_a_read_that_fails_is_named_and_the_engine_then_refuses(
    checkpoint: Checkpoint, every: int, hostile: bool
) -> None:
    layout, place = streaming(checkpoint)
    store = Failing(checkpoint, layout, every)
    twin = partial(HostileTransfer, seed=every) if hostile else plain
    slots = sum(layer.top_slots for layer in place.layers)
    if every <= slots:
        with pytest.raises(TransferError, match="the disk does not answer"):
            open_engine(checkpoint, layout, place, store=store, twin=twin)
        return
    with open_engine(checkpoint, layout, place, store=store, twin=twin) as engine:
        with pytest.raises(TransferError, match="the disk does not answer"):
            for_ever(engine)
        with pytest.raises(RunError, match="open it again"):
            drawn(engine, PROMPT)


def for_ever(engine: Engine) -> None:
    while True:
        drawn(engine, PROMPT)


def tensors() -> int:
    """How many there are."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_memory_returns_when_an_engine_is_closed(checkpoint: Checkpoint) -> None:
    layout, place = streaming(checkpoint)

    def once() -> None:
        with open_engine(checkpoint, layout, place) as engine:
            drawn(engine, PROMPT, 4)

    for _ in range(5):
        once()
    held = tensors()
    before = resident_bytes()
    for _ in range(20):
        once()
    assert tensors() <= held
    # One engine's memory would be left twenty times.
    assert place.memory.total_bytes > MIB
    assert resident_bytes() - before < 10 * place.memory.total_bytes
