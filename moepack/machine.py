"""What this machine has: memory that may be used, cores, names. Read from Linux's own files."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from moepack.units import KIB

_ROOT = Path("/")


def ram_bytes(root: Path = _ROOT) -> int:
    """RAM that this process may use: the machine's, or less where a container limits it.

    Limits of control groups of both versions count, those of all enclosing groups too.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    return min(_meminfo_bytes(root, "MemTotal"), *_limits(root))


def available_ram_bytes(root: Path = _ROOT) -> int:
    """RAM that could be taken now without swapping, within the same limits."""
    return min(_meminfo_bytes(root, "MemAvailable"), *_limits(root))


def _meminfo_bytes(root: Path, field: str) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise OSError(f"{root}/proc/meminfo has no {field}")


def _limits(root: Path) -> Iterator[int]:
    yield 1 << 62  # no limit
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for membership in memberships:
        _, controllers, group = membership.split(":", 2)  # cgroups(7)
        if controllers == "":
            yield from _limits_above(mount, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_above(mount / "memory", group, "memory.limit_in_bytes")


def _limits_above(mount: Path, group: str, file: str) -> Iterator[int]:
    """The limits of a group and of those around it, as far as they can be seen from here."""
    folder = mount / group.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(mount):
            return
        try:
            text = (place / file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" is none
            yield int(text)


def core_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_name(root: Path = _ROOT) -> str:
    """What the processor calls itself."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
