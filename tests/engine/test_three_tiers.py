"""The engine over three tiers: a device that is the processor, RAM for some segments, the rest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from moepack_runtime.transfer import CudaTransfer, HostileTransfer, HostTransfer, Transfer
from moepack_runtime.transfer.pinned import PinnedSegments

from moepack.budget import slow_bytes
from moepack.checkpoint import Checkpoint
from moepack.plan import Placement
from moepack.ram_tier import RamTier, ram_tier
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
