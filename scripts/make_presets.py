"""Write the presets of profiles/hardware and profiles/links from the facts in preset_facts.py.

    python scripts/make_presets.py [FOLDER]      without one: profiles/ of this repository

Nobody edits those files. Links and disks take ``latency / readers + bytes / bandwidth`` a transfer;
matrix products follow the roofline that the presets state.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from preset_facts import (
    GPUS,
    LINKS,
    PROCESSORS,
    RECORDED_UTC,
    GpuFacts,
    LinkFacts,
    ProcessorFacts,
)

from moepack.hardware import HARDWARE_VERSION, HardwareProfile
from moepack.links import LINK_VERSION, LinkPreset
from moepack.rates import LinkCurve, LinkPoint, MatmulCurve, MatmulPoint, MemoryRate
from moepack.timing import rounded
from moepack.units import GIB, KIB, MIB

PROFILES = Path(__file__).resolve().parents[1] / "profiles"

#: Share of the memory's nominal bandwidth, and of the peak of products, that programs reach.
GPU_MEMORY_SHARE = 0.9
CPU_MEMORY_SHARE = 0.75
MATMUL_SHARE = 0.7

_TRANSFERS_KIB = (4, 16, 64, 256, 1024, 4096, 12288, 16384, 65536)
_MATMUL_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MATMUL_WIDTH = 2048
_HOW = "from data sheets and stated assumptions; nothing here was measured"
_MATMUL = (
    f"derived: seconds = max(weights / memory rate, flop / ({MATMUL_SHARE} * peak)) + launch cost, "
    f"for {_MATMUL_WIDTH} x {_MATMUL_WIDTH} weights; peaks"
)


def with_gpu(name: str, gpu: GpuFacts) -> HardwareProfile:
    """The preset of a machine with a graphics card."""
    host = gpu.host
    memory = MemoryRate(rounded(GPU_MEMORY_SHARE * gpu.memory_gb_per_s * 1e9), 0.0)
    peaks = (gpu.bf16_tflop_per_s * 1e12, gpu.f32_tflop_per_s * 1e12)
    launch_s = 6e-6
    return HardwareProfile(
        version=HARDWARE_VERSION,
        name=name,
        source="preset",
        how=_HOW,
        measured_by="nobody",
        recorded_utc=RECORDED_UTC,
        device="cuda",
        device_name=gpu.device_name,
        cpu_name=host.cpu_name,
        cores=host.cores,
        ram_bytes=host.ram_gib * GIB,
        vram_bytes=gpu.vram_mib * MIB,
        process_base_bytes=3 * GIB,
        device_base_bytes=GIB // 2,
        disk=link_curve("nvme4"),
        bus=link_curve(gpu.bus),
        memory=memory,
        launch_s=launch_s,
        matmul=matmul_curves(peaks, memory, launch_s),
        sources={
            "cores": host.cores_source,
            "ram_bytes": _ram_source(host.ram_gib),
            "vram_bytes": gpu.vram_source,
            "process_base_bytes": "assumption: Python and torch with the CUDA libraries loaded",
            "device_base_bytes": host.context_source,
            "disk": LINKS["nvme4"].source,
            "bus": LINKS[gpu.bus].source,
            "memory": f"{gpu.memory_source}; {GPU_MEMORY_SHARE * 100:.0f} % of it assumed",
            "launch_s": "assumption: 6 us for one eager torch operation",
            "matmul": f"{_MATMUL} from {gpu.peak_source}: {gpu.bf16_tflop_per_s} TFLOP/s (BF16 "
            f"tensor, dense, FP32 accumulation), {gpu.f32_tflop_per_s} TFLOP/s (FP32, no TF32)",
        },
    )


def without_gpu(name: str, cpu: ProcessorFacts, disk: str) -> HardwareProfile:
    """The preset of a machine without a graphics card."""
    memory = MemoryRate(rounded(CPU_MEMORY_SHARE * cpu.memory_gb_per_s * 1e9), 0.0)
    f32_flop_per_s = cpu.cores * cpu.ghz * 1e9 * 32
    launch_s = 2e-6
    return HardwareProfile(
        version=HARDWARE_VERSION,
        name=name,
        source="preset",
        how=_HOW,
        measured_by="nobody",
        recorded_utc=RECORDED_UTC,
        device="cpu",
        device_name=cpu.name,
        cpu_name=cpu.name,
        cores=cpu.cores,
        ram_bytes=cpu.ram_gib * GIB,
        vram_bytes=None,
        process_base_bytes=256 * MIB,
        device_base_bytes=0,
        disk=link_curve(disk),
        bus=None,
        memory=memory,
        launch_s=launch_s,
        matmul=matmul_curves((cpu.bf16_share * f32_flop_per_s, f32_flop_per_s), memory, launch_s),
        sources={
            "cores": f"{cpu.name} data sheet",
            "ram_bytes": _ram_source(cpu.ram_gib),
            "process_base_bytes": "measured on a Linux machine with torch 2.13 for processors: "
            "236 MB; rounded up",
            "device_base_bytes": "none without a GPU",
            "disk": LINKS[disk].source,
            "memory": f"{cpu.memory_source}; {CPU_MEMORY_SHARE * 100:.0f} % of it assumed",
            "launch_s": "measured on a 2.6 GHz server core: 1.9 us for one eager torch operation; "
            "rounded up",
            "matmul": f"{_MATMUL} for {cpu.cores} cores at {cpu.ghz} GHz (data sheet): "
            f"{cpu.peak_source}",
        },
    )


def _ram_source(ram_gib: int) -> str:
    return f"assumption: {ram_gib} GiB; moepack plan --ram says otherwise"


def link_preset(name: str, link: LinkFacts) -> LinkPreset:
    """A link to throttle to: the same as the curve of a machine that has it."""
    source = link.source
    if link.readers > 1:
        source += f", {link.readers} reads in flight"
    latency_s = link.latency_s / link.readers
    return LinkPreset(LINK_VERSION, name, link.bytes_per_s, latency_s, source)


def link_curve(name: str) -> LinkCurve:
    """The curve of a link, with all its readers at work."""
    link = LINKS[name]
    points = []
    for size_kib in _TRANSFERS_KIB:
        size_bytes = size_kib * KIB
        duration_s = link.latency_s / link.readers + size_bytes / link.bytes_per_s
        points.append(LinkPoint(size_bytes, rounded(size_bytes / duration_s), 1, 0.0))
    return LinkCurve(
        readers=link.readers,
        latency_s=link.latency_s,
        past_cache=True,
        how="assumed: seconds = latency / readers + bytes / bandwidth",
        points=tuple(points),
    )


def matmul_curves(
    peaks: tuple[float, float], memory: MemoryRate, launch_s: float
) -> tuple[MatmulCurve, MatmulCurve]:
    """The curves of BF16 and F32, from the peak of each in operations per second."""

    def curve(dtype: Literal["BF16", "F32"], item_bytes: int, peak: float) -> MatmulCurve:
        weights = _MATMUL_WIDTH * _MATMUL_WIDTH
        points = []
        for tokens in _MATMUL_TOKENS:
            flop = 2 * weights * tokens
            bound_s = max(weights * item_bytes / memory.bytes_per_s, flop / (MATMUL_SHARE * peak))
            points.append(MatmulPoint(tokens, rounded(flop / (bound_s + launch_s)), 0.0))
        return MatmulCurve(dtype, _MATMUL_WIDTH, _MATMUL_WIDTH, tuple(points))

    return curve("BF16", 2, peaks[0]), curve("F32", 4, peaks[1])


def main(arguments: Sequence[str]) -> None:
    """Write every preset into a folder."""
    folder = Path(arguments[0]) if arguments else PROFILES
    machines = [with_gpu(name, gpu) for name, gpu in GPUS.items()]
    machines += [without_gpu(name, *facts) for name, facts in PROCESSORS.items()]
    for machine in machines:
        machine.save(folder / "hardware" / f"{machine.name}.yaml")
    for name, link in LINKS.items():
        link_preset(name, link).save(folder / "links" / f"{name}.yaml")


if __name__ == "__main__":
    main(sys.argv[1:])
