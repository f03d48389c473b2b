"""What the engine promises beside its numbers: budgets, one fetch a prompt, counts, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from moepack_runtime.loading import open_packed
from moepack_runtime.router import Routing
from moepack_runtime.sampling import Sampler, SamplingParams
from moepack_runtime.store import PackStore

from moepack.checkpoint import Checkpoint
from moepack.errors import (
    BudgetTooSmallError,
    ContextLengthError,
    DamagedSegmentError,
    PlanMismatchError,
    RunError,
)
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.measuring import measure
from moepack.pack import pack
from moepack.plan import Placement
from moepack.residency import ExpertCache
from moepack.segments import SegmentId
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.memory import peak_bytes
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement

PROMPT = [(11 * place + 3) % 250 + 3 for place in range(40)]
OTHER = [(7 * place + 5) % 250 + 3 for place in range(30)]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


class Routes:
    """Remembers the experts of every token, by layer."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[list[int]]] = {}

    def routed(self, layer: int, residual: torch.Tensor, routing: Routing) -> None:
        assert len(residual) == len(routing.ids)
        self.tokens.setdefault(layer, []).extend(routing.ids.tolist())


def whole(checkpoint: Checkpoint, *, tops: int, staging: int) -> tuple[Layout, Placement]:
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(checkpoint.spec, layout, tops=tops, bottoms=0, staging=staging, context=96)
    return layout, place


def test_a_prompt_fetches_each_missing_segment_once(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.3, 1.0, 0.0))
    place = placement(spec, layout, tops=2, bottoms=0, staging=2, context=96)
    routes = Routes()
    with open_engine(checkpoint, layout, place) as engine:
        engine.observe(routes)
        warm = engine.link.reads
        engine.prefill(PROMPT)
        reads = engine.link.reads - warm
    expected = 0
    for cut, layer in zip(layout.layers, place.layers, strict=True):
        needed = {expert for token in routes.tokens[cut.layer] for expert in token}
        expected += len(needed - set(layer.hot[: layer.top_slots])) if cut.split else 0
        expected += len(needed) if cut.split < cut.width else 0
    assert reads == expected


def test_hits_and_bytes_are_those_of_the_cache_replayed(checkpoint: Checkpoint) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    routes = Routes()
    with open_engine(checkpoint, layout, place) as engine:
        engine.observe(routes)
        produced = list(
            engine.generate(PROMPT, max_new_tokens=20, sampler=Sampler(GREEDY), stop_ids=())
        )
        stats = engine.stats()
    hits = misses = 0
    for layer in place.layers:
        tokens = routes.tokens[layer.layer]
        cache = ExpertCache(layer.top_slots, layer.hot)
        cache.step(tokens[: len(PROMPT)])
        for token in tokens[len(PROMPT) :]:
            found = len(cache.step([token]).resident)
            hits += found
            misses += len(token) - found
    assert len(produced) == 20
    assert stats.new_tokens == 20
    assert stats.hit_rate == hits / (hits + misses)
    assert stats.ready_rate == stats.hit_rate
    stored = stored_expert_bytes(checkpoint)
    assert stats.link_bytes_per_token == pytest.approx(misses * stored / 19)


def stored_expert_bytes(checkpoint: Checkpoint) -> int:
    expert = checkpoint.spec.expert_bytes(checkpoint.spec.moe_layers[0])
    return -(-expert // 4096) * 4096


def test_what_is_allocated_is_what_was_planned(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.3, 1.0, 0.0))
    place = placement(spec, layout, tops=3, bottoms=2, staging=3, context=96)
    with open_engine(checkpoint, layout, place) as engine:
        engine.prefill(PROMPT)
        peak = engine.stats().peak_fast_bytes
        slots_and_frames = place.memory.slots_bytes + place.memory.staging_bytes
        assert engine._experts.allocated_bytes == slots_and_frames
        assert engine.kv.size_bytes == place.memory.kv_bytes
        assert peak == place.memory.total_bytes <= place.fast_budget_bytes


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_prompt_stays_within_the_planned_hidden_states(
    checkpoint: Checkpoint, threads: int
) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place = placement(spec, layout, tops=0, bottoms=0, staging=2, context=512, threads=threads)
    planned = place.memory.hidden_bytes + place.memory.workspace_bytes
    with open_engine(checkpoint, layout, place) as engine:
        torch.set_num_threads(threads)
        assert peak_bytes(lambda: engine.prefill([7] * 512)) <= planned


def test_the_context_is_a_limit(checkpoint: Checkpoint) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    with open_engine(checkpoint, layout, place) as engine:
        with pytest.raises(ContextLengthError, match="planned context of 96"):
            list(engine.generate(PROMPT, max_new_tokens=57, sampler=Sampler(GREEDY)))
        with pytest.raises(ContextLengthError, match="no tokens"):
            list(engine.generate([], max_new_tokens=1, sampler=Sampler(GREEDY)))
        filled = list(engine.generate(PROMPT, max_new_tokens=56, sampler=Sampler(GREEDY)))
        assert len(filled) == 56


def test_tokens_that_the_model_has_not_are_refused_and_the_engine_goes_on(
    checkpoint: Checkpoint,
) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    last = checkpoint.spec.vocab_size - 1
    with open_engine(checkpoint, layout, place) as engine:
        expected = list(engine.generate(PROMPT, max_new_tokens=5, sampler=Sampler(GREEDY)))
        for wrong in (-1, last + 1):
            with pytest.raises(RunError, match=f"token {wrong}, the model has 0 to {last}"):
                engine.prefill([*PROMPT, wrong])
            with pytest.raises(RunError, match=f"token {wrong}, the model has"):
                engine.survey([PROMPT, [wrong]])
        with pytest.raises(ContextLengthError, match="no tokens"):
            engine.forward([])
        found = list(engine.generate(PROMPT, max_new_tokens=5, sampler=Sampler(GREEDY)))
    assert found == expected


def test_a_prompt_that_leaves_room_for_one_token_can_be_measured(checkpoint: Checkpoint) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    with open_engine(checkpoint, layout, place) as engine:
        stats, tokens = measure(engine, [[7] * 95], 1)
        with pytest.raises(ValueError, match="0 new tokens; expected at least one"):
            next(engine.generate(PROMPT, max_new_tokens=0, sampler=Sampler(GREEDY)))
    assert stats.new_tokens == len(tokens) == 1


def test_generation_ends_with_the_stop_token_and_repeats_itself(checkpoint: Checkpoint) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    with open_engine(checkpoint, layout, place) as engine:
        first = list(engine.generate(PROMPT, max_new_tokens=12, sampler=Sampler(GREEDY)))
        stop = first[5]
        second = list(
            engine.generate(PROMPT, max_new_tokens=12, sampler=Sampler(GREEDY), stop_ids={stop})
        )
    assert second == first[: first.index(stop) + 1]


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(checkpoint: Checkpoint) -> None:
    layout, place = whole(checkpoint, tops=3, staging=2)
    with open_engine(checkpoint, layout, place) as engine:
        at_once = engine.prefill(PROMPT)
        engine.reset()
        engine.prefill(PROMPT[:16])
        assert engine.length == 16
        torch.testing.assert_close(engine.prefill(PROMPT[16:]), at_once, atol=1e-5, rtol=0)


def test_a_damaged_segment_is_named_and_nothing_is_computed_with_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout, place = whole(checkpoint, tops=0, staging=2)
    out = tmp_path / "pack"
    plan = plan_for(checkpoint.spec, layout, place)
    pack(checkpoint, plan, out)
    packed = PackedModel.open(out)
    entry = packed.entry(SegmentId(layout.layers[1].layer, 2, "top"))
    with packed.path(entry).open("r+b") as shard:
        shard.seek(entry.offset_bytes + 100)
        byte = shard.read(1)
        shard.seek(entry.offset_bytes + 100)
        shard.write(bytes([byte[0] ^ 1]))
    with open_packed(PackedModel.open(out), plan) as engine:
        with pytest.raises(DamagedSegmentError, match="layer 1, expert 2, top"):
            engine.prefill(PROMPT)
        with pytest.raises(RunError, match="open it again"):
            engine.decode(5)


def test_a_pack_of_another_layout_is_refused_by_its_layers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    spec = checkpoint.spec
    layout, place = whole(checkpoint, tops=0, staging=2)
    out = tmp_path / "pack"
    pack(checkpoint, plan_for(spec, layout, place), out)
    other = mixed_layout(spec, (1.0, 0.5, 1.0))
    split = placement(spec, other, tops=1, bottoms=0, staging=1)
    with pytest.raises(PlanMismatchError, match="in layers 1; pack again"):
        open_packed(PackedModel.open(out), plan_for(spec, other, split))
    longer = dataclasses.replace(layout, prefill_block_tokens=16)
    again = placement(spec, longer, tops=1, bottoms=0, staging=1)
    with pytest.raises(PlanMismatchError, match="in the prefill block; pack again"):
        open_packed(PackedModel.open(out), plan_for(spec, longer, again))


def test_a_new_placement_of_the_same_layout_needs_no_packing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout, place = whole(checkpoint, tops=0, staging=2)
    out = tmp_path / "pack"
    pack(checkpoint, plan_for(checkpoint.spec, layout, place), out)
    found = []
    for tops in (0, 2, 8):
        layout, place = whole(checkpoint, tops=tops, staging=2)
        with open_packed(PackedModel.open(out), plan_for(checkpoint.spec, layout, place)) as engine:
            found.append(engine.prefill(PROMPT))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_survey_routes_each_sequence_as_if_alone_and_reads_each_expert_once(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout, place = whole(checkpoint, tops=0, staging=4)
    out = tmp_path / "pack"
    pack(checkpoint, plan_for(checkpoint.spec, layout, place), out)
    sequences = [PROMPT[:30], PROMPT[5:12], PROMPT[9:40]]
    together, alone = Routes(), Routes()
    with open_engine(checkpoint, layout, place, store=PackStore.open(out)) as engine:
        engine.observe(together)
        engine.survey(sequences)
        reads = engine.link.reads
        engine.observe(alone)
        for sequence in sequences:
            engine.reset()
            engine.prefill(sequence)
    assert together.tokens == alone.tokens
    experts = sum(len({e for t in tokens for e in t}) for tokens in together.tokens.values())
    assert reads == experts


def test_a_survey_does_not_depend_on_the_length_of_what_was_in_the_cache(
    tiny_folder: TinyFolder,
) -> None:
    """The angles change at 64 tokens."""
    checkpoint = Checkpoint.open(tiny_folder("phimoe", "longrope"))
    layout, place = whole(checkpoint, tops=3, staging=2)
    found = []
    with open_engine(checkpoint, layout, place) as engine:
        for _ in range(2):
            found.append(torch.cat([block.hidden for block in engine.survey([PROMPT, OTHER])]))
            engine.prefill(PROMPT)
    assert torch.equal(*found)


def test_a_host_that_cannot_hold_the_process_is_refused_before_the_system_kills_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layout, place = whole(checkpoint, tops=2, staging=1)
    out = tmp_path / "pack"
    pack(checkpoint, plan_for(checkpoint.spec, layout, place), out)
    tight = dataclasses.replace(place, ram_budget_bytes=place.memory.total_bytes)
    files = open_files()
    with pytest.raises(BudgetTooSmallError, match="of host memory and the process itself"):
        open_packed(PackedModel.open(out), plan_for(checkpoint.spec, layout, tight))
    assert open_files() == files


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
