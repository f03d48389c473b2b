"""What the meter makes of passes: sums over decoded tokens, and nothing where there is nothing."""

from __future__ import annotations

import dataclasses

import pytest
from moepack_runtime.pass_report import NO_PASS, PassReport
from moepack_runtime.stats import LayerStats, Meter, RunStats
from moepack_runtime.transfer import LinkStatistics

from moepack.measuring import average

REST = LinkStatistics(0, 0, 0.0)

#: Of one token and four experts, all of them found.
FOUND = NO_PASS._replace(tokens=1, activations=4, hits=4, ready=4)
#: Three found whole, one of them fetched ahead; one asked for, and one fetched in vain.
MIXED = PassReport(
    tokens=1,
    activations=4,
    hits=2,
    ready=3,
    predicted=4,
    recalled=3,
    demand_bytes=1000,
    ahead_used_bytes=600,
    ahead_wasted_bytes=200,
    wait_s=0.5,
)


def read(meter: Meter, link: LinkStatistics = REST) -> RunStats:
    return meter.stats(link, peak_fast_bytes=1, peak_process_bytes=None, process_base_bytes=1)


def generation(*tokens: dict[int, PassReport]) -> Meter:
    """A meter after a prompt, whose passes are those of the first token, and the others."""
    meter = Meter(10, REST)
    for place, passes in enumerate(tokens):
        meter.begin(REST)
        for layer, report in passes.items():
            meter.count(layer, report)
        if place:
            meter.next_token(REST)
        else:
            meter.first_token()
    return meter


def test_figures_are_of_the_tokens_after_the_first_layer_by_layer() -> None:
    prompt = {1: MIXED._replace(tokens=10, activations=40), 5: MIXED}
    stats = read(generation(prompt, {1: MIXED, 5: FOUND}, {1: FOUND, 5: FOUND}))
    assert stats.new_tokens == 3
    assert (stats.hit_rate, stats.ready_rate, stats.recall) == (14 / 16, 15 / 16, 3 / 4)
    assert stats.demand_bytes_per_token == 500
    assert stats.ahead_used_bytes_per_token == 300
    assert stats.ahead_wasted_bytes_per_token == 100
    assert stats.link_bytes_per_token == 900
    assert stats.wait_s == 0.5
    assert stats.layers == (
        LayerStats(1, hit_rate=6 / 8, ready_rate=7 / 8, recall=3 / 4, wait_s_per_token=0.25),
        LayerStats(5, hit_rate=1.0, ready_rate=1.0, recall=None, wait_s_per_token=0.0),
    )


def test_a_token_that_was_not_drawn_counts_for_nothing() -> None:
    meter = generation({1: FOUND}, {1: FOUND})
    before = dataclasses.replace(read(meter))
    meter.begin(REST)
    meter.count(1, MIXED)
    assert read(meter) == before
    meter.begin(REST)
    meter.count(1, FOUND)
    meter.next_token(REST)
    meter.count(1, MIXED)  # a pass of somebody else's
    assert read(meter).hit_rate == 1.0


def test_what_does_not_exist_is_none() -> None:
    alone = read(generation({1: MIXED}))
    for name in (
        "tpot_s",
        "hit_rate",
        "recall",
        "link_bytes_per_token",
        "demand_bytes_per_token",
        "link_busy_fraction",
        "link_bytes_per_s",
        "wait_s",
    ):
        assert getattr(alone, name) is None, name
    assert alone.layers == ()
    unpredicted = read(generation({1: FOUND}, {1: FOUND}))
    assert unpredicted.demand_bytes_per_token == 0
    assert unpredicted.ahead_used_bytes_per_token is None
    assert unpredicted.ahead_wasted_bytes_per_token is None


def test_the_link_is_busy_only_while_tokens_are_computed() -> None:
    meter = Meter(10, LinkStatistics(100, 1, 50.0))
    meter.begin(LinkStatistics(100, 1, 50.0))
    meter.first_token()
    meter.begin(LinkStatistics(500, 2, 70.0))
    meter.next_token(LinkStatistics(900, 3, 71.0))
    meter.begin(LinkStatistics(5000, 9, 90.0))
    meter.next_token(LinkStatistics(5000, 9, 90.0))
    stats = read(meter, LinkStatistics(5000, 9, 90.0))
    assert stats.link_busy_fraction == pytest.approx(1.0 / meter.decode_s)
    assert stats.link_bytes_per_s == 4900 / 40.0
    assert stats.mean_read_bytes == 4900 / 8


def test_what_was_broken_off_before_it_began_has_no_rate() -> None:
    stats = read(Meter(10, REST), LinkStatistics(0, 2, 1e-3))
    assert stats.link_bytes_per_s is None
    assert stats.mean_read_bytes is None


def test_the_mean_of_generations_is_taken_layer_by_layer() -> None:
    one = read(generation({1: FOUND}, {1: MIXED, 5: FOUND}))
    two = read(generation({1: FOUND}, {1: FOUND, 5: FOUND}))
    mean = average([one, two])
    assert mean.hit_rate == pytest.approx((6 / 8 + 1.0) / 2)
    assert mean.ahead_used_bytes_per_token == 600  # of the only one that predicted
    assert [layer.layer for layer in mean.layers] == [1, 5]
    assert mean.layers[0].hit_rate == pytest.approx(0.75)
    assert mean.layers[0].wait_s_per_token == pytest.approx(0.25)
    assert mean.layers[0].recall == 0.75
    assert mean.layers[1].recall is None
    assert mean.tokens_per_s is not None
    assert one.tokens_per_s is not None
    assert two.tokens_per_s is not None
    assert mean.tokens_per_s == pytest.approx(2 / (1 / one.tokens_per_s + 1 / two.tokens_per_s))
