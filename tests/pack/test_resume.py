"""Packing that is cut short leaves nothing visible, and ends with the same bytes when repeated."""

from __future__ import annotations

import dataclasses
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from moepack.errors import OutputError, OutputInUseError
from moepack.pack import pack
from moepack.plan import Plan
from moepack.segments import Bits
from tests.pack.fake_models import FakeSource, contents, make_plan, make_spec

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["fresh", "again", "relayout", "replace"])
def test_killed_at_every_point_it_resumes_to_the_same_bytes(tmp_path: Path, scenario: str) -> None:
    command = [sys.executable, "-m", "tests.pack.kill_everywhere", str(tmp_path), scenario]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 60, "there are fewer points than files"


class InterruptedSource(FakeSource):
    """Ctrl-C while the given expert is read."""

    stop_at: tuple[int, int] | None = None

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        if (layer, expert) == self.stop_at:
            raise KeyboardInterrupt
        return super().expert(layer, expert)

    def trunk_tensor(self, name: str) -> Bits:
        if self.stop_at is None:
            raise KeyboardInterrupt
        return super().trunk_tensor(name)


def interrupt(out: Path, source: FakeSource, plan: Plan, stop_at: tuple[int, int] | None) -> None:
    interrupted = InterruptedSource(source.spec, source.seed)
    interrupted.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        pack(interrupted, plan, out)


def test_an_interrupted_pack_goes_on_with_the_layer_that_it_was_at(tmp_path: Path) -> None:
    spec = make_spec()
    source, plan = FakeSource(spec), make_plan(spec, [16, 32])
    out = tmp_path / "pack"
    interrupt(out, source, plan, (2, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pack.partial",
        "pack.partial.journal",
    ]
    report = pack(source, plan, out)
    assert {layer for layer, _ in source.asked} == {2}
    assert report.resumed_bytes + report.written_bytes == report.size_bytes
    assert 0 < report.resumed_bytes < report.size_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_interrupted_before_anything_is_finished_nothing_stays(tmp_path: Path) -> None:
    spec = make_spec()
    interrupt(tmp_path / "pack", FakeSource(spec), make_plan(spec, [16, 32]), None)
    assert not any(tmp_path.iterdir())


def test_what_was_finished_for_other_weights_is_not_used(tmp_path: Path) -> None:
    spec = make_spec()
    plan = make_plan(spec, [16, 32])
    interrupt(tmp_path / "pack", FakeSource(spec, seed=1), plan, (2, 1))
    report = pack(FakeSource(spec, seed=2), plan, tmp_path / "pack")
    assert report.resumed_bytes == 0
    pack(FakeSource(spec, seed=2), plan, tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")


def test_what_was_finished_for_another_cut_is_used_where_the_cut_is_equal(tmp_path: Path) -> None:
    spec = make_spec(moe_layers=3)
    source = FakeSource(spec)
    interrupt(tmp_path / "pack", source, make_plan(spec, [16, 32, 0]), (3, 0))
    plan = make_plan(spec, [16, 0, 0])
    pack(source, plan, tmp_path / "pack")
    assert {layer for layer, _ in source.asked} == {2, 3}
    pack(source, plan, tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["shorten", "header", "remove"])
def test_a_finished_file_that_has_changed_is_written_again(tmp_path: Path, damage: str) -> None:
    spec = make_spec()
    source, plan = FakeSource(spec), make_plan(spec, [16, 32])
    interrupt(tmp_path / "pack", source, plan, (2, 1))
    shard = tmp_path / "pack.partial/experts/layer-001.top.safetensors"
    data = shard.read_bytes()
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if damage == "shorten" else bytes(9) + data[9:])
    pack(source, plan, tmp_path / "pack")
    pack(source, plan, tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")


def test_a_second_packer_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    spec = make_spec()
    source, plan = FakeSource(spec), make_plan(spec, [16, 32])
    interrupt(tmp_path / "pack", source, plan, (2, 1))
    before = contents(tmp_path)
    with (tmp_path / "pack.partial.journal").open("a+b") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(OutputInUseError, match="another process is packing to it"):
            pack(source, plan, tmp_path / "pack")
    assert contents(tmp_path) == before


def test_a_partial_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    spec = make_spec()
    foreign = tmp_path / "pack.partial" / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("42")
    with pytest.raises(OutputError, match="not the rest of an interrupted pack"):
        pack(FakeSource(spec), make_plan(spec, [16, 32]), tmp_path / "pack")
    assert contents(tmp_path) == {"pack.partial/thesis.txt": b"42"}


def test_a_line_of_the_journal_does_not_outlive_its_files(tmp_path: Path) -> None:
    """A file of the right size and header is not taken for the one that was flushed."""
    spec = make_spec()
    source, plan = FakeSource(spec), make_plan(spec, [16, 32])
    interrupt(tmp_path / "pack", source, plan, (2, 1))
    shard = tmp_path / "pack.partial/experts/layer-001.top.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    interrupt(tmp_path / "pack", source, plan, (1, 0))
    shard.write_bytes(data[:4096].ljust(len(data), b"\0"))  # as a power cut may leave it
    pack(source, plan, tmp_path / "pack")
    pack(source, plan, tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")


def test_a_torn_journal_costs_a_unit_and_no_more(tmp_path: Path) -> None:
    spec = make_spec()
    source, plan = FakeSource(spec), make_plan(spec, [16, 32])
    interrupt(tmp_path / "pack", source, plan, (2, 1))
    journal = tmp_path / "pack.partial.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    pack(source, plan, tmp_path / "pack")
    assert {layer for layer, _ in source.asked} == {1, 2}
    pack(source, dataclasses.replace(plan), tmp_path / "straight")
    assert contents(tmp_path / "pack") == contents(tmp_path / "straight")
