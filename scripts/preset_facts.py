"""The facts that the presets are made from: each from a data sheet, or called an assumption."""

from __future__ import annotations

from typing import NamedTuple

#: When the facts were looked up. Fixed, so that equal facts make equal files.
RECORDED_UTC = "2026-11-22T00:00:00+00:00"


class LinkFacts(NamedTuple):
    """A bus or a disk; ``latency_s`` is that of one transfer alone, ``readers`` are in flight."""

    bytes_per_s: float
    latency_s: float
    readers: int
    source: str


class HostFacts(NamedTuple):
    """What is around a graphics card."""

    cpu_name: str
    cores: int
    cores_source: str
    ram_gib: int
    context_source: str


class GpuFacts(NamedTuple):
    """A graphics card. Peaks are dense; that of BF16 is the tensor cores', summing in FP32."""

    device_name: str
    vram_mib: int
    vram_source: str
    memory_gb_per_s: float
    memory_source: str
    bf16_tflop_per_s: float
    f32_tflop_per_s: float
    peak_source: str
    bus: str
    host: HostFacts


class ProcessorFacts(NamedTuple):
    """A machine without a graphics card. ``bf16_share`` is the peak in BF16 over that in FP32."""

    name: str
    cores: int
    ghz: float
    ram_gib: int
    memory_gb_per_s: float
    memory_source: str
    bf16_share: float
    peak_source: str


LINKS = {
    "pcie3-x16": LinkFacts(
        bytes_per_s=12e9,
        latency_s=12e-6,
        readers=1,
        source="PCIe 3.0 x16: 15.75 GB/s by specification; 12 GB/s and 12 us for pinned copies "
        "assumed (12.36 GB/s in the README of NVIDIA's nvbandwidth)",
    ),
    "pcie4-x8": LinkFacts(
        bytes_per_s=12.5e9,
        latency_s=12e-6,
        readers=1,
        source="PCIe 4.0 x8: 15.75 GB/s by specification; 12.5 GB/s and 12 us for pinned copies "
        "assumed, half of what x16 gives",
    ),
    "pcie4-x16": LinkFacts(
        bytes_per_s=25e9,
        latency_s=12e-6,
        readers=1,
        source="PCIe 4.0 x16: 31.5 GB/s by specification; 25 GB/s and 12 us for pinned copies "
        "assumed, as bandwidthTest commonly shows",
    ),
    "pcie5-x16": LinkFacts(
        bytes_per_s=53e9,
        latency_s=12e-6,
        readers=1,
        source="PCIe 5.0 x16: 63 GB/s by specification; 53 GB/s and 12 us for pinned copies "
        "assumed (55.63 GB/s in NVIDIA's article on nvbandwidth)",
    ),
    "sata": LinkFacts(
        bytes_per_s=540e6,
        latency_s=100e-6,
        readers=2,
        source="Samsung 870 EVO data sheet: 560 MB/s sequential read (SATA 6 Gb/s); 540 MB/s and "
        "100 us at queue depth 1 assumed",
    ),
    "nvme3": LinkFacts(
        bytes_per_s=3.3e9,
        latency_s=60e-6,
        readers=2,
        source="Samsung 970 EVO Plus data sheet: 3500 MB/s sequential read (PCIe 3.0 x4); 3.3 "
        "GB/s and 60 us at queue depth 1 assumed",
    ),
    "nvme4": LinkFacts(
        bytes_per_s=7.0e9,
        latency_s=60e-6,
        readers=2,
        source="Samsung 990 PRO data sheet: 7450 MB/s sequential read (PCIe 4.0 x4); 7.0 GB/s and "
        "60 us at queue depth 1 assumed",
    ),
    "nvme5": LinkFacts(
        bytes_per_s=13.5e9,
        latency_s=60e-6,
        readers=2,
        source="Samsung 9100 PRO data sheet: 14700 MB/s sequential read (PCIe 5.0 x4); 13.5 GB/s "
        "and 60 us at queue depth 1 assumed",
    ),
}

_DESKTOP = HostFacts(
    cpu_name="desktop processor, 8 cores",
    cores=8,
    cores_source="assumption: a desktop processor",
    ram_gib=64,
    context_source="assumption: the CUDA context and a desktop",
)
_LAPTOP = HostFacts(
    cpu_name="laptop processor, 8 cores",
    cores=8,
    cores_source="assumption: a laptop processor",
    ram_gib=32,
    context_source="assumption: the CUDA context and a desktop",
)
_SERVER = HostFacts(
    cpu_name="server processor, 16 cores",
    cores=16,
    cores_source="assumption: a share of a server processor",
    ram_gib=256,
    context_source="assumption: the CUDA context",
)

GPUS = {
    "rtx-3060-12g": GpuFacts(
        device_name="NVIDIA GeForce RTX 3060",
        vram_mib=12288,
        vram_source="12288 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=360,
        memory_source="192 bits at 15 Gb/s (NVIDIA's specifications of the card): 360 GB/s",
        bf16_tflop_per_s=25.5,
        f32_tflop_per_s=12.7,
        peak_source="3584 cores at 1.777 GHz (NVIDIA's specifications of the card), tensor cores "
        "at twice the FP32 rate (NVIDIA GA102 whitepaper)",
        bus="pcie4-x16",
        host=_DESKTOP,
    ),
    "rtx-3090": GpuFacts(
        device_name="NVIDIA GeForce RTX 3090",
        vram_mib=24576,
        vram_source="24576 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=936,
        memory_source="NVIDIA GA102 whitepaper: 936 GB/s",
        bf16_tflop_per_s=71.0,
        f32_tflop_per_s=35.6,
        peak_source="NVIDIA GA102 whitepaper",
        bus="pcie4-x16",
        host=_DESKTOP,
    ),
    "rtx-4070-laptop": GpuFacts(
        device_name="NVIDIA GeForce RTX 4070 Laptop GPU",
        vram_mib=8188,
        vram_source="assumption: 8188 MiB, as nvidia-smi reports for other Ada cards of 8 GB",
        memory_gb_per_s=256,
        memory_source="128 bits at 16 Gb/s (specifications of the GPU): 256 GB/s",
        bf16_tflop_per_s=40.1,
        f32_tflop_per_s=20.0,
        peak_source="4608 cores at 2.175 GHz (specifications of the GPU, at 115 W; a laptop may "
        "set it as low as 35 W and 1.23 GHz), tensor cores at twice the FP32 rate (NVIDIA Ada GPU "
        "architecture whitepaper)",
        bus="pcie4-x8",
        host=_LAPTOP,
    ),
    "rtx-4090": GpuFacts(
        device_name="NVIDIA GeForce RTX 4090",
        vram_mib=24564,
        vram_source="24564 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=1008,
        memory_source="NVIDIA Ada GPU architecture whitepaper: 1008 GB/s",
        bf16_tflop_per_s=165.2,
        f32_tflop_per_s=82.6,
        peak_source="NVIDIA Ada GPU architecture whitepaper",
        bus="pcie4-x16",
        host=_DESKTOP,
    ),
    "rtx-5090": GpuFacts(
        device_name="NVIDIA GeForce RTX 5090",
        vram_mib=32607,
        vram_source="32607 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=1792,
        memory_source="NVIDIA RTX Blackwell GPU architecture whitepaper: 1792 GB/s",
        bf16_tflop_per_s=209.5,
        f32_tflop_per_s=104.8,
        peak_source="NVIDIA RTX Blackwell GPU architecture whitepaper",
        bus="pcie5-x16",
        host=_DESKTOP,
    ),
    "a6000": GpuFacts(
        device_name="NVIDIA RTX A6000",
        vram_mib=49140,
        vram_source="49140 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=768,
        memory_source="NVIDIA RTX A6000 data sheet: 768 GB/s",
        bf16_tflop_per_s=154.8,
        f32_tflop_per_s=38.7,
        peak_source="NVIDIA GA102 whitepaper and RTX A6000 data sheet",
        bus="pcie4-x16",
        host=_DESKTOP,
    ),
    "a100-40g": GpuFacts(
        device_name="NVIDIA A100-PCIE-40GB",
        vram_mib=40960,
        vram_source="40960 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=1555,
        memory_source="NVIDIA A100 data sheet (40 GB, PCIe): 1555 GB/s",
        bf16_tflop_per_s=312.0,
        f32_tflop_per_s=19.5,
        peak_source="NVIDIA A100 data sheet",
        bus="pcie4-x16",
        host=_SERVER,
    ),
    "a100-80g": GpuFacts(
        device_name="NVIDIA A100 80GB PCIe",
        vram_mib=81920,
        vram_source="81920 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=1935,
        memory_source="NVIDIA A100 data sheet (80 GB, PCIe): 1935 GB/s",
        bf16_tflop_per_s=312.0,
        f32_tflop_per_s=19.5,
        peak_source="NVIDIA A100 data sheet",
        bus="pcie4-x16",
        host=_SERVER,
    ),
    "h100": GpuFacts(
        device_name="NVIDIA H100 80GB HBM3",
        vram_mib=81559,
        vram_source="81559 MiB, as nvidia-smi reports for this card",
        memory_gb_per_s=3350,
        memory_source="NVIDIA H100 data sheet (SXM): 3350 GB/s",
        bf16_tflop_per_s=989.4,
        f32_tflop_per_s=66.9,
        peak_source="NVIDIA H100 data sheet (SXM)",
        bus="pcie5-x16",
        host=_SERVER,
    ),
}

_DDR4 = ProcessorFacts(
    name="AMD Ryzen 5 3600",
    cores=6,
    ghz=3.6,
    ram_gib=32,
    memory_gb_per_s=51.2,
    memory_source="two channels of DDR4-3200 (AMD Ryzen 5 3600 data sheet): 51.2 GB/s",
    bf16_share=0.5,
    peak_source="32 FP32 operations a cycle (two 256-bit FMA units, Zen 2); BF16 is converted on "
    "the way, at half the FP32 rate (assumption)",
)
_DDR5 = ProcessorFacts(
    name="AMD Ryzen 7 7700X",
    cores=8,
    ghz=4.5,
    ram_gib=64,
    memory_gb_per_s=83.2,
    memory_source="two channels of DDR5-5200 (AMD Ryzen 7 7700X data sheet): 83.2 GB/s",
    bf16_share=2.0,
    peak_source="32 FP32 operations a cycle (two 256-bit FMA units, Zen 4), twice as many in BF16 "
    "(AVX512-BF16 dot products)",
)

#: Processor and disk of each machine without a graphics card. The two short names are for whoever
#: does not care which memory.
PROCESSORS = {
    "cpu-sata": (_DDR4, "sata"),
    "cpu-nvme4": (_DDR5, "nvme4"),
    "cpu-ddr4-sata": (_DDR4, "sata"),
    "cpu-ddr4-nvme3": (_DDR4, "nvme3"),
    "cpu-ddr4-nvme4": (_DDR4, "nvme4"),
    "cpu-ddr5-sata": (_DDR5, "sata"),
    "cpu-ddr5-nvme3": (_DDR5, "nvme3"),
    "cpu-ddr5-nvme4": (_DDR5, "nvme4"),
    "cpu-ddr5-nvme5": (_DDR5, "nvme5"),
}
