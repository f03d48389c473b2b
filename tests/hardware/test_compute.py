from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moepack.compute import (
    COMPUTE_VERSION,
    ComputeProfile,
    Curve,
    QuantisedExpert,
    RoundedLayer,
    block_seconds,
    load_compute,
    token_seconds,
)
from moepack.compute_rounds import at_pace, median_profile, worthwhile_threads
from moepack.errors import ProfileError
from tests.pack.fake_models import make_spec
from tests.support.routed import compute_of, layer_compute

#: Layer 0 is dense; layers 1 and 2 take the same experts.
SPEC = make_spec()
ROUTED = dataclasses.replace(
    layer_compute([1, 2], attention=2.0, expert=3.0, ffn=0.5), fixed=Curve((1, 16), (1.0, 4.0))
)
DENSE = layer_compute([0], attention=2.0, expert=None, ffn=7.0)
PROFILE = dataclasses.replace(
    compute_of(SPEC, [DENSE, ROUTED], head_s=11.0), version=COMPUTE_VERSION
)


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


def with_rounded(profile: ComputeProfile, attention_s: float, head_s: float) -> ComputeProfile:
    """In 8 bits a dense layer takes a second for its FFN."""
    layers = tuple(
        dataclasses.replace(
            entry,
            rounded=RoundedLayer(
                Curve((1,), (attention_s,)), None if entry.ffn is None else Curve((1,), (1.0,))
            ),
        )
        for entry in profile.layers
    )
    return dataclasses.replace(profile, layers=layers, rounded_head_s=head_s)


def test_a_rounded_trunk_has_times_of_its_own() -> None:
    rounded = with_rounded(PROFILE, 0.25, 5.0)
    assert rounded.with_trunk("") is rounded
    found = rounded.with_trunk("INT8")
    assert found.head_s == 5.0
    assert found.layer(0).around_s(1) == 0.25 + 1.0
    assert found.layer(1).around_s(1) == 0.25 + 0.0 + 1.0 + 1.0
    assert found.layer(1).expert == ROUTED.expert, "experts are none of it"
    with pytest.raises(ProfileError, match=r"no times of a trunk in int8.*run moepack profile"):
        PROFILE.with_trunk("INT8")
    partly = dataclasses.replace(rounded, layers=(rounded.layers[0], ROUTED))
    with pytest.raises(ProfileError):
        partly.with_trunk("INT8")


def test_times_of_a_rounded_trunk_are_medians_and_survive_a_file(tmp_path: Path) -> None:
    rounds = [with_rounded(PROFILE, attention_s, attention_s) for attention_s in (3.0, 1.0, 2.0)]
    found = median_profile(SPEC, rounds)
    assert found.rounded_head_s == 2.0
    assert [entry.rounded.attention.seconds for entry in found.layers if entry.rounded] == [
        (2.0,),
        (2.0,),
    ]
    found.save(tmp_path / "compute.yaml")
    assert load_compute(tmp_path / "compute.yaml") == found


def test_a_profile_without_them_is_written_as_before(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "compute.yaml")
    assert "rounded" not in (tmp_path / "compute.yaml").read_text()
    assert load_compute(tmp_path / "compute.yaml") == PROFILE


def test_on_a_slower_processor_everything_takes_so_many_times_as_long() -> None:
    rounded = RoundedLayer(Curve((1,), (0.25,)), None)
    quantised = (QuantisedExpert("INT8", Curve((1,), (0.5,)), Curve((1, 2), (0.5, 0.75))),)
    entry = dataclasses.replace(
        ROUTED, rounded=rounded, quantised=quantised, transfer_s=0.125, prompt_burst_s=0.5
    )
    profile = dataclasses.replace(
        PROFILE, layers=(DENSE, entry), yardstick_s=0.01, rounded_head_s=3.0
    )
    slower = at_pace(profile, 2.0)
    dense, routed = slower.layers
    assert (slower.head_s, slower.rounded_head_s, slower.yardstick_s) == (22.0, 6.0, 0.02)
    assert (dense.layers, dense.attention, dense.expert) == ((0,), Curve((1,), (4.0,)), None)
    assert dense.ffn == Curve((1,), (14.0,))
    assert routed.fixed == Curve((1, 16), (2.0, 8.0))
    assert routed.rounded == RoundedLayer(Curve((1,), (0.5,)), None)
    assert routed.quantised == (
        QuantisedExpert("INT8", Curve((1,), (1.0,)), Curve((1, 2), (1.0, 1.5))),
    )
    assert (routed.transfer_s, routed.prompt_transfer_s, routed.prompt_burst_s) == (0.25, None, 1.0)
    # What is no time of the layers stays.
    assert (slower.spread, slower.context_tokens) == (profile.spread, profile.context_tokens)


def test_what_a_transfer_ahead_costs_is_read_back_and_else_that_of_a_demand(
    tmp_path: Path,
) -> None:
    demanded = dataclasses.replace(ROUTED, transfer_s=7.0, burst_s=11.0)
    assert demanded.of_ahead == (7.0, 11.0), "an older profile does not tell them apart"

    def told(transfer_s: float) -> ComputeProfile:
        entry = dataclasses.replace(demanded, ahead_transfer_s=transfer_s, ahead_burst_s=4.0)
        return dataclasses.replace(PROFILE, layers=(DENSE, entry))

    found = median_profile(SPEC, [told(3.0), told(1.0), told(2.0)])
    assert found.layer(1).of_ahead == (2.0, 4.0)
    assert at_pace(found, 2.0).layer(1).of_ahead == (4.0, 8.0)
    found.save(tmp_path / "compute.yaml")
    assert load_compute(tmp_path / "compute.yaml") == found
