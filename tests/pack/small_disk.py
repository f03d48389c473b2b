"""Packs onto a disk of its own that is too small, then full, then read-only.

Run by ``test_output.py`` as root of its own namespaces (``unshare --user --map-root-user --mount``)
with an empty folder to mount on. Everything here is a real refusal of the kernel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest

from moepack.errors import DiskFullError, ReadOnlyError
from moepack.pack import pack
from tests.pack.fake_models import FakeSource, contents, make_plan, make_spec

Usage = namedtuple("Usage", "total used free")


def mount(folder: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    subprocess.run(command, check=True)


def main(folder: Path) -> None:
    spec = make_spec(hidden=128, width=256, experts=8)
    source, plan = FakeSource(spec), make_plan(spec, [64, 128])
    out = folder / "pack"

    mount(folder, "size=3m")
    with pytest.raises(DiskFullError, match=r"packing needs 19\.\d+ MiB, 3\.00 MiB are free"):
        pack(source, plan, out)
    assert not any(folder.iterdir()), "refused before anything was written"

    # Free when asked, full when written to: somebody else was faster.
    roomy = mock.patch.object(shutil, "disk_usage", return_value=Usage(1 << 40, 0, 1 << 40))
    with roomy, pytest.raises(DiskFullError, match="pack again: what is finished is kept"):
        pack(source, plan, out)
    assert not out.exists()
    shards = {name for name in contents(folder) if name.endswith(".safetensors")}
    assert shards == {
        "pack.partial/trunk.safetensors",
        "pack.partial/experts/layer-001.top.safetensors",
        "pack.partial/experts/layer-001.bottom.safetensors",
    }, "the layer that was being written is gone"

    mount(folder, "remount", "ro")
    with pytest.raises(ReadOnlyError, match="Read-only file system"):
        pack(source, plan, out)

    mount(folder, "remount", "rw", "size=64m")
    report = pack(source, plan, out)
    assert report.resumed_bytes > 1 << 20
    pack(source, plan, folder / "straight")
    assert contents(out) == contents(folder / "straight")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
