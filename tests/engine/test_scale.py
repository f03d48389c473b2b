"""The benchmark of growth: its cases run, and its verdict is about factors."""

from __future__ import annotations

from pathlib import Path

from benchmarks import scale
from benchmarks.scale import Case, Line, growths, prepare, run_case


def test_a_case_is_written_packed_and_run(tmp_path: Path) -> None:
    ready = prepare(Case(2, 8, 48), 8, None, tmp_path)
    found = run_case(ready.folder)
    expert_bytes = 3 * 256 * scale.EXPERT_WIDTH * scale.ELEMENT_BYTES
    assert ready.read_bytes > 2 * scale.TOP_K * expert_bytes
    assert found["tpot_s"] > 0
    # Of eight experts two are cached; at most all that a token uses and all that is guessed come.
    assert 0 < found["link_bytes"] <= 2 * 2 * scale.TOP_K * expert_bytes
    assert found["grown_bytes"] > 0


def test_growth_is_judged_by_its_own_bytes() -> None:
    def line(case: Case, factor: float, tpot_s: float) -> Line:
        sizes = (round(1000 * factor), round(2000 * factor), round(4000 * factor))
        return Line(case, tpot_s, *sizes, grown_bytes=round(5000 * factor))

    lines = {case: line(case, 1.0, 0.01) for axis in scale.AXES.values() for case in axis}
    twice = scale.AXES["layers"][1]
    lines[twice] = line(twice, 2.0, 0.02)
    assert all(step.holds(0.01) for step in growths(lines))
    slow = scale.AXES["context"][2]
    lines[slow] = line(slow, 1.0, 0.02)
    assert [step.large for step in growths(lines) if not step.holds(0.5)] == [slow]
