"""Missing experts that are replaced by their low copies, or left out: which, with what result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moepack_runtime.capabilities import require_fit
from moepack_runtime.engine import Engine
from moepack_runtime.moe import begin_sum
from moepack_runtime.router import Routing
from moepack_runtime.sampling import Sampler
from moepack_runtime.weights import TORCH_DTYPE

from moepack.checkpoint import Checkpoint
from moepack.encodings import encoding
from moepack.errors import CapabilityError, PlanMismatchError
from moepack.layout import Layout
from moepack.on_miss import fates
from moepack.pack import pack
from moepack.plan import OnMiss, Placement
from moepack.quantise import dequantise_expert, quantise_expert
from moepack.residency import ExpertCache
from moepack.segments import Part
from tests.conftest import TinyFolder
from tests.support.conditions import any_placement, disturbed
from tests.support.engines import all_logits, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(21)]
FOLLOWING = [17, 99, 4, 250, 33]
CONTEXT = 96

#: In every layer of the tiny model.
EXPERTS = 16

#: Of every expert that is missing all but the first are replaced, or left out, sooner or later.
RULE = OnMiss(0.3, 0.6)
ALL_EXACT = OnMiss(1.0, 1.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


def layout_of(checkpoint: Checkpoint, *ratios: float, low: str = "INT4_G32") -> Layout:
    """Cut where the groups of the low copies can be cut."""
    layout = mixed_layout(checkpoint.spec, ratios or (1.0,), encodings=("INT4_G32",))
    cuts = tuple(replace(cut, encoding=checkpoint.spec.dtype) for cut in layout.layers)
    return replace(layout, layers=cuts, low=low)


def place_of(checkpoint: Checkpoint, layout: Layout, slots: int) -> Placement:
    return placement(checkpoint.spec, layout, tops=slots, bottoms=slots, staging=3, context=CONTEXT)


class Plain:
    """The rule and the sum word for word, in float32, on experts that are multiplied whole."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, rule: OnMiss) -> None:
        self.spec = checkpoint.spec
        self.layout = layout
        self.rule = rule
        self.experts: dict[tuple[int, int, bool], dict[str, torch.Tensor]] = {}
        low = encoding(layout.low)
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.moe(layer).num_experts):
                bits = checkpoint.expert(layer, expert)
                self.experts[layer, expert, False] = {
                    name: torch.from_numpy(each.copy()).view(TORCH_DTYPE["F32"])
                    for name, each in bits.items()
                }
                rounded = dequantise_expert(
                    quantise_expert(bits, low, self.spec.dtype, "expert"), low
                )
                self.experts[layer, expert, True] = {
                    name: torch.from_numpy(np.ascontiguousarray(rounded[name]))
                    for name in ("gate.weight", "up.weight", "down.weight")
                }
        self.replaced = self.left_out = 0

    def decode(
        self, engine: Engine, token: int, held: dict[tuple[int, Part], Collection[int]]
    ) -> torch.Tensor:
        """The logits after a token, if this is resident; the engine lends attention and router."""
        with torch.inference_mode():
            hidden = engine.decoder.embed(torch.tensor([token]))
            for number, layer in enumerate(engine.decoder.layers):
                residual = layer.attend(hidden, engine.length)
                x = layer.mlp_norm(residual)
                if self.spec.layers[number].moe is None:
                    hidden = residual + layer.dense(x)
                    continue
                total = begin_sum(x, layer.shared(x))
                self.add(number, total, x, layer.route(x), held)
                hidden = residual + total
            return engine.decoder.logits(hidden)

    def add(
        self,
        layer: int,
        total: torch.Tensor,
        x: torch.Tensor,
        routing: Routing,
        held: dict[tuple[int, Part], Collection[int]],
    ) -> None:
        cut = next(each for each in self.layout.layers if each.layer == layer)
        parts: dict[Part, slice] = {"top": slice(0, cut.split), "bottom": slice(cut.split, None)}
        chosen = sorted(zip(routing.weights[0].tolist(), routing.ids[0].tolist(), strict=True))
        before, everything = 0.0, sum(weight for weight, _ in chosen)
        for weight, expert in reversed(chosen):
            low = before / everything > self.rule.exact_up_to
            out = before / everything > self.rule.low_up_to
            missing = [part for part in held if part[0] == layer and expert not in held[part]]
            self.left_out += out and bool(missing)
            self.replaced += low and not out and bool(missing)
            for part, neurons in parts.items():
                here = (layer, part) not in held or expert in held[layer, part]
                if here or not out:
                    weights = self.experts[layer, expert, low and not here]
                    gate, up = (x @ weights[f"{name}.weight"][neurons].T for name in ("gate", "up"))
                    y = (F.silu(gate) * up) @ weights["down.weight"][:, neurons].T
                    total += weight * y
            before += weight


def residents(engine: Engine) -> dict[tuple[int, Part], Collection[int]]:
    """What every layer and part holds."""
    return {
        (number, part): frozenset(slots.cache.resident)
        for number, layer in engine._experts.layers.items()
        for part, slots in layer.slots.items()
    }


@pytest.mark.parametrize("ratios", [(1.0,), (0.5,), (0.0,), (0.3, 1.0, 0.7)])
@pytest.mark.parametrize("slots", [0, 2, 5])
@pytest.mark.parametrize("low", ["INT4_G32", "INT8"])
def test_decoded_tokens_are_what_the_rule_says(
    checkpoint: Checkpoint, ratios: tuple[float, ...], slots: int, low: str
) -> None:
    """Prompts are exact; what is counted is what was replaced and left out."""
    layout = layout_of(checkpoint, *ratios, low=low)
    place = place_of(checkpoint, layout, slots)
    plain = Plain(checkpoint, layout, RULE)
    with (
        open_engine(checkpoint, layout, replace(place, on_miss=RULE)) as engine,
        open_engine(checkpoint, layout, place) as lender,
    ):
        prompt = Sampler().draw(lender.prefill(PROMPT))
        drawn = engine.generate(PROMPT, max_new_tokens=9, sampler=Sampler())
        token = next(drawn)
        assert token == prompt
        for _ in range(8):
            logits = plain.decode(lender, token, residents(engine))
            lender.kv.advance(1)
            token = next(drawn)
            assert token == Sampler().draw(logits[-1])
        stats = engine.stats()
    assert plain.replaced > 0
    assert plain.left_out > 0
    assert stats.substituted_per_token == plain.replaced / 8
    assert stats.skipped_per_token == plain.left_out / 8
    activated = sum(checkpoint.spec.moe(cut.layer).top_k for cut in layout.layers)
    assert stats.substituted_rate == plain.replaced / 8 / activated
    assert stats.skipped_rate == plain.left_out / 8 / activated


@pytest.mark.parametrize("ratios", [(1.0,), (0.3, 1.0, 0.0)])
def test_the_numbers_are_those_of_a_plain_sum(
    checkpoint: Checkpoint, ratios: tuple[float, ...]
) -> None:
    layout = layout_of(checkpoint, *ratios)
    place = place_of(checkpoint, layout, 3)
    plain = Plain(checkpoint, layout, RULE)
    with (
        open_engine(checkpoint, layout, replace(place, on_miss=RULE)) as engine,
        open_engine(checkpoint, layout, place) as lender,
    ):
        assert torch.equal(engine.prefill(PROMPT), lender.prefill(PROMPT))
        for token in FOLLOWING:
            expected = plain.decode(lender, token, residents(engine))[-1]
            lender.kv.advance(1)
            torch.testing.assert_close(engine.decode(token), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("ratios", [(1.0,), (0.0,), (0.3, 1.0, 0.7)])
def test_thresholds_of_one_change_no_bit(
    checkpoint: Checkpoint, tmp_path: Path, ratios: tuple[float, ...]
) -> None:
    """From packs as well, whatever is resident, guessed and slow; nothing is replaced then."""
    layout = layout_of(checkpoint, *ratios)
    everything = place_of(checkpoint, layout, 99)
    with open_engine(checkpoint, layout, everything) as engine:
        expected = all_logits(engine, PROMPT, FOLLOWING)
    pack(checkpoint, plan_for(checkpoint.spec, layout, everything), tmp_path / "pack")
    random = Random(len(ratios))
    for trial in range(12):
        place = any_placement(checkpoint, layout, random, pooled=ratios == (1.0,) and trial % 2 > 0)
        place = replace(place, on_miss=ALL_EXACT)
        with disturbed(checkpoint, layout, place, tmp_path / "pack", random) as engine:
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)


def test_what_is_resident_is_exact_whatever_the_thresholds(checkpoint: Checkpoint) -> None:
    layout = layout_of(checkpoint)
    place = place_of(checkpoint, layout, 99)
    with open_engine(checkpoint, layout, place) as engine:
        expected = all_logits(engine, PROMPT, FOLLOWING)
    with open_engine(checkpoint, layout, replace(place, on_miss=OnMiss(0.0, 0.0))) as engine:
        assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)


@pytest.mark.parametrize("ratios", [(1.0,), (0.3, 1.0, 0.7)])
def test_a_hostile_link_and_wrong_guesses_leave_numbers_that_are_computed_with(
    checkpoint: Checkpoint, tmp_path: Path, ratios: tuple[float, ...]
) -> None:
    """A frame that has not arrived holds NaN."""
    layout = layout_of(checkpoint, *ratios)
    random = Random(5)
    pack(checkpoint, plan_for(checkpoint.spec, layout, place_of(checkpoint, layout, 1)), tmp_path)
    for _ in range(12):
        place = any_placement(checkpoint, layout, random, pooled=False)
        place = replace(place, on_miss=RULE)
        with disturbed(checkpoint, layout, place, tmp_path, random) as engine:
            assert torch.isfinite(all_logits(engine, PROMPT, FOLLOWING * 2)).all()


def test_what_arrived_ahead_is_used_as_it_is(checkpoint: Checkpoint) -> None:
    """With everything guessed and there in time, nothing is replaced but in the first layer."""
    layout = layout_of(checkpoint)
    place = placement(
        checkpoint.spec,
        layout,
        tops=0,
        bottoms=0,
        staging=2 * EXPERTS,
        context=CONTEXT,
        prefetch="all",
        depth=EXPERTS,
    )
    with open_engine(checkpoint, layout, place) as engine:
        expected = all_logits(engine, PROMPT, FOLLOWING)
    with open_engine(checkpoint, layout, replace(place, on_miss=OnMiss(0.0, 0.0))) as engine:
        memory = engine._experts
        push = memory.ahead.push

        def push_and_wait() -> None:
            push()
            for fetch in memory.ahead._fetches.values():
                for ticket in fetch.tickets.values():
                    memory.transfer.wait(ticket)

        memory.ahead.push = push_and_wait  # type: ignore[method-assign]
        assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected)


def test_only_what_came_exact_is_admitted(checkpoint: Checkpoint) -> None:
    """Caches hold what one does that is stepped by the rule, token by token."""
    layout = layout_of(checkpoint)
    place = place_of(checkpoint, layout, 3)
    caches = {number: ExpertCache(3, range(EXPERTS)) for number in checkpoint.spec.moe_layers}
    seen: list[tuple[int, Routing]] = []

    class Keep:
        def routed(self, layer: int, _residual: torch.Tensor, routing: Routing) -> None:
            seen.append((layer, routing))

    with open_engine(checkpoint, layout, replace(place, on_miss=RULE)) as engine:
        engine.observe(Keep())
        engine.prefill([5])  # one token at the beginning is a prompt
        for layer, routing in seen:
            caches[layer].step(routing.ids.tolist())
        for token in FOLLOWING * 3:
            seen.clear()
            engine.decode(token)
            for layer, routing in seen:
                ids = routing.ids[0].tolist()
                found = fates(routing.weights[0].numpy(), RULE)
                caches[layer].step([ids], {e for e, fate in zip(ids, found, strict=True) if fate})
            assert residents(engine) == {
                (number, "top"): frozenset(cache.resident) for number, cache in caches.items()
            }


def test_fates_follow_the_weights_before() -> None:
    weights = [[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]]
    expected = [[1, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert fates(weights, OnMiss(0.5, 0.75)).tolist() == expected
    random = np.random.default_rng(3)
    many = random.exponential(size=(200, 8)).astype(np.float16)
    assert not fates(many, ALL_EXACT).any()
    for row, found in zip(many.astype(np.float64), fates(many, RULE), strict=True):
        before = 0.0
        for place in sorted(range(8), key=lambda place: -row[place]):
            share = before / row.sum()
            assert found[place] == int(share > 0.3) + int(share > 0.6)
            before += row[place]


def test_a_layout_without_low_copies_refuses_such_a_placement(checkpoint: Checkpoint) -> None:
    layout = layout_of(checkpoint)
    place = replace(place_of(checkpoint, layout, 1), on_miss=RULE)
    bare = replace(layout, low="")
    with pytest.raises(PlanMismatchError, match="low copies, the layout has none"):
        open_engine(checkpoint, bare, place)
    with pytest.raises(CapabilityError, match="low copies on cuda; this engine does on cpu"):
        require_fit(checkpoint.spec, layout, replace(place, device="cuda"))
