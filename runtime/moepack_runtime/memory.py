"""What this process takes of the host's memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moepack.errors import OutOfMemoryError
from moepack.units import KIB, format_size

_log = logging.getLogger(__name__)

# What torch says where it has no exception of its own: of RAM, of a CUDA call, of a handle.
_REFUSALS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def resident_bytes() -> int:
    """RAM that this process occupies now, shared libraries included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int | None:
    """The most RAM that this process has occupied; None where the kernel does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return None


def forget_peak_resident() -> None:
    """Let the peak begin anew with what is occupied now, where the kernel allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as failure:
        _log.info("the peak of memory counts from the start of the process (%s)", failure)


@contextmanager
def refusals_named(device: torch.device, needed_bytes: int) -> Iterator[None]:
    """Raise torch's refusals of memory as ours.

    Parameters
    ----------
    needed_bytes
        What the plan takes of the device in all.

    Raises
    ------
    OutOfMemoryError
        When torch gets no memory inside the block.
    """
    try:
        yield
    except RuntimeError as failure:  # torch.OutOfMemoryError is one
        text = str(failure)
        if not isinstance(failure, torch.OutOfMemoryError) and not any(
            refusal in text for refusal in _REFUSALS
        ):
            raise
        option = "--ram" if device.type == "cpu" else "--vram"
        raise OutOfMemoryError(
            f"{device} does not give the {format_size(needed_bytes)} that the plan takes "
            f"({text.splitlines()[0]}); close what else uses it, or plan with a smaller {option}"
        ) from None
