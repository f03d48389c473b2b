from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from moepack_runtime.direct_io import Buffer, DirectFile, allocate

from moepack.errors import TransferError
from moepack.units import MIB

SIZE_BYTES = 3 * MIB + 4096 + 123

Preadv = Callable[[int, list[memoryview], int], int]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(SIZE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.fixture
def memory() -> Buffer:
    return allocate(4 * MIB).numpy()


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache: mincore(2), which fetches none itself."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.mincore(
            ctypes.c_void_p(address),
            ctypes.c_size_t(len(mapped)),
            ctypes.c_void_p(pages.ctypes.data),
        )
        if failed:
            pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
        return int((pages & 1).sum())


def fail_with(number: int) -> Preadv:
    def preadv(_descriptor: int, _buffers: list[memoryview], _offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return preadv


def in_pieces(limit: int) -> Preadv:
    """Reads that stop short, as signals and networks may make them."""
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:limit]], offset)

    return preadv


def test_reads_are_the_files_bytes(path: Path, memory: Buffer) -> None:
    expected = np.fromfile(path, np.uint8)
    file = DirectFile(path)
    for offset, size in ((0, 4096), (4096, MIB), (2 * MIB, MIB)):
        file.read_into(memory[:size], offset)
        assert np.array_equal(memory[:size], expected[offset : offset + size])
    file.close()


def test_reads_leave_nothing_in_the_page_cache(path: Path, memory: Buffer) -> None:
    if cached_pages(path):
        pytest.skip("this file system did not drop the file from the page cache")
    file = DirectFile(path)
    if not file.direct:
        pytest.skip(f"no direct reads here: {file.reason}")
    file.read_into(memory[:MIB], 0)
    assert cached_pages(path) == 0
    path.read_bytes()
    assert cached_pages(path) > 0  # so the check sees what is there
    file.close()


@pytest.mark.parametrize("limit", [4096, 65536, 4096 + 512, 8192 - 1])
def test_short_reads_are_continued(
    path: Path, memory: Buffer, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    file = DirectFile(path)
    # Pieces that end inside a block can only be made up without O_DIRECT.
    if limit % 4096 and file.direct:
        file.close()
        monkeypatch.setattr(os, "O_DIRECT", 0)
        file = DirectFile(path)
    monkeypatch.setattr(os, "preadv", in_pieces(limit))
    file.read_into(memory[:MIB], 8192)
    assert np.array_equal(memory[:MIB], np.fromfile(path, np.uint8)[8192 : 8192 + MIB])
    file.close()


def test_the_end_of_a_file_that_is_no_multiple_of_a_block(path: Path, memory: Buffer) -> None:
    file = DirectFile(path)
    file.read_into(memory[:8192], 3 * MIB, needed_bytes=4096 + 123)
    assert np.array_equal(memory[: 4096 + 123], np.fromfile(path, np.uint8)[3 * MIB :])
    file.close()


@pytest.mark.parametrize("kept_bytes", [0, 4096, 10_000, SIZE_BYTES - 1])
def test_a_truncated_file_is_named_with_what_was_expected_and_got(
    path: Path, memory: Buffer, kept_bytes: int
) -> None:
    file = DirectFile(path)
    os.truncate(path, kept_bytes)
    got_bytes = max(0, kept_bytes - 4096)
    with pytest.raises(TransferError) as caught:
        file.read_into(memory[:MIB], 4096) if kept_bytes < MIB else file.read_into(memory, 4096)
    message = str(caught.value)
    assert f"{path}: the file ends early: at offset 4096" in message
    assert f"got {got_bytes};" in message
    file.close()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"gone: No such file or directory"):
        DirectFile(tmp_path / "gone")


def test_a_file_that_vanishes_while_open_can_still_be_read(path: Path, memory: Buffer) -> None:
    expected = np.fromfile(path, np.uint8)[:MIB]
    file = DirectFile(path)
    path.unlink()
    file.read_into(memory[:MIB], 0)
    assert np.array_equal(memory[:MIB], expected)
    file.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_failing_disk_is_named(
    path: Path, memory: Buffer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    file = DirectFile(path)
    monkeypatch.setattr(os, "preadv", fail_with(number))
    with pytest.raises(TransferError) as caught:
        file.read_into(memory[:8192], 4096)
    assert str(caught.value).startswith(
        f"{path}: {os.strerror(number)} while reading 8192 bytes at offset 4096"
    )
    file.close()


def test_a_closed_file_is_not_read(path: Path, memory: Buffer) -> None:
    file = DirectFile(path)
    file.close()
    file.close()
    with pytest.raises(TransferError, match="Bad file descriptor"):
        file.read_into(memory[:4096], 0)


def test_a_refused_open_falls_back_and_says_so(
    path: Path, memory: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(name, flags)

    monkeypatch.setattr(os, "open", refuse)
    file = DirectFile(path)
    assert not file.direct
    assert file.reason == "its file system refuses O_DIRECT"
    file.read_into(memory[:MIB], 4096)
    monkeypatch.undo()
    assert np.array_equal(memory[:MIB], np.fromfile(path, np.uint8)[4096 : 4096 + MIB])
    file.close()


def test_a_refused_read_falls_back_and_says_so(
    path: Path, memory: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", fail_with(errno.EINVAL))
    file = DirectFile(path)
    monkeypatch.undo()
    assert not file.direct
    assert file.reason == "its file system refuses direct reads of 4 KiB blocks"
    file.read_into(memory[:MIB], 0)
    assert np.array_equal(memory[:MIB], np.fromfile(path, np.uint8)[:MIB])
    file.close()


def test_a_fallback_leaves_nothing_in_the_page_cache(
    path: Path, memory: Buffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached_pages(path):
        pytest.skip("this file system did not drop the file from the page cache")
    monkeypatch.setattr(os, "preadv", fail_with(errno.EINVAL))
    file = DirectFile(path)
    monkeypatch.undo()
    file.read_into(memory[:MIB], 0)
    assert cached_pages(path) == 0
    file.close()


def test_a_file_system_in_memory_is_not_called_direct(memory: Buffer) -> None:
    folder = Path("/dev/shm")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        pytest.skip("no file system in memory to try")
    path = folder / f"moepack-test-{os.getpid()}"
    path.write_bytes(bytes(range(256)) * 32)
    try:
        file = DirectFile(path)
        assert not file.direct
        assert file.reason
        file.read_into(memory[:8192], 0)
        assert memory[:8192].tobytes() == path.read_bytes()
        file.close()
    finally:
        path.unlink()


def test_no_descriptor_is_left_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    DirectFile(path).close()
    monkeypatch.setattr(os, "preadv", fail_with(errno.EINVAL))
    DirectFile(path).close()
    monkeypatch.setattr(os, "preadv", fail_with(errno.EIO))
    with pytest.raises(TransferError):
        DirectFile(path)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
