"""A measurement as people see it: all that there is, and at most a screenful."""

from __future__ import annotations

import dataclasses

import pytest
from moepack_runtime.stats import LayerStats, RunStats
from rich.console import Console

from moepack.drift import Drift
from moepack.report.run import MOST_ROWS, run_view
from moepack.yardstick import Slowness

MIB = 1 << 20


def layer(number: int) -> LayerStats:
    return LayerStats(number, 0.5, 0.75, recall=0.8, wait_s_per_token=1e-3 * (number + 1))


def stats(layers: int) -> RunStats:
    return RunStats(
        prompt_tokens=24,
        new_tokens=5,
        ttft_s=1.2,
        tpot_s=0.1,
        tokens_per_s=10.0,
        prefill_tokens_per_s=20.0,
        hit_rate=0.5,
        ready_rate=0.75,
        recall=0.8,
        link_bytes_per_token=6 * MIB,
        demand_bytes_per_token=3 * MIB,
        ahead_used_bytes_per_token=2 * MIB,
        ahead_wasted_bytes_per_token=1 * MIB,
        link_busy_fraction=0.83,
        link_bytes_per_s=60 * MIB,
        mean_read_bytes=1.5 * MIB,
        wait_s=0.16,
        layers=tuple(map(layer, range(layers))),
        peak_fast_bytes=100 * MIB,
        peak_process_bytes=400 * MIB,
        process_base_bytes=200 * MIB,
    )


def shown(stats: RunStats, efficiency: float | None = 0.94) -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(run_view(stats, {}, 1.5, efficiency))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_what_was_expected_at_this_pace_stands_beside_what_was_predicted() -> None:
    drift = Drift(predicted=0.1, measured=0.16, ratio=1.0, in_band=True, expected=0.16)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(run_view(stats(layers=0), {"tpot_s": drift}, 1.5, None, Slowness(1.2, 1.6)))
    text = captured.get()
    assert "predicted  at this pace  measured  ratio" in " ".join(text.split("\n"))
    assert "took 1.20 times as long as when it was profiled beside prompts, 1.60 beside" in text


def test_every_figure_is_there_once() -> None:
    assert shown(stats(layers=2))[2:] == [
        "tokens  24 in the prompt, 1.2 s for it (20 tokens/s); 5 new",
        "link    6.00 MiB a token: 3.00 MiB on demand, 2.00 MiB ahead, 1.00 MiB in vain",
        (
            "        busy 83% of the time, 60.00 MiB/s then, 1.50 MiB a transfer, 94% of what "
            "it gives at that size"
        ),
        "waited  40 ms a token for the link, 40% of its time",
        "recall  80.0% of the experts that were needed had been predicted",
        (
            "memory  100.00 MiB of the fast tier; the process at most 400.00 MiB, 200.00 MiB of "
            "it before the model"
        ),
        "",
        "layers  hit  ready  recall  waited",
        "0       50%    75%     80%    1 ms  ████████████············",
        "1       50%    75%     80%    2 ms  ████████████████████████",
    ]


@pytest.mark.parametrize("layers", [1, MOST_ROWS, MOST_ROWS + 1, 48, 94])
def test_many_layers_share_the_rows_of_a_screen(layers: int) -> None:
    lines = shown(stats(layers))
    rows = lines[1 + next(i for i, line in enumerate(lines) if line.startswith("layers")) :]
    assert len(rows) == min(layers, len(rows)) <= MOST_ROWS
    assert rows[0].split()[0] == "0"
    ends = rows[-1].split("%")[0].split()
    assert str(layers - 1) in ends


def test_what_was_not_measured_is_not_shown() -> None:
    bare = dataclasses.replace(
        stats(layers=1),
        recall=None,
        ahead_used_bytes_per_token=None,
        ahead_wasted_bytes_per_token=None,
        wait_s=None,
        peak_process_bytes=None,
        layers=(LayerStats(0, 0.5, 0.5, recall=None, wait_s_per_token=0.0),),
    )
    text = "\n".join(shown(bare, efficiency=None))
    for word in ("None", "nan", "ahead", "in vain", "for the link", "gives", "█"):
        assert word not in text, word
    assert "the process itself 200.00 MiB" in text
    single = dataclasses.replace(bare, link_bytes_per_token=None, layers=())
    assert "link" not in "\n".join(shown(single, efficiency=None))
