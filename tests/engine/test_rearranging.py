"""Slots that move between layers of a running engine: the same bits, the same bytes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.engine import Engine
from moepack_runtime.live_routing import LiveRouting, RoutingWindow
from moepack_runtime.observers import PassFound
from moepack_runtime.sampling import Sampler
from moepack_runtime.store import CheckMode
from moepack_runtime.transfer import HostileTransfer

from moepack.budget import stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.errors import BudgetTooSmallError, PlanMismatchError, RunError, TransferError
from moepack.layout import Layout
from moepack.plan import LayerPlacement, Placement, Policy, PrefetchMode, SharedPool
from moepack.segments import PARTS, SegmentId
from tests.conftest import TinyFolder
from tests.support.engines import Twin, all_logits, open_engine
from tests.support.plans import mixed_layout, placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(30)]
FOLLOWING = [17, 99, 4, 250, 31, 8]
CONTEXT = 96
SPLITS = [(1.0,), (0.0,), (0.5,), (0.3, 1.0, 0.5, 0.0)]


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


def resident(checkpoint: Checkpoint, layout: Layout) -> torch.Tensor:
    place = placement(checkpoint.spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    with open_engine(checkpoint, layout, place) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


def divided(
    checkpoint: Checkpoint, layout: Layout, place: Placement, random: Random
) -> list[LayerPlacement]:
    """The slots of a placement dealt out anew, not always all of them; new hot rankings."""
    spec = checkpoint.spec
    left: Counter[int] = Counter()
    wishes = []
    for cut, layer in zip(layout.layers, place.layers, strict=True):
        counts = {"top": layer.top_slots, "bottom": layer.bottom_slots}
        for part in PARTS:
            size_bytes = stored_bytes(spec, cut, part)
            if size_bytes:
                left[size_bytes] += counts[part]
                wishes += [(cut.layer, part, size_bytes)] * spec.moe(cut.layer).num_experts
    random.shuffle(wishes)
    given: Counter[tuple[int, str]] = Counter()
    for number, part, size_bytes in wishes:
        if left[size_bytes] and random.random() < 0.95:
            left[size_bytes] -= 1
            given[number, part] += 1
    return [
        dataclasses.replace(
            layer,
            top_slots=given[layer.layer, "top"],
            bottom_slots=given[layer.layer, "bottom"],
            hot=tuple(random.sample(layer.hot, len(layer.hot))),
        )
        for layer in place.layers
    ]


def memory_of(engine: Engine) -> list[int]:
    """Where every piece of slots and frames lies, each as often as somebody has it."""
    memory = engine._experts
    memory.come_to_rest()
    found = [*memory.spare, *memory.frames._free]
    for layer in memory.layers.values():
        for slots in layer.slots.values():
            found += slots.pieces
    return sorted(piece.memory.data_ptr() for piece in found)


def require_right_contents(engine: Engine, checkpoint: Checkpoint, layout: Layout) -> None:
    """Every slot holds the expert that its cache says, and every layer has the planned slots."""
    store = CheckpointStore(checkpoint, checkpoint.spec, layout)
    for place in engine.placement.layers:
        layer = engine._experts.layers[place.layer]
        for part, slots in layer.slots.items():
            count = place.top_slots if part == "top" else place.bottom_slots
            held = slots.cache.resident
            assert sorted(held.values()) == list(range(count)) == list(range(len(slots.pieces)))
            for expert, slot in held.items():
                shape = layer.shapes[part][expert]
                expected = np.zeros(shape.stored_bytes, np.uint8)
                store.read_into(SegmentId(place.layer, expert, part), expected, CheckMode.NEVER)
                found = slots.pieces[slot].memory.numpy()
                assert (found == expected)[: shape.size_bytes].all()


TWINS: list[Twin] = [
    lambda transfer: transfer,
    partial(HostileTransfer, seed=1),
]


@pytest.mark.parametrize("ratios", SPLITS)
@pytest.mark.parametrize(
    ("policy", "prefetch"), [("lru", "off"), ("lcp", "all"), ("pinned", "bottoms")]
)
def test_slots_that_move_change_no_bit_and_no_byte(
    checkpoint: Checkpoint, ratios: tuple[float, ...], policy: Policy, prefetch: PrefetchMode
) -> None:
    layout = mixed_layout(checkpoint.spec, ratios)
    expected = resident(checkpoint, layout)
    place = placement(
        checkpoint.spec,
        layout,
        tops=3,
        bottoms=2,
        staging=5,
        context=CONTEXT,
        policy=policy,
        prefetch=prefetch,
        depth=0 if prefetch == "off" else 3,
    )
    random = Random(str((ratios, policy)))
    for twin in TWINS:
        with open_engine(checkpoint, layout, place, twin=twin) as engine:
            lies = memory_of(engine)
            allocated = engine._experts.allocated_bytes
            for _ in range(3):
                engine.reset()
                assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)
                engine.rearrange(divided(checkpoint, layout, place, random))
                require_right_contents(engine, checkpoint, layout)
                assert memory_of(engine) == lies
                assert engine._experts.allocated_bytes == allocated
            engine.rearrange(place.layers)
            engine.reset()
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)
            assert not engine._experts.spare
            assert memory_of(engine) == lies


def test_layers_may_become_resident_and_cease_to_be(checkpoint: Checkpoint) -> None:
    """Prefetching then ends for them, and begins again."""
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    expected = resident(checkpoint, layout)
    experts = spec.moe(spec.moe_layers[0]).num_experts
    place = placement(
        spec,
        layout,
        tops=experts // 2,
        bottoms=0,
        staging=6,
        context=CONTEXT,
        prefetch="all",
        depth=3,
    )
    with open_engine(checkpoint, layout, place) as engine:
        for turn in (0, 1):
            layers = [
                dataclasses.replace(layer, top_slots=experts if index % 2 == turn else 0)
                for index, layer in enumerate(place.layers)
            ]
            if len(layers) % 2:
                layers[-1] = dataclasses.replace(layers[-1], top_slots=experts // 2)
            assert engine.rearrange(layers) > 0
            engine.reset()
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)
            assert engine.rearrange(layers) == 0


def opened(checkpoint: Checkpoint) -> tuple[Engine, Placement]:
    layout = mixed_layout(checkpoint.spec, (1.0, 0.5))
    place = placement(checkpoint.spec, layout, tops=2, bottoms=0, staging=4, context=CONTEXT)
    return open_engine(checkpoint, layout, place), place


def test_what_is_not_a_division_of_the_slots_is_refused_before_anything_moves(
    checkpoint: Checkpoint,
) -> None:
    engine, place = opened(checkpoint)
    first, *others = place.layers
    with engine:
        lies = memory_of(engine)
        for change in ({"policy": "lfu"}, {"prefetch": "all", "prefetch_depth": 1}, {"layer": 99}):
            with pytest.raises(PlanMismatchError, match="more than slots, budgets and hot"):
                engine.rearrange([dataclasses.replace(first, **change), *others])
        with pytest.raises(PlanMismatchError, match="more than slots"):
            engine.rearrange(others)
        with pytest.raises(PlanMismatchError, match="1 slots for bottoms and has none"):
            engine.rearrange([dataclasses.replace(first, bottom_slots=1), *others])
        with pytest.raises(BudgetTooSmallError, match="bytes are missing") as refused:
            engine.rearrange([dataclasses.replace(first, top_slots=3), *others])
        assert refused.value.missing_bytes == stored_bytes(
            checkpoint.spec, mixed_layout(checkpoint.spec, (1.0,)).layers[0], "top"
        )
        assert engine.placement == place
        assert memory_of(engine) == lies
        engine.prefill(PROMPT)  # it goes on


def test_a_shared_pool_has_nothing_to_move(checkpoint: Checkpoint) -> None:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(
        checkpoint.spec,
        layout,
        tops=0,
        bottoms=0,
        staging=4,
        context=CONTEXT,
        pool=SharedPool(6, "lru"),
    )
    with (
        open_engine(checkpoint, layout, place) as engine,
        pytest.raises(PlanMismatchError, match="share 6 slots"),
    ):
        engine.rearrange(place.layers)


def test_an_engine_whose_slots_were_not_filled_refuses_to_go_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, place = opened(checkpoint)
    layers = list(place.layers)
    layers[0] = dataclasses.replace(layers[0], top_slots=4)
    layers[2] = dataclasses.replace(layers[2], top_slots=0)
    with engine:
        wait = engine._transfer.wait

        def fail(ticket: object) -> None:
            raise TransferError("the disk has gone")

        monkeypatch.setattr(engine._transfer, "wait", fail)
        with pytest.raises(TransferError, match="gone"):
            engine.rearrange(layers)
        monkeypatch.setattr(engine._transfer, "wait", wait)
        for act in (lambda: engine.prefill(PROMPT), lambda: engine.rearrange(place.layers)):
            with pytest.raises(RunError, match="open it again"):
                act()


class Seen:
    """Every token's experts, by layer, as the passes show them."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[Sequence[int]]] = {}

    def passed(self, layer: int, tokens: Sequence[Sequence[int]], found: PassFound) -> None:
        assert {*found.hits} <= {expert for token in tokens for expert in token}
        self.tokens.setdefault(layer, []).extend(tokens)


def test_between_generations_a_better_placement_is_asked_for_every_so_many_tokens(
    checkpoint: Checkpoint,
) -> None:
    engine, place = opened(checkpoint)
    moved = [dataclasses.replace(layer) for layer in place.layers]
    moved[0] = dataclasses.replace(moved[0], top_slots=3)
    moved[2] = dataclasses.replace(moved[2], top_slots=1)
    asked: list[LiveRouting] = []
    answers = iter([None, moved])

    def replan(live: LiveRouting) -> Sequence[LayerPlacement] | None:
        asked.append(live)
        return next(answers)

    seen = Seen()
    with engine:
        engine.observe_passes(seen)
        engine.replan_every(60, replan)
        spent = []
        texts = []
        for _ in range(4):
            texts.append(list(engine.generate(PROMPT, max_new_tokens=11, sampler=Sampler())))
            spent.append(len(asked))
        # 30 tokens of the prompt and 10 that were run: 40 a generation. Due at 60, then at 140.
        assert [live.tokens for live in asked] == [80]
        assert spent == [0, 0, 1, 1]
        assert engine.placement.layers == place.layers
        texts.append(list(engine.generate(PROMPT, max_new_tokens=11, sampler=Sampler())))
        assert [live.tokens for live in asked] == [80, 160]
        assert engine.placement.layers == tuple(moved)
        assert all(text == texts[0] for text in texts)
    for live in asked:
        for row, layer in enumerate(place.layers):
            assert live.ids[:, row].tolist() == seen.tokens[layer.layer][: live.tokens]


def test_a_window_remembers_the_last_tokens(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    random = Random(0)
    for passes in ([3, 1, 1, 4, 1, 9, 1, 1], [25], [8, 8, 8], [1] * 20, [7, 25, 1, 2], []):
        window = RoutingWindow(spec, 8)
        told = []
        for tokens in passes:
            routed = [
                [random.sample(range(8), spec.moe(layer).top_k) for layer in spec.moe_layers]
                for _ in range(tokens)
            ]
            for row, layer in enumerate(spec.moe_layers):
                window.record(layer, [token[row] for token in routed])
            window.advance(tokens)
            told += routed
            live = window.routing()
            assert live.tokens == len(told)
            assert live.ids.tolist() == told[-8:]
        assert window.routing().tokens == len(told)


def test_to_plan_again_after_no_token_at_all_is_refused(checkpoint: Checkpoint) -> None:
    engine, _ = opened(checkpoint)
    with engine, pytest.raises(ValueError, match="at least one"):
        engine.replan_every(0, lambda _: None)
