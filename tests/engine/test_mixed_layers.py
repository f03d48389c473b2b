"""Engines over layers whose experts are stored in different encodings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from moepack_runtime.capabilities import require_fit
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.engine import Engine
from moepack_runtime.sampling import Sampler
from moepack_runtime.store import CheckMode, PackStore, SegmentStore

from moepack.budget import slow_bytes, stored_bytes
from moepack.checkpoint import Checkpoint
from moepack.encodings import encoding
from moepack.errors import PlanMismatchError
from moepack.layout import Layout
from moepack.layouts import mixed_layout
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.plan import Placement, SharedPool
from moepack.quantise import dequantise_expert, quantise_expert
from moepack.ram_tier import ram_tier
from moepack.segments import Bits, SegmentId
from moepack.streaming import streaming_placement
from tests.conftest import TinyFolder
from tests.support.conditions import any_placement, disturbed
from tests.support.engines import all_logits, open_engine
from tests.support.mixed import layout_by_expert, with_layers, with_slots
from tests.support.packs import plan_for
from tests.support.plans import placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
FOLLOWING = [17, 99, 4, 250]
CONTEXT = 96

#: Of three layers: three encodings, two, and one.
NAMES = (("F32", "INT8", "INT4_G32"), ("INT8", "INT4_G32"), ("INT8",))


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    """8 experts, of which a token uses 2, in each of 3 layers."""
    return Checkpoint.open(tiny_folder("mixtral", "plain"))


@pytest.fixture(scope="module")
def layout(checkpoint: Checkpoint) -> Layout:
    """Its second layer holds its experts as bottoms."""
    return layout_by_expert(checkpoint.spec, NAMES, bottoms=(1,))


def everything(spec: ModelSpec, layout: Layout) -> Placement:
    return placement(spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)


def resident(
    checkpoint: Checkpoint, layout: Layout, store: SegmentStore | None = None
) -> torch.Tensor:
    place = everything(checkpoint.spec, layout)
    with open_engine(checkpoint, layout, place, store=store) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


def some_slots(spec: ModelSpec, layout: Layout, slots: int, **options: object) -> Placement:
    """So many slots for the experts of each encoding at most."""
    place = placement(spec, layout, tops=0, bottoms=0, staging=2, context=CONTEXT)
    layers = [
        with_slots(
            cut,
            dataclasses.replace(each, **options),  # type: ignore[arg-type]
            [min(slots, size) for size in cut.class_sizes(len(each.hot)).values()],
        )
        for cut, each in zip(layout.layers, place.layers, strict=True)
    ]
    return with_layers(spec, layout, place, layers)


class DequantisedByExpert:
    """The same checkpoint with every expert rounded to the codes of its encoding, and back."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint = checkpoint
        self.cuts = {cut.layer: cut for cut in layout.layers}

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        weights = self.checkpoint.expert(layer, expert)
        name = self.cuts[layer].encoding_of(expert)
        if not encoding(name).quantised:
            return weights
        codes = quantise_expert(weights, encoding(name), "F32", "expert")
        exact = dequantise_expert(codes, encoding(name))
        return dict(weights) | {each: exact[each].view(np.uint32) for each in exact}

    def trunk_tensor(self, name: str) -> Bits:
        return self.checkpoint.trunk_tensor(name)


def test_every_expert_is_computed_in_its_own_encoding(
    checkpoint: Checkpoint, layout: Layout, tmp_path: Path
) -> None:
    """The numbers of the dequantised model, from a pack and from the checkpoint."""
    spec = checkpoint.spec
    plain = layout_by_expert(spec, (("F32",),))
    source = DequantisedByExpert(checkpoint, layout)
    expected = resident(checkpoint, plain, CheckpointStore(source, spec, plain))
    pack(checkpoint, plan_for(spec, layout, everything(spec, layout)), tmp_path / "pack")
    found = resident(checkpoint, layout, PackStore.open(tmp_path / "pack"))
    assert torch.equal(found, resident(checkpoint, layout)), "a pack holds what is made on the fly"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_bits_do_not_depend_on_placement_or_order_of_arrival(
    checkpoint: Checkpoint, tmp_path: Path, seed: int
) -> None:
    """Slots of every encoding, rankings, policies, prefetching, staging and delays, all drawn."""
    spec = checkpoint.spec
    bottoms = (0, 2) if seed % 2 else ()
    layout = layout_by_expert(spec, NAMES, seed=seed, bottoms=bottoms)
    pack(checkpoint, plan_for(spec, layout, everything(spec, layout)), tmp_path / "pack")
    expected = resident(checkpoint, layout, PackStore.open(tmp_path / "pack"))
    random = Random(seed)
    for trial in range(25):
        place = any_placement(checkpoint, layout, random, pooled=False)
        with disturbed(checkpoint, layout, place, tmp_path / "pack", random) as engine:
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected), (trial, place)


def test_experts_that_only_pass_through_need_no_slots_told_apart(
    checkpoint: Checkpoint, layout: Layout
) -> None:
    """As the commands run a model that does not fit: with no slots at all."""
    place = streaming_placement(
        checkpoint.spec, layout, "cpu", 1, context_tokens=CONTEXT, staging_experts=3
    )
    with open_engine(checkpoint, layout, place) as engine:
        found = all_logits(engine, PROMPT, FOLLOWING)
    assert torch.equal(found, resident(checkpoint, layout))


def test_ram_behind_a_device_holds_every_expert_in_its_own_size(
    checkpoint: Checkpoint, layout: Layout
) -> None:
    spec = checkpoint.spec
    place = some_slots(spec, layout, 1, policy="pinned")
    everything_bytes = slow_bytes(spec, layout)
    tier = ram_tier(spec, layout, place.layers, everything_bytes)
    assert sum(tier.held.values()) == everything_bytes
    first = layout.layers[0]
    for segment, size_bytes in tier.held.items():
        if segment.layer == first.layer:
            name = first.encoding_of(segment.expert)
            assert size_bytes == stored_bytes(spec, first, "top", name)
    # What never leaves the device comes last: of each encoding its hottest.
    stay = [segment.expert for segment in list(tier.held) if segment.layer == first.layer][-3:]
    assert set(stay) == {first.encodings.index(name) for name in first.classes}


def held_bytes(engine: Engine) -> int:
    return sum(
        piece.memory.nbytes
        for layer in engine._experts.layers.values()
        for slots in layer.slots.values()
        for piece in slots.pieces
    )


def test_the_budget_counts_what_is_allocated_to_the_byte(
    checkpoint: Checkpoint, layout: Layout
) -> None:
    """By hand: slots of each encoding, and a frame as large as the largest expert."""
    spec = checkpoint.spec
    place = some_slots(spec, layout, 2)
    expected = sum(
        min(2, size)
        * (stored_bytes(spec, cut, "top", name) or stored_bytes(spec, cut, "bottom", name))
        for cut in layout.layers
        for name, size in cut.class_sizes(8).items()
    )
    assert place.memory.slots_bytes == expected
    assert place.memory.staging_bytes == 2 * stored_bytes(spec, layout.layers[0], "top", "F32")
    with open_engine(checkpoint, layout, place) as engine:
        all_logits(engine, PROMPT, FOLLOWING)
        assert held_bytes(engine) == expected
        assert engine._experts.allocated_bytes == expected + place.memory.staging_bytes
    full = everything(spec, layout)
    assert full.memory.slots_bytes == slow_bytes(spec, layout)


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_slots_hold_the_experts_that_the_cache_says(
    checkpoint: Checkpoint, layout: Layout, slots: int
) -> None:
    """After generations under every twin: each in memory of its own size."""
    store = CheckpointStore(checkpoint, checkpoint.spec, layout)
    place = some_slots(
        checkpoint.spec, layout, slots, policy="lcp", prefetch="all", prefetch_depth=3
    )
    with open_engine(checkpoint, layout, place) as engine:
        list(engine.generate(PROMPT, max_new_tokens=20, sampler=Sampler()))
        for layer in engine._experts.layers.values():
            for part, of_part in layer.slots.items():
                held = of_part.cache.resident
                assert sorted(held.values()) == list(range(len(of_part.pieces)))
                for expert, slot in held.items():
                    segment = SegmentId(layer.number, expert, part)
                    shape = store.shape(segment)
                    expected = np.zeros(shape.stored_bytes, np.uint8)
                    store.read_into(segment, expected, CheckMode.NEVER)
                    found = of_part.pieces[slot].memory.numpy()
                    assert len(found) == shape.stored_bytes
                    assert (found == expected)[: shape.size_bytes].all()


def test_slots_do_not_move_where_they_are_of_several_sizes(
    checkpoint: Checkpoint, layout: Layout
) -> None:
    place = some_slots(checkpoint.spec, layout, 2)
    with (
        open_engine(checkpoint, layout, place) as engine,
        pytest.raises(PlanMismatchError, match="layer 0 holds experts in several encodings"),
    ):
        engine.rearrange(place.layers)


def test_a_pool_over_experts_of_several_sizes_is_refused(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = layout_by_expert(spec, NAMES)
    place = placement(spec, layout, tops=0, bottoms=0, staging=1, pool=SharedPool(3, "lru"))
    with pytest.raises(PlanMismatchError, match="layer 0 holds experts in F32, INT8, INT4_G32"):
        require_fit(spec, layout, place)


def test_a_mixed_layer_that_is_cut_is_refused(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    whole = layout_by_expert(spec, NAMES)
    first = whole.layers[0]
    cut = mixed_layout(spec, first.layer, first.encodings, split=32)
    layout = dataclasses.replace(whole, layers=(cut, *whole.layers[1:]))
    place = placement(spec, whole, tops=0, bottoms=0, staging=1)
    with pytest.raises(PlanMismatchError, match="cuts them at 32 of 96 neurons; expected whole"):
        require_fit(spec, layout, place)
