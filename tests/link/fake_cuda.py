"""A device that is the processor: its copies are done at once, its streams can be held up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter, sleep
from typing import ClassVar

import pytest
import torch
from moepack_runtime.transfer import cuda


class FakeRuntime:
    """Knows what is pinned, and refuses when told to."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        assert flags == 0
        if self.result == 0:
            self.pinned[address] = size_bytes
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


class FakeStream:
    """Work on it has passed, unless a test holds it up; and it may have failed.

    Copies are made when they are handed over, so what they had to wait for is looked at then.
    """

    made: ClassVar[list[FakeStream]] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda_stream = 0
        self.passing = threading.Event()
        self.passing.set()
        self.failure = ""
        self.recorded = 0
        self.behind: list[FakeEvent] = []
        self.on_wait: Callable[[FakeEvent], None] = lambda _: None
        FakeStream.made.append(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.on_wait(event)
        self.behind.append(event)

    def has_passed(self) -> bool:
        return self.passing.is_set() and all(event.query() for event in self.behind)


class FakeEvent:
    """Has happened as soon as the stream passes that it was last recorded on."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
        self._blocking = blocking
        self._timed = enable_timing
        self.stream: FakeStream | None = None
        self._recorded_s = 0.0
        FakeEvent.made.append(self)

    def record(self, stream: FakeStream) -> None:
        if stream.failure:
            raise RuntimeError(stream.failure)
        stream.recorded += 1
        self.stream = stream
        self._recorded_s = perf_counter()

    def query(self) -> bool:
        assert self.stream is not None
        return self.stream.has_passed()

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self._timed, "not an event that is timed"
        return (end._recorded_s - self._recorded_s) * 1e3

    def synchronize(self) -> None:
        assert self._blocking, "spinning takes a core"
        deadline_s = perf_counter() + 30.0
        while not self.query() and perf_counter() < deadline_s:
            sleep(1e-4)


def copy_at_once(destination: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
    destination[: source.nbytes].copy_(source)


class FakeDevice:
    """All of it, in the place of torch's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runtime = FakeRuntime()
        self.consumer = FakeStream(torch.device("cpu"))
        self.of_thread: dict[int, FakeStream] = {}
        monkeypatch.setattr(FakeStream, "made", [])
        monkeypatch.setattr(FakeEvent, "made", [])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self.runtime)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch.cuda, "set_stream", self._set_stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.consumer)
        raw = "_cuda_getCurrentRawStream"
        monkeypatch.setattr(torch._C, raw, lambda _: id(self.consumer), raising=False)
        monkeypatch.setattr(cuda, "copy_to_device", copy_at_once)

    def _set_stream(self, stream: FakeStream) -> None:
        self.of_thread[threading.get_ident()] = stream

    @property
    def copies(self) -> FakeStream:
        """The one stream that a transfer has made."""
        (stream,) = FakeStream.made
        return stream
