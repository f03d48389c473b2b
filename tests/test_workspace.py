"""The workspace: what is current, what never becomes so, and two processes at once."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from pathlib import Path

import pytest

from moepack.atomic import require_writable, write_atomically, writing_atomically
from moepack.errors import OutputError, PlanMismatchError, WorkspaceError
from moepack.footprint import MemoryBreakdown
from moepack.forecast import PlannerReport, Prediction, Provenance
from moepack.layout import Layout
from moepack.plan import PLAN_VERSION, Placement, Plan, load_plan
from moepack.workspace import ModelRecord, Workspace

ONE = ModelRecord("one", "/models/one", "1" * 64, "a" * 64)
TWO = ModelRecord("two", "org/two", "2" * 64, "b" * 64)


def plan_of(model_digest: str, *, this_machine: bool = True) -> Plan:
    return Plan(
        version=PLAN_VERSION,
        model_name="one",
        model_digest=model_digest,
        max_context_tokens=8,
        layout=Layout(model_digest, ()),
        placement=Placement("cpu", 1, 1, 8, 4, 4, MemoryBreakdown(0, 0, 0, 0, 0, 0), ()),
        prediction=Prediction(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1, 1, 1.5),
        baselines={},
        provenance=Provenance("some machine", this_machine, "derived", "uniform"),
        planner=PlannerReport(0.0, "optimised", None, 0),
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "home")


def test_nothing_is_current_at_first(workspace: Workspace) -> None:
    assert workspace.current() is None
    assert not workspace.root.exists()  # looking leaves no trace


def test_what_was_made_current_stays_so(workspace: Workspace) -> None:
    for model in (ONE, TWO, ONE):
        workspace.make_current(workspace.remember(model))
        current = workspace.current()
        assert current is not None
        assert current.record == model


def test_a_model_keeps_its_folder_and_pack_when_it_moves(workspace: Workspace) -> None:
    before = workspace.remember(ONE).with_pack(workspace.root / "packed")
    after = workspace.remember(dataclasses.replace(ONE, name="uno", source="/elsewhere/one"))
    assert after.folder == before.folder
    assert after.pack_folder() == workspace.root / "packed"
    assert workspace.find_source("/elsewhere/one") == after
    assert workspace.find_source("/models/one") is None


def test_a_source_is_what_was_last_opened_under_it(workspace: Workspace) -> None:
    first = dataclasses.replace(TWO, weights_digest="b" * 64)
    second = dataclasses.replace(TWO, weights_digest="c" * 64)
    for number, revision in enumerate((first, second, first)):
        folder = workspace.remember(revision)
        # Their distance is that of people's steps, not of a test's.
        for path in workspace.root.glob("models/*/model.json"):
            if path.parent != folder.folder:
                os.utime(path, (number, number))
        assert workspace.find_source(TWO.source) == folder


def test_models_that_differ_in_weights_alone_do_not_share_a_folder(workspace: Workspace) -> None:
    retrained = dataclasses.replace(ONE, weights_digest="c" * 64)
    assert workspace.remember(ONE).folder != workspace.remember(retrained).folder


def test_a_plan_for_another_machine_or_model_never_becomes_current(workspace: Workspace) -> None:
    folder = workspace.remember(ONE)
    with pytest.raises(PlanMismatchError, match="not this machine"):
        folder.save_plan(plan_of(ONE.spec_digest, this_machine=False))
    with pytest.raises(PlanMismatchError, match="cannot become current for one"):
        folder.save_plan(plan_of(TWO.spec_digest))
    assert not folder.plan_path.exists()
    folder.save_plan(plan_of(ONE.spec_digest))
    assert load_plan(folder.plan_path) == plan_of(ONE.spec_digest)


def test_a_step_that_was_not_taken_is_named(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="one has not been packed; run moepack pack"):
        workspace.remember(ONE).pack_folder()


def test_a_current_model_whose_folder_is_gone_is_told(workspace: Workspace) -> None:
    folder = workspace.remember(ONE)
    workspace.make_current(folder)
    (folder.folder / "model.json").unlink()
    with pytest.raises(WorkspaceError, match="name a model"):
        workspace.current()


def test_a_folder_about_another_model_is_refused(workspace: Workspace) -> None:
    one, two = workspace.remember(ONE), workspace.remember(TWO)
    (one.folder / "model.json").write_bytes((two.folder / "model.json").read_bytes())
    with pytest.raises(WorkspaceError, match="profile the model again"):
        workspace.find(ONE.key)


def test_the_workspace_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("MOEPACK_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert Workspace.locate().root == tmp_path
    monkeypatch.delenv("MOEPACK_HOME")
    assert Workspace.locate().root == Path("/data/moepack")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert Workspace.locate().root == Path("/home/someone/.local/share/moepack")
    monkeypatch.setattr("sys.platform", "darwin")
    home = Path("/home/someone/Library/Application Support/moepack")
    assert Workspace.locate().root == home


def test_files_get_the_mode_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"one")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    write_atomically(tmp_path / "file", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"two"


def test_a_file_that_was_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")

    def interrupted() -> None:
        with writing_atomically(path) as out:
            out.write(b"two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"one"


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "file")
    assert not (tmp_path / "new" / "file").exists()
    for folder in (tmp_path, Path()):
        with pytest.raises(OutputError, match="Is a directory"):
            require_writable(folder)
        with pytest.raises(OutputError, match="Is a directory"):
            write_atomically(folder, b"one")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="expected a place that can be written"):
        require_writable(tmp_path / "file" / "below")


def test_readers_never_see_half_of_what_writers_write(workspace: Workspace) -> None:
    folders = [workspace.remember(model) for model in (ONE, TWO)]
    workspace.make_current(folders[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for folder in folders:
                workspace.make_current(folder)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            current = workspace.current()
            assert current is not None
            assert current.record in (ONE, TWO)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert sorted(path.name for path in workspace.root.iterdir()) == ["current", "models"]
