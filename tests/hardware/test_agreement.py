"""Two profiles of one machine agree within the spreads that they state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from time import process_time

import pytest

from moepack import probe, probe_link, timing
from moepack.agreement import LEAST_ALLOWANCE, Comparison, compare_profiles
from moepack.hardware import HardwareProfile, find_hardware
from moepack.rates import MemoryRate
from moepack.units import MIB

PRESET = find_hardware("cpu-sata")


def with_memory(bytes_per_s: float, spread: float) -> HardwareProfile:
    return dataclasses.replace(PRESET, memory=MemoryRate(bytes_per_s, spread))


def memory(first: HardwareProfile, second: HardwareProfile) -> Comparison:
    (found,) = (each for each in compare_profiles(first, second) if each.name == "memory")
    return found


@pytest.mark.parametrize(
    ("ratio", "spreads", "agrees"),
    [
        (1.19, (0.1, 0.1), True),  # each may be off by its spread
        (1.22, (0.1, 0.1), False),
        (1 / 1.19, (0.1, 0.1), True),
        (1 / 1.22, (0.1, 0.1), False),
        (1.09, (0.1, 0.0), True),
        (1.11, (0.0, 0.1), False),
        (1 + LEAST_ALLOWANCE, (0.0, 0.0), True),
        (1.06, (0.0, 0.0), False),
    ],
)
def test_two_figures_agree_within_their_spreads(
    ratio: float, spreads: tuple[float, float], agrees: bool
) -> None:
    found = memory(with_memory(1e10, spreads[0]), with_memory(ratio * 1e10, spreads[1]))
    assert found.agrees == agrees
    assert found.ratio == pytest.approx(ratio)


def test_every_figure_of_both_profiles_is_compared() -> None:
    compared = compare_profiles(PRESET, PRESET)
    points = len(PRESET.disk.points) + sum(len(curve.points) for curve in PRESET.matmul)
    assert len(compared) == points + 2  # memory, launch
    assert len({found.name for found in compared}) == len(compared)
    assert all(found.agrees and found.ratio == 1.0 for found in compared)
    shorter = dataclasses.replace(PRESET, matmul=PRESET.matmul[:1])
    assert len(compare_profiles(shorter, PRESET)) < len(compared)


def share_agreeing(comparisons: Sequence[Comparison], factor: float = 1.0) -> float:
    """As if the second machine were so many times as fast.

    Of figures on one thread: others may be a hundred times off where a core has other work.
    """
    steady = [found for found in comparisons if "threads" not in found.name]
    steady += [found for found in comparisons if "on 1 threads" in found.name]
    scaled = [found._replace(ratio=found.ratio * factor) for found in steady]
    return sum(found.agrees for found in scaled) / len(scaled)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_second_profile_of_this_machine_agrees_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every figure every time: other work here may begin, or end, between the two.

    What it takes of the cores is left out: torch is timed by the processor's time for this process.
    What it does to caches, memory and disk is not.
    """
    monkeypatch.setattr(timing, "perf_counter", process_time)
    monkeypatch.setattr(probe, "ROUNDS", 3)
    monkeypatch.setattr(probe_link, "SCRATCH_BYTES", 256 * MIB)
    shares = []
    first = probe.probe_hardware(tmp_path, device="cpu")
    for _ in range(3):
        second = probe.probe_hardware(tmp_path, device="cpu")
        comparisons = compare_profiles(first, second)
        shares.append((share_agreeing(comparisons), share_agreeing(comparisons, factor=3.0)))
        if shares[-1][0] >= 0.7:
            break
        first = second
    same, other = shares[-1]
    assert same >= 0.7, shares
    assert other < 0.5, "a machine three times as fast would not be told apart"
