"""The engine over three tiers: a device that is the processor, RAM for some segments, the rest."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from moepack_runtime.transfer import CudaTransfer, HostileTransfer, HostTransfer, Transfer
from moepack_runtime.transfer.pinned import PinnedSegments

from moepack.budget import slow_bytes
from moepack.checkpoint import Checkpoint
from moepack.hardware import find_hardware
from moepack.measuring import draw, warm_up
from moepack.plan import Placement, Policy
from moepack.ram_tier import RamTier, host_tier, ram_tier
from moepack.replayed_run import record_run, replay_run
from moepack.roofline import derive_compute
from moepack.segments import SegmentId
from tests.conftest import TinyFolder
from tests.link.fake_cuda import FakeDevice
from tests.support.engines import all_logits, open_engine
from tests.support.plans import mixed_layout, placement

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
FOLLOWING = [17, 99, 4, 250, 31, 8]


def behind(tier: RamTier, disk: Transfer) -> CudaTransfer:
    assert isinstance(disk, HostTransfer)
    pinned = PinnedSegments(disk, tier.held, bounces=tier.bounces, bounce_bytes=tier.bounce_bytes)
    assert pinned.size_bytes == tier.total_bytes
    return CudaTransfer(pinned, torch.device("cpu"))


def hostile(tier: RamTier, disk: Transfer) -> Transfer:
    return HostileTransfer(behind(tier, disk), seed=5)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_the_bits_do_not_depend_on_what_ram_holds(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.3, 1.0, 0.5, 0.0))
    place_on = partial(placement, spec, layout, context=96)
    with open_engine(checkpoint, layout, place_on(tops=99, bottoms=99, staging=1)) as engine:
        resident = all_logits(engine, PROMPT, FOLLOWING)
    device = FakeDevice(monkeypatch)
    places: list[Placement] = [
        place_on(tops=1, bottoms=0, staging=2),
        place_on(tops=3, bottoms=2, staging=5, policy="lcp", prefetch="all", depth=3),
    ]
    for place in places:
        least = ram_tier(spec, layout, place.layers, 0)
        least_bytes = least.bounces * least.bounce_bytes
        room_bytes = least_bytes + fraction * (slow_bytes(spec, layout) - least_bytes)
        tier = ram_tier(spec, layout, place.layers, int(room_bytes))
        assert bool(tier.held) == (fraction > 0)
        assert bool(tier.bounce_bytes) == (fraction < 1)
        for twin in (behind, hostile):
            with open_engine(checkpoint, layout, place, twin=partial(twin, tier)) as engine:
                assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), resident)
            assert not device.runtime.pinned


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("policy", ["lru", "lcp", "pinned"])
def test_the_replay_reads_what_the_stand_in_reads(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, share: float, policy: Policy
) -> None:
    """Every byte over the link of a run on demand, and every byte from the disk."""
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.3, 1.0, 0.5, 0.0))
    place = placement(spec, layout, tops=3, bottoms=2, staging=4, context=96, policy=policy)
    none = host_tier(spec, layout, place.layers, 0, place.readers)
    bounces = none.bounces * none.bounce_bytes
    pinned_bytes = bounces + int(share * (slow_bytes(spec, layout) - bounces))
    host = host_tier(spec, layout, place.layers, pinned_bytes, place.readers)
    place = dataclasses.replace(place, host=host)
    tier = ram_tier(spec, layout, place.layers, pinned_bytes, readers=place.readers)
    assert (tier.total_bytes, sum(tier.held.values())) == (host.total_bytes, host.held_bytes)
    FakeDevice(monkeypatch)
    read_bytes = 0
    fetch = PinnedSegments.fetch

    def counted(
        pinned: PinnedSegments, segment: SegmentId, bounce: torch.Tensor | None
    ) -> torch.Tensor:
        nonlocal read_bytes
        if segment not in pinned.segments:
            read_bytes += pinned.stored_bytes(segment)
        return fetch(pinned, segment, bounce)

    monkeypatch.setattr(PinnedSegments, "fetch", counted)
    new_tokens = 12
    with open_engine(checkpoint, layout, place, twin=partial(behind, tier)) as engine:
        run = record_run(engine, [PROMPT], new_tokens)
    with open_engine(checkpoint, layout, place, twin=partial(behind, tier)) as engine:
        warm_up(engine, [PROMPT])
        before_bytes = 0
        for number, _ in enumerate(draw(engine, PROMPT, new_tokens)):
            if number == 0:
                before_bytes = read_bytes
        stats = engine.stats()
    card = find_hardware("rtx-4090")
    _, told = replay_run(
        spec,
        derive_compute(spec, card),
        card.link_seconds,
        layout,
        place,
        run,
        disk=card.disk.seconds,
    )
    assert stats.demand_bytes_per_token
    assert told.demand_bytes == pytest.approx(stats.demand_bytes_per_token)
    assert told.disk_bytes * (new_tokens - 1) == pytest.approx(read_bytes - before_bytes)
