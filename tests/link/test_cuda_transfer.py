"""What can be tried of the CUDA twin without a GPU; the rest is in the contract, marked gpu."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch
from moepack_runtime.transfer import CudaTransfer, HostTransfer
from moepack_runtime.transfer.cuda import PinnedSegments

from moepack.errors import DeviceError, OutOfMemoryError, TransferError
from moepack.segments import SegmentId
from tests.link.support import STORED_BYTES, PatternStore, content, segment


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_a_named_error_and_closes_what_was_handed_over() -> None:
    store = PatternStore()
    with pytest.raises(DeviceError, match="no CUDA device that torch can use"):
        PinnedSegments(HostTransfer(store), {segment(0): STORED_BYTES})
    assert store.closed


class FakeRuntime:
    """Counts what is pinned, and refuses when told to."""

    def __init__(self, result: int) -> None:
        self.result = result
        self.pinned: set[int] = set()

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert size_bytes == 2 * STORED_BYTES
        assert flags == 0
        if self.result == 0:
            self.pinned.add(address)
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        self.pinned.remove(address)
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


SIZES = {segment(number): STORED_BYTES for number in range(2)}


def test_pinned_segments_hold_their_bytes_until_they_are_closed(runtime: FakeRuntime) -> None:
    store = PatternStore()
    pinned = PinnedSegments(HostTransfer(store), SIZES)
    for number in range(2):
        assert (pinned.segments[segment(number)].numpy() == content(number)).all()
    assert len(runtime.pinned) == 1
    assert not store.closed
    pinned.close()
    pinned.close()
    assert runtime.pinned == set()
    assert store.closed


def test_memory_that_cannot_be_pinned_is_a_named_error(runtime: FakeRuntime) -> None:
    runtime.result = 2
    with pytest.raises(OutOfMemoryError, match=r"CUDA refused to pin 16\.00 KiB"):
        PinnedSegments(HostTransfer(PatternStore()), SIZES)
    assert runtime.pinned == set()


def test_a_segment_that_cannot_be_read_leaves_nothing_pinned(runtime: FakeRuntime) -> None:
    def fail(segment_id: SegmentId) -> None:
        raise TransferError(f"{segment_id}: broken")

    with pytest.raises(TransferError, match="broken"):
        PinnedSegments(HostTransfer(PatternStore(fail)), SIZES)
    assert runtime.pinned == set()


class FakeEvent:
    """Has always happened; copies on a GPU that is the processor are done at once."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.log.append(f"{stream.name} records")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.stream is self.stream
        return 2.0  # milliseconds


class FakeStream:
    """Writes down what it is told."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: torch.device, name: str = "copies") -> None:
        self.device = device
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        assert event.stream is not None
        self.log.append(f"{self.name} waits for {event.stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is waited for")


def test_copies_wait_for_the_consumer_and_the_consumer_for_copies(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    log = FakeStream.log = []
    consumer = FakeStream(cpu, "consumer")
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: consumer)
    transfer = CudaTransfer(PinnedSegments(HostTransfer(PatternStore()), SIZES), cpu)
    place = transfer.allocate(STORED_BYTES)
    ticket = transfer.start(segment(1), place)
    assert log == ["copies waits for consumer", "copies records", "copies records"]
    transfer.wait(ticket)
    assert log[3:] == ["consumer waits for copies"]
    assert (place.numpy() == content(1)).all()
    assert transfer.is_ready(ticket)
    assert not transfer.cancel(ticket)
    assert transfer.statistics == (STORED_BYTES, 1, 2e-3)
    transfer.close()
    assert log[4:] == ["copies is waited for"]
    assert runtime.pinned == set()
    with pytest.raises(TransferError, match="the transfer is closed"):
        transfer.start(segment(0), place)
    with pytest.raises(TransferError, match="the transfer is closed"):
        transfer.wait(ticket)


def test_a_device_that_failed_leaves_nothing_pinned(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailedStream(FakeStream):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "Stream", FailedStream)
    store = PatternStore()
    transfer = CudaTransfer(PinnedSegments(HostTransfer(store), SIZES), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        transfer.close()
    assert runtime.pinned == set()
    assert store.closed
