"""The routed experts of some layers, set up to be measured: all resident, or none."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moepack.atomic import output_error
from moepack.budget import layer_segment
from moepack.hardware import HardwareProfile
from moepack.layer_walk import ExpertPass, Experts
from moepack.layout import Layout
from moepack.layouts import layer_layout
from moepack.plan import LayerPlacement, Policy
from moepack.segments import SegmentId
from moepack.timing import Stopwatch
from moepack.units import MIB

if TYPE_CHECKING:
    import torch
    from moepack_runtime.checkpoint_store import ExpertSource
    from moepack_runtime.engine import Engine
    from moepack_runtime.experts import ExpertMemory
    from moepack_runtime.store import SegmentStore

    from moepack.model_spec import ModelSpec

#: Walks that go before one whose experts are fetched ahead. Threads that have slept while others
#: were measured, and what these have driven out of the caches, would count for what they are not
#: in a run, where one token follows the other.
LEAD_IN = 2

# Experts that are walked over: more than a processor's cache keeps, if the layers have as many.
_WALKED_BYTES = 64 * MIB


class Probe(NamedTuple):
    """What is measured, and where."""

    source: ExpertSource
    engine: Engine
    hardware: HardwareProfile
    scratch: Path


class Walked(NamedTuple):
    """Which layers of a kind are walked over, and how many experts of each are there."""

    numbers: tuple[int, ...]
    experts: int


def walked(probe: Probe, numbers: Sequence[int]) -> Walked:
    """As many layers, and then experts, as it takes to find nothing in a processor's cache.

    At least the experts of one token in one layer.
    """
    spec = probe.engine.spec
    moe = spec.moe(numbers[0])
    least = min(moe.num_experts, max(2, moe.top_k))
    fitting = max(least, _WALKED_BYTES // spec.expert_bytes(numbers[0]))
    layers = min(len(numbers), fitting // least)
    return Walked(tuple(numbers[:layers]), min(moe.num_experts, fitting // layers))


@contextmanager
def resident_experts(
    probe: Probe, those: Walked, ratio: float, encoding: str | None = None
) -> Iterator[ExpertPass]:
    """The expert half of some layers, cut at ``ratio``: every expert that is used is resident.

    Parameters
    ----------
    encoding
        A quantised one, for experts that are made up; None: those of the model.
    """
    from moepack_runtime.checkpoint_store import CheckpointStore
    from moepack_runtime.measuring_stores import MadeUpStore

    spec = probe.engine.spec
    layers = tuple(layer_layout(spec, number, ratio, encoding) for number in those.numbers)
    layout = Layout(spec.digest, layers)
    store: SegmentStore
    if encoding is None:
        store = CheckpointStore(probe.source, spec, layout)
    else:
        store = MadeUpStore(spec, layout)
    with _open(probe, layout, store, slots=those.experts, keeps=0) as passes:
        yield passes.run


class Missing(NamedTuple):
    """Passes over a layer with all experts of a token missing, and with one of them.

    ``every`` and ``one`` fetch them on demand, ``every_ahead`` and ``one_ahead`` while the layer
    before computes. ``read_s`` reads one expert and says how long that took, where experts are so
    large that a link carries one at a time.
    """

    every: Experts
    one: Experts
    every_ahead: Experts
    one_ahead: Experts
    read_s: Callable[[], float] | None


@contextmanager
def missing_experts(probe: Probe, those: Walked) -> Iterator[Missing]:
    """The expert half of some layers over a file: a transfer for each missing expert.

    As in a run, a transfer brings what was not there for long, moves into a slot, and something
    else leaves for it.
    """
    from moepack_runtime.measuring_stores import ScratchStore

    spec, number = probe.engine.spec, those.numbers[0]
    cuts = tuple(layer_layout(spec, each, 1.0) for each in those.numbers)
    shape = layer_segment(spec, cuts[0], "top")
    assert shape is not None
    moe = spec.moe(number)
    with tempfile.TemporaryDirectory(dir=probe.scratch, prefix=".probe.") as folder:
        path = Path(folder) / "experts"
        try:
            store = ScratchStore(path, probe.source, those.numbers, shape, those.experts)
        except OSError as failure:
            raise output_error(path, failure) from failure
        layout = Layout(spec.digest, cuts)
        there = min(moe.top_k, moe.num_experts) - 1
        more = moe.num_experts > moe.top_k  # else nothing could leave
        with ExitStack() as stack:

            def passes(slots: int, keeps: int) -> _Passes:
                opened = _open(
                    probe, layout, store, slots=slots, keeps=keeps, moves=more, ahead=True
                )
                return stack.enter_context(opened)

            every = passes(min(moe.top_k, moe.num_experts - moe.top_k), 0)
            one = passes(there + more, there)
            alone = probe.hardware.device == "cpu"
            alone &= probe.hardware.disk.readers_for(shape.stored_bytes) == 1
            reads = _reader(store, number, shape.stored_bytes, those.experts) if alone else None
            yield Missing(
                Experts(every.run, moe.top_k),
                Experts(one.run, moe.top_k),
                every.ahead(moe.top_k),
                one.ahead(moe.top_k),
                reads,
            )


def _reader(
    store: SegmentStore, number: int, stored_bytes: int, experts: int
) -> Callable[[], float]:
    """Reads one expert after the other, in the calling thread: seconds of each."""
    from moepack_runtime.direct_io import allocate
    from moepack_runtime.store import CheckMode

    room = allocate(stored_bytes).numpy()
    turn = itertools.cycle(range(experts))

    def read_s() -> float:
        stopwatch = Stopwatch()
        store.read_into(SegmentId(number, next(turn), "top"), room, CheckMode.NEVER)
        return stopwatch.lap()

    return read_s


class _Passes:
    """Passes in which all tokens choose the same experts: the next ones every time.

    Parameters
    ----------
    keeps
        The first so many experts are resident and chosen every time, beside others that are not.
    among
        Of each layer, in their order, how many experts take turns.
    """

    def __init__(
        self, spec: ModelSpec, memory: ExpertMemory, keeps: int, among: Mapping[int, int]
    ) -> None:
        self._spec, self._memory = spec, memory
        self._keeps, self._among = keeps, among
        numbers = tuple(among)
        self._following = dict(zip(numbers, (*numbers[1:], numbers[0]), strict=True))
        self._turns: Counter[int] = Counter()
        self._asked: dict[int, list[int]] = {}
        self._weights: dict[tuple[int, int], torch.Tensor] = {}  # by tokens, and experts of each

    def ahead(self, each: int) -> Experts:
        """A walk whose experts are asked for while the layer before computes, as in a run."""

        def begin() -> None:
            self._ask(next(iter(self._among)), each)
            self._memory.ahead.push()

        def end() -> None:
            self._memory.come_to_rest()
            for number in self._asked:  # nobody has had them: it is still their turn
                self._turns[number] -= each - self._keeps
            self._asked.clear()

        return Experts(self._run_ahead, each, LEAD_IN, begin, end)

    def run(self, number: int, hidden: torch.Tensor, count: int) -> torch.Tensor:
        """One layer, whose experts are fetched on demand."""
        return self._run(number, hidden, self._next(number, count), None)

    def _run_ahead(self, number: int, hidden: torch.Tensor, count: int) -> torch.Tensor:
        del count  # is known since they were asked for
        return self._run(number, hidden, self._asked.pop(number), self._following[number])

    def _run(
        self, number: int, hidden: torch.Tensor, chosen: Sequence[int], following: int | None
    ) -> torch.Tensor:
        import torch
        from moepack_runtime.moe import Block, join_experts
        from moepack_runtime.router import Routing

        tokens, count = len(hidden), len(chosen)
        # A walk has waited for its router's ids already: no second copy between host and device.
        # Those of one token are needed on the host alone.
        place = hidden.device if tokens > 1 else torch.device("cpu")
        ids = torch.tensor(chosen, device=place).expand(tokens, count)
        weights = self._weights.get((tokens, count))
        if weights is None:
            weights = torch.full(ids.shape, 1 / count, device=hidden.device)
            self._weights[tokens, count] = weights
        joined = torch.zeros_like(hidden)
        block = Block(hidden, Routing(ids, weights))
        layer_pass = self._memory.step(number, [list(chosen)] * tokens)
        if following is not None:
            self._ask(following, count)
            layer_pass.fetch_ahead()
        join_experts(self._spec.moe(number), [block], [joined], [None], layer_pass)
        layer_pass.report()
        return joined

    def _next(self, number: int, count: int) -> list[int]:
        turn, keeps = self._turns[number], self._keeps
        among = self._among[number] - keeps
        more = [keeps + (turn + place) % among for place in range(count - keeps)]
        self._turns[number] += len(more)
        return sorted((*range(keeps), *more))

    def _ask(self, number: int, count: int) -> None:
        from moepack_runtime.ahead import Guess

        chosen = self._asked[number] = self._next(number, count)
        self._memory.guess(number, Guess(chosen, "all", len(chosen), None))


@contextmanager
def _open(
    probe: Probe,
    layout: Layout,
    store: SegmentStore,
    *,
    slots: int,
    keeps: int,
    moves: bool = False,
    ahead: bool = False,
) -> Iterator[_Passes]:
    """Passes over some layers.

    Parameters
    ----------
    slots
        Of each layer; where nothing ever misses, the experts are among those that they hold.
    keeps
        See :class:`_Passes`.
    moves
        What is fetched stays until something else is. Otherwise it is dropped again.
    ahead
        There are frames for the next layer's experts as well.
    """
    from moepack_runtime.experts import ExpertMemory
    from moepack_runtime.loading import open_transfer

    spec = probe.engine.spec
    places, among = [], {}
    for cut in layout.layers:
        experts = spec.moe(cut.layer).num_experts
        policy: Policy = "lru" if moves else "pinned"
        places.append(LayerPlacement(cut.layer, 0, slots, slots, policy, tuple(range(experts))))
        among[cut.layer] = experts if moves or keeps or not slots else slots
    staging = max(spec.moe(cut.layer).top_k for cut in layout.layers) * (1 + ahead)
    with open_transfer(spec, layout, store, probe.hardware.device) as transfer:
        memory = ExpertMemory(spec, layout, places, staging_experts=staging, transfer=transfer)
        memory.warm()
        yield _Passes(spec, memory, keeps, among)
