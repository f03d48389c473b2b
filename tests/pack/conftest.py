"""A packed folder that a test may break: made once, copied for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moepack.pack import pack
from tests.pack.fake_models import FakeSource, make_plan, make_spec


@pytest.fixture(scope="session")
def _packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text('{"model": "fake"}')
    spec = make_spec(bias=True)
    pack(FakeSource(spec, auxiliary_files=(tokenizer,)), make_plan(spec, [16, 48]), folder / "pack")
    return folder / "pack"


@pytest.fixture
def packed(_packed_once: Path, tmp_path: Path) -> Path:
    """Layer 1 is cut at 16 of 48, layer 2 is all top; three experts with biases."""
    return Path(shutil.copytree(_packed_once, tmp_path / "pack"))
