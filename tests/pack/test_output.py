"""Places that cannot be written are named, and nothing is left in them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moepack.errors import DiskFullError, ReadOnlyError
from moepack.pack import disk_space, pack
from moepack.segments import Bits
from tests.pack.fake_models import FakeSource, make_plan, make_spec

ROOT = Path(__file__).parents[2]
NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount(folder: Path) -> bool:
    command = [*NAMESPACES, "mount", "-t", "tmpfs", "none", str(folder)]
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_disk_that_is_too_small_then_full_then_read_only(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting is not allowed here")
    command = [*NAMESPACES, sys.executable, "-m", "tests.pack.small_disk", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_shortfall_is_refused_first_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=17 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    spec = make_spec(hidden=128, width=256, experts=8)
    with pytest.raises(DiskFullError, match=r"packing needs 19\.\d+ MiB, 17\.00 MiB are free"):
        pack(FakeSource(spec), make_plan(spec, [64, 128]), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    spec = make_spec()
    source = FakeSource(spec)

    def full(_: int) -> None:
        if source.asked:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="the disk is full"):
        pack(source, make_plan(spec, [16, 32]), tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
    assert not (tmp_path / "pack.partial/experts/layer-001.top.safetensors").exists()


def test_a_folder_without_permission_to_write() -> None:
    # A folder of our own: pytest's are closed to other users, and root may write anywhere.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    spec = make_spec()
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(ReadOnlyError, match="choose a folder that can be written"):
            pack(FakeSource(spec), make_plan(spec, [16, 32]), folder / "pack")
    finally:
        if user == 0:
            os.seteuid(0)
        folder.chmod(0o755)
        assert not any(folder.iterdir())
        folder.rmdir()


def test_a_place_that_cannot_be_looked_at_has_no_known_room() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0)
    spec = make_spec()
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(ReadOnlyError, match="choose a folder that can be written"):
            disk_space(spec, make_plan(spec, [16, 32]), folder / "pack")
    finally:
        if user == 0:
            os.seteuid(0)
        folder.rmdir()


class MisshapenSource(FakeSource):
    def trunk_tensor(self, name: str) -> Bits:
        return super().trunk_tensor(name)[:-1]


def test_a_source_that_breaks_its_own_spec_is_our_bug(tmp_path: Path) -> None:
    spec = make_spec()
    with pytest.raises(AssertionError, match="expected TensorInfo"):
        pack(MisshapenSource(spec), make_plan(spec, [16, 32]), tmp_path / "pack")
    assert not any(tmp_path.iterdir())


class FailingSource(FakeSource):
    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        if expert == 1:
            raise ValueError("a bug in the source")
        return super().expert(layer, expert)


def test_an_error_of_the_source_passes_through_and_leaves_no_half_shard(tmp_path: Path) -> None:
    spec = make_spec()
    with pytest.raises(ValueError, match="a bug in the source"):
        pack(FailingSource(spec), make_plan(spec, [16, 32]), tmp_path / "pack")
    kept = [path.name for path in tmp_path.rglob("*.safetensors")]
    assert kept == ["trunk.safetensors"]
