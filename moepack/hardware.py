"""A machine in numbers, and their way to and from YAML.

A :class:`HardwareProfile` says nothing about any model. It is measured here
(:mod:`moepack.probe`), or a preset that states where each number comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

from moepack import records
from moepack.atomic import write_atomically
from moepack.errors import ProfileError
from moepack.plan import DeviceKind
from moepack.presets import resolve
from moepack.rates import (
    AttentionRate,
    LinkCurve,
    MatmulCurve,
    MemoryRate,
    product_seconds,
    require_positive,
)
from moepack.records import record
from moepack.units import MIB
from moepack.yaml_files import to_yaml_text

HARDWARE_VERSION = 1

# A hundred times the largest; a file beyond is something else.
_MAX_FILE_BYTES = 1 << 20

# Of a prefill.
_BLOCK_TOKENS = 512

_Rate = TypeVar("_Rate", MatmulCurve, AttentionRate)

_HEADER = """\
# A machine as moepack sees it. Sizes in bytes, rates per second, times in seconds.
# `spread` is the interquartile range of the repeats over their median; 0 where not measured.
"""


@record
class HardwareProfile:
    """One machine.

    Attributes
    ----------
    name : str
        Of the preset, or of the machine.
    source : {"measured", "preset"}
    how, measured_by, recorded_utc : str
        In words; by which moepack and torch; when (UTC, ISO 8601).
    device : {"cpu", "cuda"}
        What computes; ``device_name`` is its name.
    cores : int
        That the process may use.
    ram_bytes : int
        The container's limit, or the machine's.
    vram_bytes : int or None
        None without a GPU.
    process_base_bytes : int
        RAM of a process that has loaded torch and no model.
    device_base_bytes : int
        VRAM that the driver's context takes; 0 without a GPU.
    disk : LinkCurve
        Disk to RAM.
    bus : LinkCurve or None
        Pinned RAM to VRAM; None without a GPU.
    memory : MemoryRate
        Of the memory that the device computes from.
    launch_s : float
        Fixed cost of one torch operation.
    launch_spread : float
    matmul : tuple of MatmulCurve
        One or more for each dtype, with weights of different sizes.
    attention : tuple of AttentionRate
        One for each dtype; empty where it is not known.
    sources : dict
        Presets: for each number (a field's name, or ``disk``, ``bus``, ``memory``, ``matmul``)
        where it comes from.
    """

    version: int
    name: str
    source: Literal["measured", "preset"]
    how: str
    measured_by: str
    recorded_utc: str
    device: DeviceKind
    device_name: str
    cpu_name: str
    cores: int
    ram_bytes: int
    vram_bytes: int | None
    process_base_bytes: int
    device_base_bytes: int
    disk: LinkCurve
    bus: LinkCurve | None
    memory: MemoryRate
    launch_s: float
    matmul: tuple[MatmulCurve, ...]
    attention: tuple[AttentionRate, ...] = ()
    launch_spread: float = 0.0
    sources: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive(
            cores=self.cores,
            ram_bytes=self.ram_bytes,
            process_base_bytes=self.process_base_bytes,
            launch_s=self.launch_s,
        )
        if self.device_base_bytes < 0:
            raise ValueError(f"device_base_bytes is {self.device_base_bytes}, expected 0 or more")
        if self.vram_bytes is not None:
            require_positive(vram_bytes=self.vram_bytes)
        gpu = self.device == "cuda"
        if gpu != (self.bus is not None) or gpu != (self.vram_bytes is not None):
            raise ValueError("vram_bytes and bus belong to a machine whose device is cuda")
        if not self.matmul:
            raise ValueError("matmul has no curve, expected one for BF16 or F32 at least")

    @property
    def digest(self) -> str:
        """Identity of the numbers, whenever they were recorded: lower-case hex."""
        return records.digest(dataclasses.replace(self, recorded_utc=""))

    @property
    def fast_bytes(self) -> int:
        """Capacity of the fast tier: VRAM, or RAM where the processor computes."""
        return self.ram_bytes if self.vram_bytes is None else self.vram_bytes

    @property
    def link(self) -> LinkCurve:
        """What feeds the fast tier: the bus from pinned RAM, or the disk."""
        return self.disk if self.bus is None else self.bus

    def link_seconds(self, size_bytes: int) -> float:
        """Seconds that the link is busy with one transfer. See :meth:`LinkCurve.seconds`."""
        return self.link.seconds(size_bytes)

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads whose rates are known, ascending."""
        return tuple(sorted({curve.threads or self.cores for curve in self.matmul}))

    def matmul_curves(self, dtype: str, threads: int | None = None) -> tuple[MatmulCurve, ...]:
        """The curves of a dtype (of the same width, else of any, where it was not measured).

        Parameters
        ----------
        threads
            One of :attr:`thread_counts`; None for the most.
        """
        threads = threads or self.thread_counts[-1]
        curves = tuple(curve for curve in self.matmul if (curve.threads or self.cores) == threads)
        return _of_dtype(curves, dtype) or curves

    def product_seconds(
        self, dtype: str, tokens: float, elements: int, threads: int | None = None
    ) -> float:
        """Seconds of one matrix product with so many weights, read from memory.

        Between the shapes that were measured (:func:`moepack.rates.product_seconds`). Where only
        one is known, ``max(weights / memory rate, flop / rate at its shape) + launch cost``.
        """
        curves = self.matmul_curves(dtype, threads)
        if len(curves) > 1:
            return product_seconds(curves, tokens, elements)
        width = 4 if curves[0].dtype == "F32" else 2
        flop_s = 2 * tokens * elements / curves[0].flop_per_s(tokens)
        return max(elements * width / self.memory.bytes_per_s, flop_s) + self.launch_s

    def attention_rate(self, dtype: str, threads: int | None = None) -> AttentionRate:
        """That of a dtype, or of one as wide; where none is known, as fast as memory and products.

        For products at a block's worth of tokens.
        """
        threads = threads or self.thread_counts[-1]
        rates = tuple(rate for rate in self.attention if (rate.threads or self.cores) == threads)
        known = _of_dtype(rates, dtype)
        if known:
            return known[0]
        curve = self.matmul_curves(dtype, threads)[-1]
        read = self.memory.bytes_per_s
        return AttentionRate(curve.dtype, read, read, curve.flop_per_s(_BLOCK_TOKENS), 0.0)

    def save(self, path: Path) -> None:
        """Write as YAML, atomically.

        Raises
        ------
        OutputError
            When it cannot be written.
        """
        data = records.to_short_data(self)
        sources = data.pop("sources")
        # One line for each point of a curve, and one (or more) for each source.
        text = to_yaml_text(data, unicode=True)
        if sources:
            text += to_yaml_text({"sources": sources}, flow=False, unicode=True)
        write_atomically(path, (_HEADER + text).encode())


def _of_dtype(rates: tuple[_Rate, ...], dtype: str) -> tuple[_Rate, ...]:
    """Those of a dtype, else those that are as wide."""
    wide = dtype in ("F32", "F64")
    same = tuple(rate for rate in rates if rate.dtype == dtype)
    return same or tuple(rate for rate in rates if (rate.dtype == "F32") == wide)


def load_hardware(path: Path) -> HardwareProfile:
    """Read a hardware profile.

    Raises
    ------
    ProfileError
        When it cannot be read, or a field is wrong, naming it; also when a number is one that no
        machine has, and so probably in another unit.
    """
    what = f"hardware profile {path}"
    profile = records.load_yaml(
        HardwareProfile,
        path,
        what="hardware profile",
        error=ProfileError,
        remedy="make one with moepack profile --hardware-only",
        version=HARDWARE_VERSION,
        limit_bytes=_MAX_FILE_BYTES,
    )
    for name, value, least, most in _bounds(profile):
        if not least <= value <= most:
            raise ProfileError(
                f"{what}: {name} is {value:g}, expected {least:g} to {most:g}; it looks like "
                "another unit: sizes are in bytes, rates per second, times in seconds"
            )
    return profile


def _bounds(profile: HardwareProfile) -> Iterator[tuple[str, float, float, float]]:
    """What a person may have written in another unit: name, value, and what machines have."""
    size, rate, flop, time = (MIB, 1 << 50), (1e4, 1e14), (1e6, 1e17), (1e-9, 1.0)
    yield ("ram_bytes", profile.ram_bytes, *size)
    yield ("process_base_bytes", profile.process_base_bytes, *size)
    if profile.vram_bytes is not None:
        yield ("vram_bytes", profile.vram_bytes, *size)
    for name, link in (("disk", profile.disk), ("bus", profile.bus)):
        if link is not None:
            yield (f"{name}.latency_s", link.latency_s, *time)
            for index, point in enumerate(link.points):
                yield (f"{name}.points.{index}.bytes_per_s", point.bytes_per_s, *rate)
    yield ("memory.bytes_per_s", profile.memory.bytes_per_s, *rate)
    yield ("launch_s", profile.launch_s, *time)
    for place, attention in enumerate(profile.attention):
        yield (f"attention.{place}.cache_bytes_per_s", attention.cache_bytes_per_s, *rate)
        yield (f"attention.{place}.grouped_bytes_per_s", attention.grouped_bytes_per_s, *rate)
        yield (f"attention.{place}.block_flop_per_s", attention.block_flop_per_s, *flop)
    for place, curve in enumerate(profile.matmul):
        for index, entry in enumerate(curve.points):
            yield (f"matmul.{place}.points.{index}.flop_per_s", entry.flop_per_s, *flop)


def find_hardware(name_or_path: str) -> HardwareProfile:
    """A preset by name, or a profile by the path of its file.

    Raises
    ------
    PresetNotFoundError
        When it is neither.
    ProfileError
        When the file is not a profile.
    """
    return load_hardware(resolve(name_or_path, "hardware"))
