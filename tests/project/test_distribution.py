"""What is installed is what was written: sdist, wheel, and a clean environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


class Distribution(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """An sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return Distribution(next(out.glob("*.tar.gz")), next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def installed(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel, and sees the libraries of ours."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run(
        [*command, "--no-deps", "--no-index", "--no-compile", str(distribution.wheel)],
        check=True,
        capture_output=True,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    # Behind the environment's own folder, and without the links of an editable install.
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


def run(command: list[str | Path], home: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["MOEPACK_HOME"] = str(home)
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_both_packages_presets_and_model(distribution: Distribution) -> None:
    with zipfile.ZipFile(distribution.wheel) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    tool = {f"moepack/{name}" for name in files(ROOT / "moepack")}
    runtime = {f"moepack_runtime/{name}" for name in files(ROOT / "runtime" / "moepack_runtime")}
    presets = {f"moepack/profiles/{name}" for name in files(ROOT / "profiles")}
    assert found == tool | runtime | presets


def test_the_sdist_can_be_tested_and_built(distribution: Distribution) -> None:
    with tarfile.open(distribution.sdist) as sdist:
        found = {name.split("/", 1)[1] for name in sdist.getnames()}
    assert found >= {"LICENSE", "README.md", "Makefile", "constraints.txt", "pyproject.toml"}
    assert found >= {f"tests/{name}" for name in files(ROOT / "tests")}
    assert not any(name.startswith(".venv") for name in found)


def test_what_is_installed_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = "import moepack, moepack_runtime; print(moepack.__file__, moepack_runtime.__file__)"
    for path in run([installed / "python", "-c", code], tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)


def test_the_installed_command_plans_the_shipped_model(installed: Path, tmp_path: Path) -> None:
    assert "Usage: moepack" in run([installed / "moepack", "--help"], tmp_path)
    options = ["--vram", "16M", "--context", "1024", "--hardware", "cpu-nvme4", "--json"]
    plan = json.loads(run([installed / "moepack", "plan", "default", *options], tmp_path))
    assert plan["model"] == "default"
    assert plan["fast_used_bytes"] <= 16 * 2**20
