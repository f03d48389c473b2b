"""Packing streams: its memory is a few experts, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "hidden", "width"), [(20, 1024, 512), (6, 2048, 2048)], ids=["narrow", "wide"]
)
@pytest.mark.parametrize("encoding", ["BF16", "INT8", "INT4_G32"])
def test_peak_memory_is_three_experts(
    tmp_path: Path, experts: int, hidden: int, width: int, encoding: str
) -> None:
    """One from the source, one being written, one being digested; the rest is the allocator's.

    Rounding takes no more of them, and what it says for each thread.
    """
    sizes = [str(number) for number in (experts, hidden, width)]
    command = [sys.executable, "-m", "tests.pack.memory", str(tmp_path), *sizes, encoding]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout)
    rounding_bytes = 0 if encoding == "BF16" else figures["threads"] * (12 << 20)
    assert figures["model_bytes"] >= 12 * figures["expert_bytes"]
    most_bytes = 3.25 * figures["expert_bytes"] + rounding_bytes + (2 << 20)
    assert figures["pack_bytes"] < most_bytes, figures
    assert figures["verify_bytes"] < 4 * (4 << 20) + (2 << 20), figures
