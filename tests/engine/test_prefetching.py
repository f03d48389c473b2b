"""Fetching ahead changes when bytes arrive, never a bit of the result."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import sleep

import numpy as np
import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.direct_io import Buffer, Wanted
from moepack_runtime.engine import Engine
from moepack_runtime.predict import Predictor
from moepack_runtime.sampling import Sampler
from moepack_runtime.store import CheckMode
from moepack_runtime.transfer import (
    HostileTransfer,
    Priority,
    ThrottledTransfer,
    Ticket,
    Transfer,
)
from typing_extensions import override

from moepack.checkpoint import Checkpoint
from moepack.errors import RunError
from moepack.layout import Layout
from moepack.plan import Placement, PrefetchMode, SharedPool
from moepack.segments import ALIGNMENT_BYTES, SegmentId
from tests.conftest import TinyFolder
from tests.support.engines import Twin, all_logits, open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.predictors import Guesses

#: Several blocks, and a part of one.
PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(21)]
FOLLOWING = [17, 99, 4, 250]
CONTEXT = 96

# Of the trial, as a number.
TWINS: dict[str, Callable[[int], Twin]] = {
    "host": lambda _: lambda transfer: transfer,
    "hostile": lambda seed: partial(HostileTransfer, seed=seed),
    "throttled": lambda _: partial(ThrottledTransfer, rate_bytes_per_s=1e9, latency_s=2e-5),
}


class Recorder(Transfer):
    """Notes what is asked for, and passes it on."""

    def __init__(self, inner: Transfer) -> None:
        self.inner = inner
        self.asked: list[tuple[SegmentId, Priority]] = []
        self.cancelled: list[SegmentId] = []

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self.inner.allocate(size_bytes)

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        self.asked.append((segment, priority))
        return self.inner.start(segment, destination, priority)

    @override
    def wait(self, ticket: Ticket) -> None:
        self.inner.wait(ticket)

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        return self.inner.is_ready(ticket)

    @override
    def cancel(self, ticket: Ticket) -> bool:
        cancelled = self.inner.cancel(ticket)
        if cancelled:
            self.cancelled.append(ticket.segment)
        return cancelled

    @override
    def break_off(self, ticket: Ticket) -> None:
        self.inner.break_off(ticket)

    @property
    @override
    def statistics(self):  # type: ignore[no-untyped-def]
        return self.inner.statistics

    @override
    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


def resident(checkpoint: Checkpoint, layout: Layout) -> torch.Tensor:
    place = placement(checkpoint.spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    with open_engine(checkpoint, layout, place) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


@pytest.mark.parametrize("mode", ["all", "bottoms"])
@pytest.mark.parametrize("ratios", [(1.0,), (0.0,), (0.3, 1.0, 0.5, 0.0)])
def test_the_bits_do_not_depend_on_what_is_fetched_ahead(
    checkpoint: Checkpoint, ratios: tuple[float, ...], mode: PrefetchMode
) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, ratios)
    expected = resident(checkpoint, layout)
    place_on = partial(placement, spec, layout, context=CONTEXT, prefetch=mode)
    experts = spec.moe(spec.moe_layers[0]).num_experts
    predictors: list[Callable[[], Predictor | None]] = [
        lambda: None,
        lambda: Guesses(experts, seed=3),
    ]
    places = [
        place_on(tops=0, bottoms=0, staging=1, depth=1),
        place_on(tops=2, bottoms=0, staging=2, depth=experts, policy="lcp"),
        place_on(tops=5, bottoms=5, staging=2 * experts, depth=experts, coldest_first=True),
    ]
    for name, twin in TWINS.items():
        for trial, (place, predictor) in enumerate(itertools.product(places, predictors)):
            with open_engine(
                checkpoint, layout, place, twin=twin(trial), predictor=predictor()
            ) as engine:
                for _ in range(2):  # the second sequence meets warm caches and old guesses
                    found = all_logits(engine, PROMPT, FOLLOWING)
                    assert torch.equal(found, expected), (name, place.layers[0])
                    engine.reset()


@pytest.mark.parametrize("name", ["host", "hostile"])
def test_the_bits_do_not_depend_on_what_is_broken_off(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Segments come a page at a time, slowly; what is not wanted ends there, and leaves NaN."""
    broken: list[SegmentId] = []

    at_once = CheckpointStore.read_into

    def read_into(
        store: CheckpointStore,
        segment: SegmentId,
        destination: Buffer,
        check: CheckMode,
        wanted: Wanted | None = None,
    ) -> int:
        if wanted is None:
            return at_once(store, segment, destination, check)
        whole = np.empty_like(destination)
        at_once(store, segment, whole, check)
        destination[:] = 0xFF
        for begin in range(0, len(whole), ALIGNMENT_BYTES):
            if not wanted():
                broken.append(segment)
                return begin
            sleep(1e-3)
            destination[begin : begin + ALIGNMENT_BYTES] = whole[begin : begin + ALIGNMENT_BYTES]
        return len(whole)

    monkeypatch.setattr(CheckpointStore, "read_into", read_into)
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    experts = spec.moe(spec.moe_layers[0]).num_experts
    expected = resident(checkpoint, layout)
    place = placement(
        spec, layout, tops=2, bottoms=0, staging=6, context=CONTEXT, prefetch="all", depth=4
    )
    guesses = Guesses(experts, seed=1)
    with open_engine(checkpoint, layout, place, twin=TWINS[name](1), predictor=guesses) as engine:
        for _ in range(2):
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)
            engine.reset()
    assert broken


@pytest.mark.parametrize("seed", range(3))
def test_the_bits_in_a_shared_pool_do_not_depend_on_it(checkpoint: Checkpoint, seed: int) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    expected = resident(checkpoint, layout)
    place = placement(
        spec,
        layout,
        tops=0,
        bottoms=0,
        staging=3 + seed,
        context=CONTEXT,
        pool=SharedPool(2 + 3 * seed, "lcp"),
        prefetch="all",
        depth=3,
    )
    with open_engine(checkpoint, layout, place, twin=partial(HostileTransfer, seed=seed)) as engine:
        assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)


def recorded(
    checkpoint: Checkpoint, place: Placement, layout: Layout, predictor: Predictor | None = None
) -> tuple[Engine, Recorder]:
    made: list[Recorder] = []

    def twin(transfer: Transfer) -> Transfer:
        made.append(Recorder(transfer))
        return made[0]

    return open_engine(checkpoint, layout, place, twin=twin, predictor=predictor), made[0]


def test_each_missing_segment_crosses_the_link_once_a_prompt(checkpoint: Checkpoint) -> None:
    """A prompt of many blocks, guessed by the routers; and nothing that is resident does."""
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5,))
    place = placement(
        spec, layout, tops=2, bottoms=0, staging=4, context=CONTEXT, prefetch="all", depth=2
    )
    engine, link = recorded(checkpoint, place, layout)
    with engine:
        link.asked.clear()
        engine.prefill(PROMPT)
        ahead = [segment for segment, priority in link.asked if priority is Priority.PREFETCH]
        assert ahead, "the next layer is fetched ahead"
        # The first layer is fetched ahead for the token that follows.
        crossed = Counter(s for s, _ in link.asked if s.layer != spec.moe_layers[0])
        crossed.subtract(link.cancelled)
        assert max(crossed.values()) == 1
        assert not {(s.expert, s.part) for s, _ in link.asked} & {(0, "top"), (1, "top")}


def test_experts_are_asked_for_in_descending_score(checkpoint: Checkpoint) -> None:
    """And the first layer's from the last layer of the token before."""
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(
        spec, layout, tops=0, bottoms=0, staging=8, context=CONTEXT, prefetch="all", depth=3
    )

    class Fixed(Predictor):
        def __init__(self) -> None:
            self.targets: list[int] = []

        @override
        def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
            self.targets.append(target)
            return torch.tensor([[3, 0, 2]])[:, :depth].expand(len(residual), -1)

    predictor = Fixed()
    engine, link = recorded(checkpoint, place, layout, predictor)
    with engine:
        engine.prefill(PROMPT[:1])
        link.asked.clear()
        predictor.targets.clear()
        engine.decode(PROMPT[1])
    numbers = list(spec.moe_layers)
    assert predictor.targets == [*numbers[1:], numbers[0]]
    ahead = [segment for segment, priority in link.asked if priority is Priority.PREFETCH]
    for number in numbers:
        assert [s.expert for s in ahead if s.layer == number] == [3, 0, 2]


def test_an_expert_that_is_guessed_twice_takes_one_frame(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(
        spec, layout, tops=0, bottoms=0, staging=4, context=CONTEXT, prefetch="all", depth=3
    )

    class Stammering(Predictor):
        @override
        def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
            return torch.tensor([[3, 3, 5]])[:, :depth].expand(len(residual), -1)

    with open_engine(checkpoint, layout, place, predictor=Stammering()) as engine:
        for token in FOLLOWING:
            engine.decode(token)
        engine._experts.come_to_rest()
        assert len(engine._experts.frames._free) == 4


def test_bottoms_alone_are_fetched_where_their_tops_are(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5,))
    place = placement(
        spec,
        layout,
        tops=3,
        bottoms=0,
        staging=9,
        context=CONTEXT,
        prefetch="bottoms",
        depth=spec.moe(spec.moe_layers[0]).num_experts,
        policy="pinned",
    )
    engine, link = recorded(checkpoint, place, layout)
    with engine:
        engine.prefill(PROMPT[:1])
        engine.decode(PROMPT[1])
    ahead = {(s.part, s.expert) for s, priority in link.asked if priority is Priority.PREFETCH}
    assert ahead == {("bottom", 0), ("bottom", 1), ("bottom", 2)}


def test_a_stopped_generation_goes_on_from_its_cache(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5,))
    place = placement(
        spec, layout, tops=2, bottoms=1, staging=5, context=CONTEXT, prefetch="all", depth=2
    )
    with open_engine(checkpoint, layout, place) as engine:
        whole = list(engine.generate(PROMPT, max_new_tokens=12, sampler=Sampler()))
    with open_engine(checkpoint, layout, place) as engine:
        sampler = Sampler()
        stream = engine.generate(PROMPT, max_new_tokens=12, sampler=sampler)
        first = [next(stream) for _ in range(5)]
        stream.close()
        reads = engine.link.reads
        rest = list(engine.resume(max_new_tokens=7, sampler=sampler))
        assert engine.link.reads - reads < 7 * len(spec.moe_layers) * 10, (
            "the prompt is not run again"
        )
        assert first + rest == whole


class Interrupted(Sampler):
    """Ctrl-C comes while a token is drawn: its step is over, and the cache has its input."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    @override
    def draw(self, logits: torch.Tensor) -> int:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().draw(logits)


def test_a_generation_that_ended_inside_a_step_is_not_gone_on_with(checkpoint: Checkpoint) -> None:
    """It would run its last token once more."""
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(checkpoint.spec, layout, tops=2, bottoms=0, staging=3, context=CONTEXT)
    with open_engine(checkpoint, layout, place) as engine:
        whole = list(engine.generate(PROMPT, max_new_tokens=8, sampler=Sampler()))
        with pytest.raises(KeyboardInterrupt):
            list(engine.generate(PROMPT, max_new_tokens=8, sampler=Interrupted(4)))
        with pytest.raises(RunError, match="stopped between two tokens"):
            list(engine.resume(max_new_tokens=4, sampler=Sampler()))
        assert list(engine.generate(PROMPT, max_new_tokens=8, sampler=Sampler())) == whole
