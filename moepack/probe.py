"""Measuring this machine: what it has, how fast it moves bytes, how fast it multiplies.

What is run is what the runtime runs: the same memory, the same direct reads, the same torch
operations. Other work on the machine shows in the spreads. Links are in :mod:`moepack.probe_link`,
everything that torch does in :mod:`moepack.probe_torch`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import moepack
from moepack import machine
from moepack.agreement import figures
from moepack.errors import DeviceError, ProfileError
from moepack.hardware import HARDWARE_VERSION, HardwareProfile
from moepack.plan import DeviceKind
from moepack.probe_link import BusProbe, DiskProbe, open_disk
from moepack.probe_torch import TorchProbe
from moepack.progress import NO_PROGRESS, Progress
from moepack.timing import rounded

if TYPE_CHECKING:
    import torch

# Every figure is taken once in each round. Rounds are some seconds apart, and the spread over them
# is what is stated: repeats within a second agree far better than two profiles ever do.
ROUNDS = 5

# The disk has several rounds in each, for as long as it takes no longer than this in all.
_DISK_ROUNDS = 3
_DISK_S = 10.0

# An idle machine stays below this.
_BUSY_SPREAD = 1.0

_HOW = f"medians of {ROUNDS} rounds some seconds apart, of repeats in each"

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
    from moepack_runtime.device import prepare_device

    kind = _choose_device(device)
    place = torch.device(kind)
    cuda = kind == "cuda"
    base_bytes = _process_base_bytes()
    with open_disk(scratch, progress) as disk:
        bus = None
        if cuda:
            prepare_device(place)
            bus = BusProbe(place)
        probe = TorchProbe(place)
        progress.start("measure the machine", ROUNDS * (_DISK_ROUNDS + 1), "items")
        try:
            _run_rounds(disk, bus, probe, progress)
        finally:
            progress.done()
        disk_curve = disk.curve()
    device_name = torch.cuda.get_device_name(place) if cuda else machine.cpu_name()
    launch = probe.launch()
    profile = HardwareProfile(
        version=HARDWARE_VERSION,
        name=name or f"{device_name}, {machine.core_count()} cores",
        source="measured",
        how=_HOW,
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
        disk=disk_curve,
        bus=bus.curve() if bus else None,
        memory=probe.memory(),
        launch_s=launch.median_s,
        launch_spread=rounded(launch.spread),
        matmul=probe.matmul(),
        attention=probe.attention(),
    )
    if max(figure.spread for figure in figures(profile)) > _BUSY_SPREAD:
        busy = f"{_HOW}; the machine was busy or unsteady: close what else runs and measure again"
        profile = dataclasses.replace(profile, how=busy)
    return profile


def _run_rounds(
    disk: DiskProbe, bus: BusProbe | None, probe: TorchProbe, progress: Progress
) -> None:
    disk_s = 0.0
    for _ in range(ROUNDS):
        for number in range(_DISK_ROUNDS):
            if number == 0 or disk_s < _DISK_S:
                begin_s = perf_counter()
                disk.round()
                disk_s += perf_counter() - begin_s
            progress.advance(1)
        if bus is not None:
            bus.round()
        probe.round()
        progress.advance(1)


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
