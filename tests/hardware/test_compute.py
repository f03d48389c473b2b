from __future__ import annotations

import dataclasses

import pytest

from moepack.compute import ComputeProfile, Curve, block_seconds, token_seconds, worthwhile_threads
from tests.pack.fake_models import make_spec
from tests.support.routed import compute_of, layer_compute

#: Layer 0 is dense; layers 1 and 2 take the same experts.
SPEC = make_spec()
ROUTED = dataclasses.replace(
    layer_compute([1, 2], attention=2.0, expert=3.0, ffn=0.5), fixed=Curve((1, 16), (1.0, 4.0))
)
DENSE = layer_compute([0], attention=2.0, expert=None, ffn=7.0)
PROFILE = compute_of(SPEC, [DENSE, ROUTED], head_s=11.0)


def test_around_its_experts_a_layer_takes_everything_else() -> None:
    assert DENSE.around_s(1) == 2.0 + 7.0
    assert ROUTED.around_s(1) == 2.0 + 0.0 + 1.0 + 0.5
    assert ROUTED.around_s(16) == 2.0 + 0.0 + 4.0 + 0.5


def test_a_token_takes_its_experts_and_a_block_all_of_them() -> None:
    moe = SPEC.moe(1)
    layers_s = DENSE.around_s(1) + 2 * ROUTED.around_s(1)
    assert token_seconds(SPEC, PROFILE) == pytest.approx(11.0 + layers_s + 2 * moe.top_k * 3.0)
    # The largest block that was measured is of one token here.
    assert block_seconds(SPEC, PROFILE) == pytest.approx(
        11.0 + layers_s + 2 * moe.num_experts * 3.0
    )


@pytest.mark.parametrize(("share", "threads"), [(0.9, 1), (0.7, 2)])
def test_a_second_thread_must_be_worth_it(share: float, threads: int) -> None:
    def profile(scale: float, threads: int) -> ComputeProfile:
        routed = layer_compute([0, 1, 2], attention=scale, expert=scale)
        made = compute_of(SPEC, [routed], head_s=scale)
        return dataclasses.replace(made, threads=threads)

    found = worthwhile_threads(SPEC, [profile(1.0, 1), profile(share, 2)])
    assert found.threads == threads
