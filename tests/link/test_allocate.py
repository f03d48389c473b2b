from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from moepack_runtime.direct_io import allocate

from moepack.errors import OutOfMemoryError
from moepack.segments import align_up
from moepack.units import KIB, MIB


class Area(NamedTuple):
    """What the system says of an area of memory."""

    permissions: set[str]
    resident_bytes: int
    huge_bytes: int


def area_of(memory: torch.Tensor) -> Area:
    begin, end = memory.data_ptr(), memory.data_ptr() + align_up(memory.nbytes)
    permissions, resident, huge = set(), 0, 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            low, high = (int(text, 16) for text in name.split("-"))
            inside = low < end and high > begin
            if inside:
                permissions.add(values[0])
        elif inside and name == "Rss:":
            resident += int(values[0]) * KIB
        elif inside and name == "AnonHugePages:":
            huge += int(values[0]) * KIB
    return Area(permissions, resident, huge)


def huge_pages_are_offered() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[never]" not in path.read_text()


@pytest.mark.parametrize("size_bytes", [1, 4096, 5000, 2 * MIB, 6 * MIB + 5 * 4096 + 1])
def test_memory_is_private_and_resident_to_the_page_from_the_start(size_bytes: int) -> None:
    memory = allocate(size_bytes)
    area = area_of(memory)
    assert memory.shape == (size_bytes,)
    assert memory.dtype is torch.uint8
    assert area.permissions == {"rw-p"}
    assert area.resident_bytes == align_up(size_bytes)


@pytest.mark.skipif(not huge_pages_are_offered(), reason="this kernel offers no huge pages")
def test_memory_of_some_size_is_in_huge_pages() -> None:
    memory = allocate(32 * MIB + 4096)
    # Not all of it where memory is fragmented; small pages alone would show none.
    assert area_of(memory).huge_bytes >= 16 * MIB


def test_memory_is_aligned_for_direct_reads_and_huge_pages() -> None:
    assert allocate(4096).data_ptr() % (4 * KIB) == 0
    for _ in range(3):
        assert allocate(3 * MIB).data_ptr() % (2 * MIB) == 0


def test_memory_is_zero_and_can_be_written_to_its_ends() -> None:
    memory = allocate(3 * MIB + 100)
    assert not memory.any()
    memory[0] = memory[-1] = 255
    assert int(memory.sum(dtype=torch.int64)) == 510


def test_memory_goes_back_when_the_last_view_goes() -> None:
    memory = allocate(64 * MIB)
    view = memory[60 * MIB :].view(torch.float32)
    address = memory.data_ptr()
    del memory
    view.fill_(1.0)
    assert float(view.sum()) == view.numel()
    del view
    mapped = [
        line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if line
    ]
    assert f"{address:x}" not in mapped


def test_nothing_is_nothing() -> None:
    assert allocate(0).numel() == 0


@pytest.mark.parametrize("size_bytes", [1 << 50, 1 << 70])
def test_more_than_there_is_is_a_named_error(size_bytes: int) -> None:
    with pytest.raises(OutOfMemoryError, match=r"refused .* of memory"):
        allocate(size_bytes)
