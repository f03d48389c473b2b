from __future__ import annotations

from pathlib import Path

import pytest
from moepack_runtime.memory import resident_bytes

from moepack import machine
from moepack.units import GIB, MIB


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 32 GiB, 20 of which are available, without any limit."""
    write(tmp_path, "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable:   20971520 kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_limits_the_machine_counts(root: Path) -> None:
    assert machine.ram_bytes(root) == 32 * GIB
    assert machine.available_ram_bytes(root) == 20 * GIB


def test_version_2_groups_limit_with_all_that_enclose_them(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/user/job\n")
    write(root, "sys/fs/cgroup/user/job/memory.max", "max\n")
    assert machine.ram_bytes(root) == 32 * GIB
    write(root, "sys/fs/cgroup/user/memory.max", str(8 * GIB))
    assert machine.ram_bytes(root) == 8 * GIB
    write(root, "sys/fs/cgroup/user/job/memory.max", str(6 * GIB))
    assert machine.ram_bytes(root) == 6 * GIB


def test_version_1_groups_limit_too(root: Path) -> None:
    write(root, "proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert machine.ram_bytes(root) == 32 * GIB
    write(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(4 * GIB))
    assert machine.ram_bytes(root) == 4 * GIB


def test_inside_a_container_whose_groups_own_path_is_hidden_the_root_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/../../docker/abc\n")
    write(root, "sys/fs/cgroup/memory.max", str(2 * GIB))
    assert machine.ram_bytes(root) == 2 * GIB


def test_this_machine_has_what_the_system_says() -> None:
    assert 0 < machine.available_ram_bytes() <= machine.ram_bytes()
    assert machine.core_count() >= 1
    assert machine.cpu_name()
    assert MIB < resident_bytes() < machine.ram_bytes()
