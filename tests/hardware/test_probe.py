from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from moepack_runtime import direct_io

from moepack import probe, probe_link, probe_torch
from moepack.errors import DeviceError, DiskFullError, OutputError, ProfileError
from moepack.hardware import HardwareProfile, load_hardware
from moepack.progress import NO_PROGRESS, Progress, Unit
from moepack.rates import LinkCurve
from moepack.timing import Timing
from moepack.units import GIB, KIB, MIB


class Recorder:
    """Progress that adds up."""

    def __init__(self) -> None:
        self.work: list[list[object]] = []
        self.open = False

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:
        assert not self.open
        self.open = True
        self.work.append([what, total, unit, 0])

    def advance(self, amount: int) -> None:
        assert self.open
        done = self.work[-1][3]
        assert isinstance(done, int)
        self.work[-1][3] = done + amount

    def done(self) -> None:
        assert self.open
        self.open = False


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of everything: the numbers mean little, their form is the same."""
    monkeypatch.setattr(probe_link, "SCRATCH_BYTES", 64 * MIB)
    monkeypatch.setattr(probe_link, "_BATCH_BYTES", 16 * MIB)
    monkeypatch.setattr(probe, "ROUNDS", 2)
    monkeypatch.setattr(probe, "_DISK_ROUNDS", 1)
    monkeypatch.setattr(probe_torch, "_MEMORY_BYTES", 32 * MIB)
    monkeypatch.setattr(probe_torch, "_LIMIT_S", 0.0)


def probe_disk(scratch: Path, progress: Progress = NO_PROGRESS) -> LinkCurve:
    """One round."""
    with probe_link.open_disk(scratch, progress) as disk:
        disk.round()
        return disk.curve()


class Probed(NamedTuple):
    profile: HardwareProfile
    progress: Recorder
    left: list[str]


@pytest.fixture
def probed(hasty: None, tmp_path: Path) -> Probed:
    progress = Recorder()
    scratch = tmp_path / "not" / "yet"
    profile = probe.probe_hardware(scratch, progress=progress, device="cpu", name="test")
    return Probed(profile, progress, os.listdir(scratch))  # noqa: PTH208


def test_a_machine_is_measured_and_its_profile_comes_back_from_a_file(
    probed: Probed, tmp_path: Path
) -> None:
    profile = probed.profile
    assert (profile.name, profile.source, profile.device) == ("test", "measured", "cpu")
    assert profile.bus is None
    assert f"torch {torch.__version__}" in profile.measured_by
    assert [point.size_bytes for point in profile.disk.points] == list(probe_link.LINK_SIZES)
    assert profile.thread_counts == tuple(sorted({1, torch.get_num_threads()}))
    for dtype in ("BF16", "F32"):
        for threads in profile.thread_counts:
            widths = [curve.rows for curve in profile.matmul_curves(dtype, threads)]
            assert widths == list(probe_torch.MATMUL_TOKENS)
            assert profile.attention_rate(dtype, threads).threads == threads
    assert 50 * MIB < profile.process_base_bytes < 2 * GIB
    assert 1e-8 < profile.launch_s < 1e-3
    assert profile.memory.bytes_per_s > 1e8
    path = tmp_path / "machine.yaml"
    profile.save(path)
    assert load_hardware(path) == profile
    # Progress added up, and nothing was left behind.
    assert [item[0] for item in probed.progress.work] == [
        "write a scratch file",
        "measure the machine",
    ]
    for _, total, _, done in probed.progress.work:
        assert done == total
    assert not probed.progress.open
    assert probed.left == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device"):
        probe.probe_hardware(tmp_path, device="cuda")


def test_a_runtime_that_cannot_be_loaded_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_BASE_PROGRAM", "raise ImportError('no runtime')")
    with pytest.raises(ProfileError, match="ImportError: no runtime"):
        probe._process_base_bytes()


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(GIB, GIB, 100 * MIB))
    with pytest.raises(DiskFullError, match=r"100\.00 MiB are free, measuring .* 256\.00 MiB"):
        probe_disk(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        probe_disk(tmp_path / "file" / "folder")


class Stop(BaseException):
    """As Ctrl-C would."""


@pytest.fixture
def interrupted(hasty: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = direct_io.DirectFile.read_into
    reads: list[int] = []

    def read_into(
        self: direct_io.DirectFile,
        destination: direct_io.Buffer,
        offset_bytes: int,
        needed_bytes: int | None = None,
    ) -> None:
        reads.append(offset_bytes)
        if len(reads) > 50:
            raise Stop
        real(self, destination, offset_bytes, needed_bytes)

    monkeypatch.setattr(direct_io.DirectFile, "read_into", read_into)
    yield
    assert len(reads) > 50


@pytest.mark.usefixtures("interrupted")
def test_an_interruption_leaves_no_file_no_descriptor_and_no_open_progress(tmp_path: Path) -> None:
    progress = Recorder()
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(Stop):
        probe_disk(tmp_path, progress)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert not progress.open


@pytest.mark.usefixtures("hasty")
def test_measuring_memory_instead_of_a_disk_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "_is_memory", lambda _: True)
    link = probe_disk(tmp_path)
    assert not link.past_cache
    assert "through the page cache (its file system keeps files in memory)" in link.how


@pytest.mark.usefixtures("hasty")
def test_direct_reads_that_never_reach_a_device_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_link, "_device_read_bytes", lambda: 0)
    link = probe_disk(tmp_path)
    assert not link.past_cache
    assert "from memory" in link.how or "through the page cache" in link.how


def curve(rates: dict[int, dict[int, float]]) -> LinkCurve:
    """From bytes per second by readers and size, the same in each of three rounds."""
    batches_s = {
        readers: {size: [size / rate] * 3 for size, rate in sizes.items()}
        for readers, sizes in rates.items()
    }
    return probe_link._curve(batches_s, 1e-4, past_cache=True, how="test")


def test_the_fewest_readers_that_are_about_as_fast_are_taken() -> None:
    alike = curve({1: {4096: 1e8, MIB: 1.00e9}, 2: {4096: 2e8, MIB: 1.04e9}})
    assert alike.readers == 1
    assert [point.bytes_per_s for point in alike.points] == [1e8, 1e9]
    faster = curve({1: {4096: 1e8, MIB: 1.0e9}, 2: {4096: 2e8, MIB: 1.5e9}})
    assert faster.readers == 2
    assert [point.bytes_per_s for point in faster.points] == [2e8, 1.5e9]


def test_large_transfers_are_measured_as_they_are_made_one_by_one() -> None:
    sizes = (256 * KIB, 2 * MIB, 16 * MIB)
    found = curve({readers: dict.fromkeys(sizes, 1e9 * readers) for readers in (1, 2, 4)})
    assert found.readers == 4
    assert [found.readers_for(size) for size in sizes] == [4, 2, 1]
    assert [point.bytes_per_s for point in found.points] == [4e9, 2e9, 1e9]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("hasty", "two_threads")
def test_one_thread_and_all_are_measured_and_then_left_as_they_were() -> None:
    torch_probe = probe_torch.TorchProbe(torch.device("cpu"))
    torch_probe.round()
    assert torch.get_num_threads() == 2
    assert {curve.threads for curve in torch_probe.matmul()} == {1, 2}
    assert {rate.threads for rate in torch_probe.attention()} == {1, 2}


def test_the_spread_is_that_between_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 1.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr(probe_torch, "_MEMORY_BYTES", 16 * MIB)
    monkeypatch.setattr(
        probe_torch, "measure", lambda *_, **__: Timing(next(seconds), spread=0.0, repeats=9)
    )
    torch_probe = probe_torch.TorchProbe(torch.device("cpu"))
    for _ in range(5):
        torch_probe._time("memory", work=lambda: None)
    assert torch_probe.memory().bytes_per_s == pytest.approx(16 * MIB / 2.0, rel=1e-3)
    assert torch_probe.memory().spread == pytest.approx((3.0 - 1.0) / 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_bus_is_measured() -> None:
    bus = probe_link.BusProbe(torch.device("cuda"))
    for _ in range(2):
        bus.round()
    rates = [point.bytes_per_s for point in bus.curve().points]
    assert rates[-1] > rates[0]
    assert rates[-1] > 1e9
