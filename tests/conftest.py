"""Fixtures that every area of the tests shares."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Whether an example passes must not depend on what else the machine does; pytest-timeout ends
# what hangs.
hypothesis.settings.register_profile("moepack", deadline=None)
hypothesis.settings.load_profile("moepack")

# Before anything imports the client: no test may reach beyond this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Small models gain nothing from a second thread, and barriers stall on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TinyFolder = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """An engine sets the threads of the process; no test inherits another's."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard here and in children, though a shell put the tests into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """The folder of one of ``tests.support.tiny_models.TINY_MODELS``, saved on first use."""
    from tests.support.tiny_models import tiny_model

    saved: dict[tuple[str, str], Path] = {}

    def folder(family: str, variant: str) -> Path:
        key = family, variant
        if key not in saved:
            saved[key] = tiny_model(family, variant, tmp_path_factory.mktemp("tiny"))
        return saved[key]

    return folder
