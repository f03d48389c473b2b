"""Put what moepack replay --paper prints into docs/paper.md.

    python scripts/print_paper.py RECORDING

RECORDING is trace_qwen.npz, for the last table. The sentences around the tables quote figures:
read them again afterwards.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "paper.md"


def main() -> None:
    """Replace both blocks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", type=Path)
    recording = parser.parse_args().recording
    everything = printed()
    # The last table but for what is said of all of them.
    recorded = printed("--recording", str(recording)).split("\n\n")[-2]
    blocks = iter((everything, recorded))
    page = re.sub(
        r"```text\n.*?```",
        lambda _: f"```text\n{next(blocks)}\n```",
        PAGE.read_text("utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, "utf-8")


def printed(*options: str) -> str:
    """What the command says on standard output."""
    command = [sys.executable, "-m", "moepack", "replay", "--paper", *options]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip("\n")


if __name__ == "__main__":
    main()
