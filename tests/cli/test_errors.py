"""Everything that a user can get wrong: one line on standard error, exit 1, no traceback."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from moepack.errors import MoepackError, PlanError
from moepack.formats import PackedModel
from moepack.hardware import load_hardware
from moepack.roofline import derive_compute
from tests.cli.conftest import Moepack, Outcome

PLAN = ("--vram", "4M", "--context", "256")


def assert_named(outcome: Outcome, name: str, *words: str) -> None:
    """One line ``name: message`` holding ``words``, and nothing on standard output."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"{name}: "), outcome.err
    for word in words:
        assert word in last
    assert "Traceback" not in outcome.err


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that this process may not look into."""
    # Of our own: pytest's are closed to other users, and root may look anywhere.
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        folder.chmod(0)
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o700)
        folder.rmdir()


def test_a_folder_that_is_not_there(home: Path, moepack: Moepack) -> None:
    assert_named(moepack("inspect", "/no/such/folder"), "ModelNotFoundError", "/no/such/folder")


def test_a_folder_without_a_model(home: Path, moepack: Moepack, tmp_path: Path) -> None:
    assert_named(moepack("inspect", tmp_path), "ModelNotFoundError", "config.json")


@pytest.mark.parametrize("command", [("inspect",), ("pack",), ("run", "abc", "--model")])
@pytest.mark.parametrize("name", ["a" * 300, "./" + "a" * 300, "~nouser/model"])
def test_a_name_that_no_folder_can_have(
    home: Path, moepack: Moepack, command: tuple[str, ...], name: str
) -> None:
    assert_named(moepack(*command, name), "ModelNotFoundError", name)


@pytest.mark.parametrize("option", ["--hardware", "--routing"])
def test_a_profile_whose_name_no_file_can_have(
    measured: Path, model: Path, moepack: Moepack, option: str
) -> None:
    outcome = moepack("plan", model, *PLAN, option, "a" * 300)
    assert_named(outcome, "PresetNotFoundError", "a" * 300)


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_model_that_may_not_be_looked_at(
    moepack: Moepack, closed: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEPACK_HOME", "/no/such/folder")  # that of a test is closed as well
    place = closed / inside
    for command in (("inspect",), ("run", "abc", "--model")):
        assert_named(moepack(*command, place), "CheckpointError", str(place), "permissions")


def test_a_workspace_of_a_user_who_does_not_exist(
    moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEPACK_HOME", "~nouser/moepack")
    assert_named(moepack("inspect"), "WorkspaceError", "~nouser/moepack", "MOEPACK_HOME")


def test_folders_that_link_to_each_other(
    measured: Path, model: Path, moepack: Moepack, tmp_path: Path
) -> None:
    assert moepack("plan", model, *PLAN).code == 0
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for arguments in (("verify", loop), ("pack", "--out", loop)):
        outcome = moepack(*arguments)
        assert outcome.code == 1
        assert str(loop) in outcome.err.splitlines()[-1]


def test_a_hub_that_does_not_answer(home: Path, moepack: Moepack) -> None:
    # The tests run with the hub's client offline.
    assert_named(moepack("plan", "some/model", *PLAN), "HubUnreachableError", "some/model")


def test_a_dense_model(home: Path, model: Path, moepack: Moepack, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(model, dense)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64}
    (dense / "config.json").write_text(json.dumps(config))
    assert_named(moepack("inspect", dense), "NotMixtureOfExpertsError")


def test_a_machine_that_was_not_measured(home: Path, model: Path, moepack: Moepack) -> None:
    outcome = moepack("plan", model, *PLAN)
    assert_named(outcome, "WorkspaceError", "moepack profile --hardware-only")


def test_a_preset_that_does_not_exist(home: Path, model: Path, moepack: Moepack) -> None:
    outcome = moepack("plan", model, *PLAN, "--hardware", "rtx-409")
    assert_named(outcome, "PresetNotFoundError", "rtx-4090")


def test_a_budget_that_is_too_small(measured: Path, model: Path, moepack: Moepack) -> None:
    outcome = moepack("plan", model, "--vram", "100K")
    assert_named(outcome, "BudgetTooSmallError", "bytes) are missing", "--vram")


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_a_plan_that_cannot_be_written_is_not_made(
    measured: Path,
    model: Path,
    moepack: Moepack,
    tmp_path: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moepack.cli.plan.find_answer", None)
    for place in (tmp_path, ""):
        assert_named(moepack("plan", model, *PLAN, option, place), "OutputError", "Is a directory")


def test_a_model_without_a_plan(measured: Path, model: Path, moepack: Moepack) -> None:
    assert_named(moepack("pack", model), "WorkspaceError", "moepack plan")


def test_a_model_that_was_not_packed(measured: Path, model: Path, moepack: Moepack) -> None:
    assert moepack("plan", model, *PLAN).code == 0
    assert_named(moepack("run", "abc"), "WorkspaceError", "moepack pack")


def test_a_hub_model_that_was_never_here(home: Path, moepack: Moepack) -> None:
    assert_named(moepack("run", "abc", "--model", "some/model"), "WorkspaceError", "some/model")


def test_a_disk_without_room(
    measured: Path, model: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert moepack("plan", model, *PLAN).code == 0
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert_named(moepack("pack"), "DiskFullError", "1000 B")


def test_a_place_that_cannot_be_written(measured: Path, model: Path, moepack: Moepack) -> None:
    assert moepack("plan", model, *PLAN).code == 0
    outcome = moepack("pack", "--out", "/proc/moepack")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].split(": ")[0] in {"OutputError", "ReadOnlyError"}


@pytest.mark.parametrize(
    "garbage", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}']
)
def test_a_generation_config_that_is_none(
    packed: Path, model: Path, moepack: Moepack, tmp_path: Path, garbage: str
) -> None:
    path = packed / "generation_config.json"
    path.write_text(garbage.ljust(path.stat().st_size))  # opening a pack compares sizes
    assert_named(moepack("run", "abc"), "PackError", str(path), "expected", "pack again")
    # Found in the source, before hours of packing.
    source = Path(shutil.copytree(model, tmp_path / "source"))
    (source / "generation_config.json").write_text(garbage)
    refused = moepack("inspect", source)
    assert_named(refused, "DamagedCheckpointError", "generation_config.json", "expected")


def test_compute_that_was_measured_on_another_device(
    packed: Path, moepack: Moepack, home: Path
) -> None:
    machine = load_hardware(home / "hardware.yaml")
    assert machine.device == "cpu"
    spec = PackedModel.open(packed).spec
    compute = dataclasses.replace(derive_compute(spec, machine), source="measured", device="cuda")
    (folder,) = home.glob("models/*")
    compute.save(folder / "compute.yaml")
    assert_named(moepack("plan", *PLAN), "ProfileError", "cuda", "cpu", "moepack profile")
    dataclasses.replace(compute, device="cpu").save(folder / "compute.yaml")
    assert moepack("plan", *PLAN).code == 0


def test_a_shard_that_was_damaged(packed: Path, moepack: Moepack) -> None:
    for shard in packed.glob("experts/*.safetensors"):
        data = bytearray(shard.read_bytes())
        for page in range(8192, len(data), 4096):
            data[page] ^= 1
        shard.write_bytes(data)
    outcome = moepack("run", "abc", "--max-new-tokens", "30")
    assert_named(outcome, "DamagedSegmentError", "layer ", "expert ")
    verified = moepack("verify", "--json")
    assert verified.code == 1
    assert len(verified.document["damages"]) >= len(list(packed.glob("experts/*")))
    assert verified.err.splitlines()[-1].startswith("DamagedSegmentError: ")


def test_a_prompt_beyond_the_context(packed: Path, moepack: Moepack) -> None:
    assert_named(moepack("run", "x" * 300), "ContextLengthError", "300", "256")
    outcome = moepack("run", "abc", "--max-new-tokens", "300")
    assert_named(outcome, "ContextLengthError", "256")


def test_a_prompt_without_tokens(packed: Path, moepack: Moepack) -> None:
    assert_named(moepack("run", ""), "ContextLengthError", "no tokens")


def test_a_plan_that_needs_other_segments(packed: Path, moepack: Moepack, home: Path) -> None:
    (path,) = home.glob("models/*/plan.json")
    plan = json.loads(path.read_text())
    for layer in plan["layout"]["layers"]:
        layer["split"] = 0 if layer["split"] else layer["width"]
    path.write_text(json.dumps(plan))
    assert_named(moepack("run", "abc"), "PlanMismatchError", "layers 0, 1, 2", "pack")
    # A folder that is named has its own plan.
    assert moepack("run", "abc", "--model", packed, "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize("command", [("run", "abc"), ("bench",)])
def test_a_plan_for_an_engine_that_is_not_here(
    packed: Path, moepack: Moepack, home: Path, command: tuple[str, ...]
) -> None:
    (path,) = home.glob("models/*/plan.json")
    plan = json.loads(path.read_text())
    path.write_text(json.dumps(plan | {"assumed_engine": True}))
    assert_named(moepack(*command), "CapabilityError", "plan again without --assume-engine")


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"version": 1}'])
def test_garbage_for_a_plan(packed: Path, moepack: Moepack, home: Path, garbage: bytes) -> None:
    (plan,) = home.glob("models/*/plan.json")
    plan.write_bytes(garbage)
    assert_named(moepack("run", "abc"), "PlanError", str(plan))


@pytest.mark.parametrize("garbage", [b"", b"a: [", b"\xff\xfe\x00", b"- 1", b"version: 1"])
@pytest.mark.parametrize("file", ["hardware.yaml", "routing.yaml", "compute.yaml"])
def test_garbage_for_a_profile(
    packed: Path, moepack: Moepack, home: Path, file: str, garbage: bytes
) -> None:
    folder = home if file == "hardware.yaml" else next(home.glob("models/*"))
    (folder / file).write_bytes(garbage)
    (folder / "routing.npz").write_bytes(b"")
    assert_named(moepack("plan", *PLAN), "ProfileError", str(folder / file))


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"key": 1}', b'{"key": "../.."}', b'{"key": ""}'])
def test_garbage_for_the_current_model(
    packed: Path, moepack: Moepack, home: Path, garbage: bytes
) -> None:
    (home / "current").write_bytes(garbage)
    assert_named(moepack("run", "abc"), "WorkspaceError")


def test_texts_that_cannot_be_read(home: Path, moepack: Moepack, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert_named(moepack("profile", "--text", binary), "TextError", "UTF-8")
    assert_named(moepack("profile", "--text", tmp_path / "none"), "TextError", "none")
    (tmp_path / "empty").touch()
    assert_named(moepack("profile", "--text", tmp_path / "empty"), "TextError", "is empty")


def test_a_damaged_pack_can_be_packed_again(packed: Path, moepack: Moepack, tmp_path: Path) -> None:
    manifest = packed / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    assert_named(moepack("run", "abc"), "DamagedSegmentError", "pack again")
    elsewhere = moepack("pack", "--out", tmp_path / "elsewhere")
    assert elsewhere.code == 0, elsewhere.err
    assert "nothing is reused" in elsewhere.err
    assert moepack("pack").code == 0
    assert moepack("verify").code == 0


def test_a_prompt_that_is_not_text(
    packed: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    for prompt in ("-", "\udcff"):
        outcome = moepack("run", prompt)
        assert outcome.code == 2
        assert "not UTF-8" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "--vram", "lots"),
        ("plan", "--vram", "9" * 400),
        ("plan", "--vram", "1G", "--link", "9" * 400),
        ("plan", "--vram", "1G", "--link", "fast"),
        ("plan", "--vram", "1G", "--link", "1G,5"),
        ("plan", "--vram", "1G", "--context", "0"),
        ("run",),
        ("run", "abc", "--check", "sometimes"),
        ("run", "abc", "--top-p", "2"),
        ("run", "abc", "--temperature", "-1"),
        ("run", "abc", "--temperature", "nan"),
        ("run", "abc", "--seed", "9223372036854775808"),
        ("bench", "--new", "1"),
        ("profile", "--device", "tpu"),
        ("unpack",),
        ("--no-such-option",),
    ],
)
def test_wrong_usage_is_told_and_exits_2(
    home: Path, moepack: Moepack, arguments: tuple[str, ...]
) -> None:
    outcome = moepack(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err


def test_messages_of_several_lines_become_one(
    home: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PlanError("first line\nsecond line")

    monkeypatch.setattr("moepack.cli.inspect.open_source", fail)
    assert moepack("inspect").err == "PlanError: first line second line\n"


def test_debugging_shows_where_an_error_came_from(
    home: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MoepackError):
        moepack("--debug", "inspect", "/no/such/folder")
    # One command line does not change the next.
    assert moepack("inspect", "/no/such/folder").code == 1
    monkeypatch.setenv("MOEPACK_DEBUG", "1")
    with pytest.raises(MoepackError):
        moepack("inspect", "/no/such/folder")


def test_an_interrupt_exits_130(
    home: Path, moepack: Moepack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moepack.cli.inspect.open_source", interrupt)
    assert moepack("inspect", "/no/such/folder") == Outcome(130, "", "interrupted\n")
