"""A workspace of its own for each test, and the command line as a function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moepack.checkpoint import Checkpoint
from moepack.cli.app import main
from moepack.damage_probe import Measured, measure_damage
from moepack.factor_file import FactorFile
from moepack.presets import preset_path
from moepack.workspace import Workspace
from tests.conftest import TinyFolder

_WORDS = "red green blue one two three stone water kalt warm nah fern gross klein alt neu"


class Outcome(NamedTuple):
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


Moepack = Callable[..., Outcome]


@pytest.fixture
def moepack(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Moepack:
    """Run a command line in this process."""
    monkeypatch.delenv("MOEPACK_DEBUG", raising=False)

    def call(*arguments: str | Path) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MOEPACK_HOME", str(folder))
    return folder


@pytest.fixture
def measured(home: Path) -> Path:
    """A workspace whose machine has been measured: a preset stands in for the measurement."""
    home.mkdir()
    shutil.copy(preset_path("cpu-nvme4"), home / "hardware.yaml")
    return home


@pytest.fixture(scope="session")
def model(tiny_folder: TinyFolder) -> Path:
    """A small random Qwen3-MoE in float32, with a tokenizer of bytes."""
    return tiny_folder("qwen3_moe", "plain")


@pytest.fixture(scope="session")
def _packed_once(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose current model is planned, so that some experts do not fit, and packed."""
    home = tmp_path_factory.mktemp("packed") / "home"
    home.mkdir()
    shutil.copy(preset_path("cpu-nvme4"), home / "hardware.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPACK_HOME", str(home))
        assert main(["plan", str(model), "--vram", "4M", "--context", "256"]) == 0
        assert main(["pack"]) == 0
    return home


@pytest.fixture
def packed(_packed_once: Path, measured: Path) -> Path:
    """The packed folder of the current model, in a workspace that a test may change."""
    shutil.copytree(_packed_once, measured, dirs_exist_ok=True)
    (record,) = measured.glob("models/*/model.json")
    record.write_text(record.read_text().replace(str(_packed_once), str(measured)))
    return record.parent / "pack"


@pytest.fixture(scope="session")
def rounded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    """What rounding does to the model."""
    text = tmp_path_factory.mktemp("texts") / "text.txt"
    text.write_text(" ".join(f"{word} {number}" for number in range(5) for word in _WORDS.split()))
    with FactorFile.temporary() as factors:
        yield measure_damage(Checkpoint.open(model), device="cpu", texts=[text], factors=factors)


@pytest.fixture
def profiled(measured: Path, model: Path, moepack: Moepack, rounded: Measured) -> Path:
    """A workspace that knows what rounding does to the model, and has a plan."""
    budget = ("--vram", "4M", "--context", "256", "--prompt", "64", "--new", "64")
    assert moepack("plan", model, *budget).code == 0
    folder = Workspace.locate().current()
    assert folder is not None
    rounded.damage.save(folder.folder)
    rounded.calibration.save(folder.folder)
    return measured


@pytest.fixture
def measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's compute is measured at the ends of a curve, by one walk of each kind."""
    monkeypatch.setattr("moepack.compute_probe._LIMIT_S", 0.0)
    monkeypatch.setattr("moepack.compute_probe._ROUNDS", 1)
    monkeypatch.setattr("moepack.compute_probe.TOKENS", (1, 2, 512))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Texts in place of those that ship."""
    paths = []
    for name in ("one", "two", "three"):
        path = tmp_path / f"{name}.txt"
        path.write_text(f"This is text {name}, and it says the same again and again. " * 40)
        paths.append(path)
    for module in ("measuring", "cli.profile"):
        monkeypatch.setattr(f"moepack.{module}.shipped_texts", lambda: tuple(paths))
    return paths
