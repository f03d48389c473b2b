"""How fast this processor computes just now: a little work that is timed again and again.

A processor whose cores are shared with strangers (a virtual machine's neighbours), or that grows
hot, computes at another speed from one second to the next: by half and more, and no counter says
so. What a profile measures holds for the speed it had meanwhile. So whoever measures times the
yardstick beside what is measured, and whoever compares two measurements knows how much of what
differs is the processor's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from statistics import fmean, median
from typing import NamedTuple, Protocol, TypeVar

from moepack.timing import Stopwatch
from moepack.units import MIB

# Products of an expert's kind, [tokens, hidden] by [neurons, hidden], over weights that lie beyond
# the cache of one core; and steps of the interpreter, which is the rest of a small model's time.
_TOKENS, _HIDDEN, _NEURONS = 64, 128, 256
_WEIGHTS_BYTES = 8 * MIB
_PRODUCTS = 2
_STEPS = 2000

# Of so many the median counts: something else may have its turn during one of them.
_REPEATS = 3


T = TypeVar("T")


class Yardstick(Protocol):
    """Anything that says how long the same little work takes now."""

    def read_s(self) -> float:
        """Seconds."""


class MixedYardstick:
    """A few products of bfloat16 matrices and some steps of the interpreter, about equally long.

    All of it runs on the calling thread, whatever number torch computes with: two threads of one
    product wait for each other, and so for whatever else the process does just then (a reader, what
    the last product left spinning), which is not how fast the processor is. Peak memory: 8 MiB.
    """

    def __init__(self) -> None:
        import torch

        count = _WEIGHTS_BYTES // (2 * _NEURONS * _HIDDEN)
        weights = torch.full((count, _NEURONS, _HIDDEN), 0.5, dtype=torch.bfloat16)
        self._turn = itertools.cycle(weights.unbind())
        self._rows = torch.ones(_TOKENS, _HIDDEN, dtype=torch.bfloat16)
        self.read_s()  # the first product picks its kernel

    def read_s(self) -> float:
        """Seconds of the work once."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            stopwatch = Stopwatch()
            return median(self._once_s(stopwatch) for _ in range(_REPEATS))
        finally:
            torch.set_num_threads(threads)

    def _once_s(self, stopwatch: Stopwatch) -> float:
        import torch.nn.functional as F

        total = 0
        for step in range(_STEPS):
            total += step * step
        for weight in itertools.islice(self._turn, _PRODUCTS):
            F.linear(self._rows, weight)
        return stopwatch.lap()


class SteadyPace:
    """Takes what is measured while a processor's speed changes to one speed: its mean.

    Parameters
    ----------
    yardstick
        None: of nothing is known how fast it is, and nothing is changed.
    """

    def __init__(self, yardstick: Yardstick | None) -> None:
        self._yardstick = yardstick
        self._last_s = 0.0 if yardstick is None else yardstick.read_s()
        self._first_s = self._last_s
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Something is about to be measured."""
        if self._yardstick is not None:
            self._last_s = self._yardstick.read_s()

    def slowness(self) -> float:
        """How many times as long as at first things took since the last call, or the beginning."""
        if self._yardstick is None:
            return 1.0
        before_s, self._last_s = self._last_s, self._yardstick.read_s()
        self._seconds.append((before_s + self._last_s) / 2)
        return self._seconds[-1] / self._first_s

    @property
    def first_s(self) -> float:
        """What the yardstick took at first; 0 without one."""
        return self._first_s

    @property
    def mean_slowness(self) -> float:
        """Of all that was measured."""
        return fmean(self._seconds) / self._first_s if self._seconds else 1.0


class Pace(NamedTuple):
    """What the yardstick took beside a measurement, in seconds.

    Attributes
    ----------
    prompt_s, token_s : float
        Beside the prompts, and beside the tokens decoded: means.
    """

    prompt_s: float
    token_s: float


class Slowness(NamedTuple):
    """How many times as long the processor took as when it was profiled.

    Attributes
    ----------
    prompt, token : float
        Beside the prompts, and beside the tokens decoded.
    """

    prompt: float
    token: float


class PaceKeeper:
    """Reads a yardstick between the tokens of a generation, where nobody's clock runs."""

    # So seldom that it takes a fiftieth of the time of small models' tokens, and so often that
    # what changes from second to second is seen.
    _EVERY_TOKENS = 4

    def __init__(self, yardstick: Yardstick) -> None:
        self._yardstick = yardstick
        self._prompts_s: list[float] = []
        self._tokens_s: list[float] = []

    def beside(self, tokens: Iterable[T]) -> Iterator[T]:
        """The tokens of a generation, as they come; its prompt runs when the first is asked for."""
        self._prompts_s.append(self._yardstick.read_s())
        for count, token in enumerate(tokens, 1):
            if count == 1:
                self._prompts_s.append(self._yardstick.read_s())
                self._tokens_s.append(self._prompts_s[-1])
            elif count % self._EVERY_TOKENS == 0:
                self._tokens_s.append(self._yardstick.read_s())
            yield token

    def pace(self) -> Pace:
        """The means, once a generation has been measured."""
        return Pace(fmean(self._prompts_s), fmean(self._tokens_s))
