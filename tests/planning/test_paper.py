"""The paper's settings are as published, and docs/paper.md says what the command prints."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moepack.errors import ProfileError
from moepack.optimised import Optimised
from moepack.paper.figures import TABLES, paper_tables
from moepack.paper.rebuilt import Rebuilt
from moepack.paper.settings import ASSUMPTIONS, PaperSetting, mixtral, qwen
from moepack.paper.table import PaperTable
from moepack.paper.trial import RECALL, TRIAL_MS, read_recording, trial_table
from moepack.placements import free_bytes
from moepack.report.paper import paper_view
from moepack.units import GIB
from tests.support.recordings import recordings_folder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "paper.md"
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


@pytest.mark.parametrize(
    ("setting", "transfers", "loading_s", "compute_s"),
    [(qwen(), 24 * 4, 0.165, 0.057), (mixtral(), 32 * 2, 0.248, 0.060)],
)
def test_a_token_takes_what_the_paper_says(
    setting: PaperSetting, transfers: int, loading_s: float, compute_s: float
) -> None:
    assert transfers * setting.link(setting.expert_bytes) == pytest.approx(loading_s)
    resident = Rebuilt(setting).even(1.0, setting.spec.moe(0).num_experts, depth=0)
    assert Rebuilt(setting).replay(resident).tpot_s == pytest.approx(compute_s)


def test_the_model_is_as_large_as_published() -> None:
    spec = qwen().spec
    assert (spec.trunk_bytes + spec.experts_bytes) / GIB == pytest.approx(26.67, rel=1e-3)
    assert 2 * mixtral().spec.total_parameters == pytest.approx(2 * 46.7e9, rel=1e-3)


def test_moepics_split_at_ten_experts_a_layer_is_near_the_published_best() -> None:
    """0.4: where the bottoms of the expected hits fill the window of T_moe + T_attn."""
    setting = qwen()
    rebuilt = Rebuilt(setting)
    whole = rebuilt.even(1.0, 10, depth=4).layout
    budget_bytes = 240 * setting.expert_bytes - free_bytes(rebuilt.request, whole, 8)
    request = replace(rebuilt.request, fast_budget_bytes=budget_bytes)
    made = Optimised(request, rebuilt.tables, setting.link).moepic(request)
    assert made is not None
    ratios = [cut.split_ratio for cut in made.layout.layers]
    assert 0.3 < min(ratios) < np.mean(ratios) < max(ratios) < 0.45
    assert np.mean(ratios) == pytest.approx(0.38, abs=0.02)


def printed(tables: list[PaperTable], assumptions: tuple[str, ...] = ()) -> str:
    """What the command writes to a file."""
    console = Console(file=io.StringIO(), width=160, highlight=False)
    with console.capture() as captured:
        console.print(paper_view(tables, assumptions))
    return captured.get()


def check(documented: str, tables: list[PaperTable], assumptions: tuple[str, ...] = ()) -> None:
    """Equal words; times and sizes within 3 %, shares within 3 points."""
    theirs = [line.rstrip() for line in documented.split("\n")]
    ours = [line.rstrip() for line in printed(tables, assumptions).strip("\n").split("\n")]
    for line, expected in zip(theirs, ours, strict=True):
        assert NUMBER.sub("#", line).split() == NUMBER.sub("#", expected).split()
    # Behind a title and a head.
    place = 0
    for table in tables:
        for row, line in zip(table.rows, theirs[place + 2 :], strict=False):
            shown = iter(float(number) for number in NUMBER.findall(line.removeprefix(row.name)))
            for column, value in zip(table.columns, row.values, strict=True):
                if value is None:
                    continue
                scale = {"ms": 1e3, "s": 1.0, "%": 100.0, "GiB": 1 / GIB}[column.unit]
                points = 3.0 if column.unit == "%" else 0.01
                found = pytest.approx(value * scale, rel=0.03, abs=points)
                assert next(shown) == found, (table.title, row.name, column)
        place += 3 + len(table.rows) + len(table.notes)


def blocks() -> list[str]:
    """What docs/paper.md shows as printed."""
    return [
        block.strip("\n")
        for block in re.findall(r"```text\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_document_shows_what_the_command_prints() -> None:
    tables = list(paper_tables())
    assert len(tables) == TABLES
    check(blocks()[0], tables, ASSUMPTIONS)


def test_the_documents_recorded_table_is_what_the_recording_gives() -> None:
    path = recordings_folder() / "trace_qwen.npz"
    table = trial_table(path)
    check(blocks()[1], [table])
    for place, trial in enumerate(TRIAL_MS.values()):
        ours = [1e3 * value for value in table.rows[2 * place].values if value is not None]
        assert ours == pytest.approx(trial, rel=0.1), "an independent replay, within a tenth"


def test_a_recording_gets_predictions_of_which_the_stated_share_is_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200, 24, 60)), axis=2)[:, :, :4].astype(np.uint8)
    np.savez(tmp_path / "trace.npz", prose=ids)
    trace = read_recording(tmp_path / "trace.npz", qwen().spec).trace
    named = trace.predicted[1:, :, :4]
    right = (named[:, :, :, None] == trace.ids[1:, :, None, :]).any(axis=3)
    assert right.mean() == pytest.approx(RECALL, abs=0.01)
    assert right[:, :, 0].mean() == pytest.approx(RECALL, abs=0.02), "in no order"
    ordered = np.sort(named, axis=2)
    assert (ordered[:, :, 1:] > ordered[:, :, :-1]).all()


def test_what_is_no_recording_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ProfileError, match="not a recorded trace"):
        read_recording(path, qwen().spec)
    np.savez(path, prose=np.zeros((9, 24, 8), dtype=np.uint8))
    with pytest.raises(ProfileError, match=r"expected \[tokens, 24, 4\] of 60 experts"):
        read_recording(path, qwen().spec)
