"""What this process takes of the host's memory."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes() -> int:
    """RAM that this process occupies now, shared libraries included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
