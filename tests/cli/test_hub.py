"""A model on the hub: its plan before its download, and the four commands after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.hub_server import serve


def test_fit_and_speed_are_known_before_the_download(
    measured: Path, model: Path, tmp_path: Path
) -> None:
    with serve() as hub:
        hub.repositories["org/tiny"] = model
        # The client reads its environment when it is imported, hence a process of its own.
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hub"),
        }

        def moepack(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-m", "moepack", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )

        plan = ("plan", "org/tiny", "--vram", "4M", "--context", "256")
        before = moepack(*plan)
        assert before.returncode == 0, before.stderr
        assert "its weights are not here" in before.stderr
        weights_bytes = (model / "model.safetensors").stat().st_size
        assert sum(hub.sent_bytes.values()) < weights_bytes // 4
        assert not (measured / "current").exists()

        unplanned = moepack("pack", "org/tiny")  # downloads, and finds that it has no plan
        assert unplanned.stderr.splitlines()[-1].startswith("WorkspaceError: org/tiny has no plan")
        for step in (plan, ("pack",), ("run", "abc", "--max-new-tokens", "3")):
            done = moepack(*step)
            assert done.returncode == 0, done.stderr
