"""An engine on a clock that moves only while something is computed, or waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from moepack_runtime import layer_pass, stats
from moepack_runtime.observers import PassFound, Purpose
from moepack_runtime.predict import Predictor
from moepack_runtime.sampling import Sampler
from moepack_runtime.transfer import LinkStatistics, Priority, Ticket, Transfer, throttled
from typing_extensions import override

from moepack.layout import Layout
from moepack.segments import SegmentId


class Clock:
    """Stands still unless somebody computes or sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def read(self) -> float:
        return self.now_s

    def sleep_until(self, deadline_s: float) -> None:
        self.now_s = max(self.now_s, deadline_s)


def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for throttled links, and for what an engine measures."""
    clock = Clock()
    for module in (throttled, layer_pass, stats):
        monkeypatch.setattr(module, "perf_counter", clock.read)
    monkeypatch.setattr(throttled, "_sleep_until", clock.sleep_until)
    return clock


class Instant(Transfer):
    """A transfer that has brought what it was asked for as soon as anybody looks."""

    def __init__(self, inner: Transfer) -> None:
        self._inner = inner

    @override
    def allocate(self, size_bytes: int) -> torch.Tensor:
        return self._inner.allocate(size_bytes)

    @override
    def start(
        self,
        segment: SegmentId,
        destination: torch.Tensor,
        priority: Priority = Priority.DEMAND,
    ) -> Ticket:
        return self._inner.start(segment, destination, priority)

    @override
    def wait(self, ticket: Ticket) -> None:
        self._inner.wait(ticket)

    @override
    def is_ready(self, ticket: Ticket) -> bool:
        self._inner.wait(ticket)
        return True

    @override
    def cancel(self, ticket: Ticket) -> bool:
        return self._inner.cancel(ticket)

    @property
    @override
    def statistics(self) -> LinkStatistics:
        return self._inner.statistics._replace(busy_s=0.0)

    @override
    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True)
class Times:
    """Seconds of one token: of each layer, of one expert, of the head.

    Guessing the next layer's experts takes what its router does.
    """

    attention_s: float
    router_s: float
    shared_s: float
    expert_s: float
    head_s: float


class TimedCompute:
    """A timeline that moves the clock by what an engine has computed."""

    def __init__(self, clock: Clock, times: Times, layout: Layout) -> None:
        self._clock = clock
        self._slices = {"attention": times.attention_s + times.router_s, "shared": times.shared_s}
        self._expert_s = times.expert_s
        self._ratios = {cut.layer: cut.split_ratio for cut in layout.layers}

    def computed(self, what: str, layer: int, begin_s: float, end_s: float) -> None:  # noqa: ARG002
        self._clock.now_s += self._slices.get(what, 0.0)

    def segment(self, segment: SegmentId, begin_s: float, end_s: float) -> None:  # noqa: ARG002
        top = self._ratios[segment.layer]
        self._clock.now_s += self._expert_s * (top if segment.part == "top" else 1.0 - top)

    def fetched(self, ticket: Ticket, purpose: Purpose) -> None: ...

    def waited(self, segment: SegmentId, begin_s: float, end_s: float) -> None: ...


class TimedGuesses(Predictor):
    """Guesses what it was told, each time it is asked for a layer the next token's.

    Parameters
    ----------
    rankings
        By layer, int [tokens, ranks]. The first layer is never asked for the first token's.
    """

    def __init__(
        self, clock: Clock, seconds: float, rankings: dict[int, npt.NDArray[np.uint16]]
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._rankings = rankings
        self._asked = dict.fromkeys(rankings, 0)
        self._asked[min(rankings)] = 1

    @override
    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
        token = self._asked[target]
        self._asked[target] += 1
        self._clock.now_s += self._seconds
        ranking = self._rankings[target][min(token, len(self._rankings[target]) - 1)]
        return torch.from_numpy(ranking[None, :depth].astype(np.int64))


class TimedScript(Sampler):
    """Draws given tokens, whatever the logits."""

    def __init__(self, clock: Clock, seconds: float, tokens: Sequence[int]) -> None:
        super().__init__()
        self._clock = clock
        self._seconds = seconds
        self._tokens = iter(tokens)

    @override
    def draw(self, logits: torch.Tensor) -> int:
        self._clock.now_s += self._seconds
        return next(self._tokens)


class EveryPass:
    """What every pass over a layer found, in their order."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.found: list[PassFound] = []

    def passed(self, layer: int, tokens: Sequence[Sequence[int]], found: PassFound) -> None:  # noqa: ARG002
        (token,) = tokens
        self.tokens.append(list(token))
        self.found.append(found)
