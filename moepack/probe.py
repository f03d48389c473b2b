"""Measuring this machine: what it has, how fast it moves bytes, how fast it multiplies.

What is run is what the runtime runs: the same memory, the same direct reads, the same torch
operations. Other work on the machine shows in the spreads. Links are in :mod:`moepack.probe_link`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import moepack
from moepack import machine
from moepack.errors import DeviceError, ProfileError
from moepack.hardware import HARDWARE_VERSION, HardwareProfile
from moepack.plan import DeviceKind
from moepack.probe_link import probe_bus, probe_disk
from moepack.progress import NO_PROGRESS, Progress
from moepack.rates import LinkCurve, MatmulCurve, MatmulPoint, MemoryRate
from moepack.timing import measure, rounded
from moepack.units import MIB

if TYPE_CHECKING:
    import torch

#: Numbers of tokens at which products are timed.
MATMUL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Rows and columns of the weights: about those of one matrix of an expert.
MATMUL_SHAPE = (2048, 2048)

# Weights are taken in turn from so much memory, so that no cache holds the next ones.
_WEIGHTS_BYTES = 384 * MIB

_MEMORY_BYTES = 512 * MIB
_LAUNCHES = 2000
_MATMUL_LIMIT_S = 0.3

# An idle machine stays below this.
_BUSY_SPREAD = 1.0

_BASE_PROGRAM = """
import torch, moepack_runtime.loading, moepack_runtime.tokenizer
from moepack_runtime.memory import resident_bytes
torch.nn.functional.linear(torch.ones(2, 64), torch.ones(64, 64))
print(resident_bytes())
"""


def probe_hardware(
    scratch: Path,
    *,
    progress: Progress = NO_PROGRESS,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    name: str | None = None,
) -> HardwareProfile:
    """Measure this machine. Takes about half a minute, and half a gigabyte of RAM and of disk.

    Parameters
    ----------
    scratch
        A folder on the disk that models are (or will be) on; made if there is none. The file that
        is written there has no name and vanishes with this process, however that ends.
    device
        What computes; auto: a GPU where there is one.
    name
        Of the profile; made from the device and the cores when None.

    Raises
    ------
    DeviceError
        When CUDA is asked for and there is none.
    DiskFullError, OutputError
        When the scratch file cannot be written.
    ProfileError
        When a process that loads the runtime cannot be started.
    """
    import torch

    kind = _choose_device(device)
    place = torch.device(kind)
    disk = probe_disk(scratch, progress)
    progress.start("measure memory and arithmetic", 3 + len(_dtypes()), "items")
    try:
        base_bytes = _process_base_bytes()
        progress.advance(1)
        memory = _probe_memory(place)
        progress.advance(1)
        launch_s = _probe_launch(place)
        progress.advance(1)
        matmul = []
        for dtype in _dtypes():
            matmul.append(_probe_matmul(place, dtype))
            progress.advance(1)
    finally:
        progress.done()
    cuda = kind == "cuda"
    device_name = torch.cuda.get_device_name(place) if cuda else machine.cpu_name()
    return HardwareProfile(
        version=HARDWARE_VERSION,
        name=name or f"{device_name}, {machine.core_count()} cores",
        source="measured",
        how=_how(disk, memory, matmul),
        measured_by=f"moepack {moepack.__version__}, torch {torch.__version__}",
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        device=kind,
        device_name=device_name,
        cpu_name=machine.cpu_name(),
        cores=machine.core_count(),
        ram_bytes=machine.ram_bytes(),
        vram_bytes=torch.cuda.mem_get_info(place)[1] if cuda else None,
        process_base_bytes=base_bytes,
        device_base_bytes=_device_base_bytes(place) if cuda else 0,
        disk=disk,
        bus=probe_bus(place) if cuda else None,
        memory=memory,
        launch_s=launch_s,
        matmul=tuple(matmul),
    )


def _how(disk: LinkCurve, memory: MemoryRate, matmul: Sequence[MatmulCurve]) -> str:
    spreads = [point.spread for point in disk.points]
    spreads += [memory.spread, *(point.spread for curve in matmul for point in curve.points)]
    how = "medians of repeats"
    if max(spreads) > _BUSY_SPREAD:
        how += "; the machine was busy or unsteady: close what else runs and measure again"
    return how


def _choose_device(device: Literal["auto", "cuda", "cpu"]) -> DeviceKind:
    import torch

    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise DeviceError("there is no CUDA device that torch can use; take --device cpu")
    if device == "auto":
        return "cuda" if present else "cpu"
    return device


def _process_base_bytes() -> int:
    """RAM of a process of its own that has loaded torch and the runtime, and no model."""
    done = subprocess.run(
        [sys.executable, "-c", _BASE_PROGRAM],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ProfileError(
            f"a process of its own could not load the runtime ({reason}); "
            "check the installation with moepack --version"
        )
    return int(done.stdout)


def _device_base_bytes(place: torch.device) -> int:
    """VRAM that is gone before a model is loaded: the driver's context, and other programs."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(place)
    return total_bytes - free_bytes - torch.cuda.memory_reserved(place)


def _synchronize(place: torch.device) -> Callable[[], None] | None:
    import torch

    return torch.cuda.synchronize if place.type == "cuda" else None


def _probe_memory(place: torch.device) -> MemoryRate:
    """Bandwidth of reading: a sum, which does next to nothing else."""
    import torch

    block = torch.ones(_MEMORY_BYTES // 4, dtype=torch.float32, device=place)
    timing = measure(block.sum, synchronize=_synchronize(place))
    return MemoryRate(rounded(block.nbytes / timing.median_s), rounded(timing.spread))


def _probe_launch(place: torch.device) -> float:
    """Cost of one operation on next to no data, from Python."""
    import torch

    small = torch.ones(16, device=place)

    def work() -> None:
        for _ in range(_LAUNCHES):
            torch.add(small, small)

    return rounded(measure(work, synchronize=_synchronize(place)).median_s / _LAUNCHES)


def _dtypes() -> tuple[Literal["BF16", "F32"], ...]:
    return ("BF16", "F32")


def _multiply(inputs: torch.Tensor, weights: Iterator[torch.Tensor], count: int) -> None:
    import torch

    for _ in range(count):
        torch.nn.functional.linear(inputs, next(weights))


def _probe_matmul(place: torch.device, dtype: Literal["BF16", "F32"]) -> MatmulCurve:
    """Products as the runtime makes them, each with weights that no cache holds."""
    import torch

    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    rows, columns = MATMUL_SHAPE
    count = _WEIGHTS_BYTES // (rows * columns * kind.itemsize)
    weights = cycle(torch.randn(count, rows, columns, dtype=kind, device=place).unbind())
    # A GPU is given several at a time, or the waiting for it would be what is timed.
    batch = 20 if place.type == "cuda" else 1
    points = []
    for tokens in MATMUL_TOKENS:
        inputs = torch.randn(tokens, columns, dtype=kind, device=place)
        timing = measure(
            partial(_multiply, inputs, weights, batch),
            repeats=200,
            limit_s=_MATMUL_LIMIT_S,
            synchronize=_synchronize(place),
        )
        rate = 2 * tokens * rows * columns * batch / timing.median_s
        points.append(MatmulPoint(tokens, rounded(rate), rounded(timing.spread)))
    return MatmulCurve(dtype, rows, columns, tuple(points))
