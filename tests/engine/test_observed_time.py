"""What a timeline is shown is what the passes report, and showing it changes nothing."""

from __future__ import annotations

from functools import partial
from time import perf_counter

import pytest
from moepack_runtime.chrome_trace import ChromeTrace
from moepack_runtime.pass_report import PassReport, total
from moepack_runtime.sampling import Sampler
from moepack_runtime.stats import Meter
from moepack_runtime.transfer import ThrottledTransfer, Ticket, Transfer
from typing_extensions import override

from moepack.checkpoint import Checkpoint
from tests.conftest import TinyFolder
from tests.support.engines import open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.predictors import Guesses
from tests.support.traces import Slice, assert_apart, assert_nested, tracks, written

PROMPT = [(11 * place + 3) % 250 + 3 for place in range(30)]


@pytest.fixture
def checkpoint(tiny_folder: TinyFolder) -> Checkpoint:
    return Checkpoint.open(tiny_folder("qwen3_moe", "plain"))


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[PassReport]:
    """Every pass, the prompt's too, as the meter is told of it."""
    found: list[PassReport] = []
    count = Meter.count

    def noting(meter: Meter, layer: int, report: PassReport) -> None:
        found.append(report)
        count(meter, layer, report)

    monkeypatch.setattr(Meter, "count", noting)
    return found


def carried(found: dict[str, list[Slice]], purpose: str) -> int:
    """Bytes over all tracks of the link."""
    return sum(
        piece.event["args"]["bytes"]
        for name, slices in found.items()
        if name.startswith("link")
        for piece in slices
        if piece.event["args"]["purpose"] == purpose
    )


@pytest.mark.parametrize("throttled", [False, True])
def test_a_trace_holds_every_byte_and_wait_that_the_passes_report(
    checkpoint: Checkpoint, reports: list[PassReport], throttled: bool
) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5, 1.0, 0.0))
    place = placement(
        spec, layout, tops=3, bottoms=2, staging=6, context=96, prefetch="all", depth=4
    )
    slow = partial(ThrottledTransfer, rate_bytes_per_s=2e8, latency_s=1e-4)
    trace = ChromeTrace()
    drawn: list[list[int]] = []
    with open_engine(
        checkpoint, layout, place, twin=slow if throttled else lambda transfer: transfer
    ) as engine:
        for timeline in (None, trace):
            engine.observe_time(timeline)
            reports.clear()
            drawn.append(list(engine.generate(PROMPT, max_new_tokens=12, sampler=Sampler())))
    assert drawn[0] == drawn[1]
    found = tracks(written(trace))
    reported = total(reports)
    assert reported.demand_bytes > 0
    assert reported.ahead_used_bytes > 0
    assert carried(found, "demand") == reported.demand_bytes
    assert carried(found, "ahead_used") == reported.ahead_used_bytes
    waited_s = sum(piece.end_ns - piece.begin_ns for piece in found["waits"]) / 1e9
    assert waited_s == pytest.approx(reported.wait_s, abs=1e-6 * len(reports))
    assert len(found["passes"]) == 12
    assert_nested(found["compute"])
    for name, slices in found.items():
        if name != "compute":
            assert_apart(slices)


class Timed(ThrottledTransfer):
    """Adds up for how long it has held up whoever waited."""

    waited_s = 0.0

    @override
    def wait(self, ticket: Ticket) -> None:
        began_s = perf_counter()
        super().wait(ticket)
        self.waited_s += perf_counter() - began_s


def test_waiting_for_a_frame_that_is_filled_for_nobody_counts(
    checkpoint: Checkpoint, reports: list[PassReport]
) -> None:
    """One frame, wrong guesses, and a link of four milliseconds a segment."""
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(
        checkpoint.spec, layout, tops=0, bottoms=0, staging=1, context=96, prefetch="all", depth=1
    )
    made: list[Timed] = []

    def slow(transfer: Transfer) -> Transfer:
        made.append(Timed(transfer, 1e9, 4e-3))
        return made[0]

    experts = checkpoint.spec.moe(0).num_experts
    guesses = Guesses(experts, seed=1)
    trace = ChromeTrace()
    with open_engine(checkpoint, layout, place, twin=slow, predictor=guesses) as engine:
        engine.observe_time(trace)
        made[0].waited_s = 0.0
        for token in PROMPT[:6]:
            engine.decode(token)
        waited_s = made[0].waited_s
    reported = total(reports)
    assert reported.ahead_wasted_bytes > 0
    assert reported.wait_s == pytest.approx(waited_s, rel=0.05)
    shown_s = sum(p.end_ns - p.begin_ns for p in tracks(written(trace))["waits"]) / 1e9
    assert shown_s == pytest.approx(reported.wait_s, abs=1e-6 * len(reports))


def test_layers_hold_their_parts_and_every_segment_of_their_experts(
    checkpoint: Checkpoint,
) -> None:
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5,))
    place = placement(spec, layout, tops=3, bottoms=0, staging=4, context=96)
    trace = ChromeTrace()
    with open_engine(checkpoint, layout, place) as engine:
        engine.prefill(PROMPT)
        engine.observe_time(trace)
        engine.decode(7)
        engine.observe_time(None)
        engine.decode(8)
    names = [piece.name for piece in tracks(written(trace))["compute"]]
    top_k = spec.moe(0).top_k
    for layer in range(len(spec.layers)):
        begin = names.index(f"layer {layer}")
        rest = [name for name in names[begin + 1 :] if name.startswith(("layer", "head"))]
        mine = names[begin + 1 : names.index(rest[0])]
        assert mine[0] == "attention"
        assert {"route", "shared"} <= set(mine)
        segments = [name for name in mine if name.startswith(f"{layer}/")]
        assert len(segments) == len(set(segments)) == 2 * top_k
    assert names[-1] == "head"
