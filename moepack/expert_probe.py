"""The routed experts of some layers, set up to be measured: all resident, or none."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moepack.atomic import output_error
from moepack.budget import layer_segment
from moepack.cost import Held, LayerTimes, Parts
from moepack.decode_cost import decode_layer_s
from moepack.hardware import HardwareProfile
from moepack.layer_walk import ExpertPass
from moepack.layout import Layout
from moepack.layouts import layer_layout
from moepack.plan import LayerPlacement, Policy
from moepack.segments import SegmentId
from moepack.timing import Stopwatch
from moepack.units import MIB

if TYPE_CHECKING:
    import torch
    from moepack_runtime.engine import Engine
    from moepack_runtime.store import ExpertSource, SegmentStore

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
    from moepack_runtime.measuring_stores import MadeUpStore
    from moepack_runtime.store import CheckpointStore

    spec = probe.engine.spec
    layers = tuple(layer_layout(spec, number, ratio, encoding) for number in those.numbers)
    layout = Layout(spec.digest, layers)
    store: SegmentStore
    if encoding is None:
        store = CheckpointStore(probe.source, spec, layout)
    else:
        store = MadeUpStore(spec, layout)
    with _open(probe, layout, store, slots=those.experts, keeps=0) as run:
        yield run


class Missing(NamedTuple):
    """Passes over a layer with all experts of a token missing, and with one of them.

    ``read_s`` reads one expert and says how long that took, where experts are so large that a link
    carries one at a time.
    """

    every: ExpertPass
    one: ExpertPass
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
            every = stack.enter_context(
                _open(
                    probe,
                    layout,
                    store,
                    slots=min(moe.top_k, moe.num_experts - moe.top_k),
                    keeps=0,
                    moves=more,
                )
            )
            one = stack.enter_context(
                _open(probe, layout, store, slots=there + more, keeps=there, moves=more)
            )
            alone = probe.hardware.device == "cpu"
            alone &= probe.hardware.disk.readers_for(shape.stored_bytes) == 1
            reads = _reader(store, number, shape.stored_bytes, those.experts) if alone else None
            yield Missing(every, one, reads)


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


@contextmanager
def _open(
    probe: Probe,
    layout: Layout,
    store: SegmentStore,
    *,
    slots: int,
    keeps: int,
    moves: bool = False,
) -> Iterator[ExpertPass]:
    """Passes in which all tokens choose the same experts: the next ones every time.

    Parameters
    ----------
    slots
        Of each layer; where nothing ever misses, the experts are among those that they hold.
    keeps
        The first so many experts are resident and chosen every time, beside others that are not.
    moves
        What is fetched stays until something else is. Otherwise it is dropped again.
    """
    import torch
    from moepack_runtime.experts import ExpertMemory
    from moepack_runtime.loading import open_transfer
    from moepack_runtime.moe import Block, add_experts
    from moepack_runtime.router import Routing

    spec = probe.engine.spec
    places = []
    for cut in layout.layers:
        everyone = tuple(range(spec.moe(cut.layer).num_experts))
        policy: Policy = "lru" if moves else "pinned"
        places.append(LayerPlacement(cut.layer, 0, slots, slots, policy, everyone))
    staging = max(spec.moe(cut.layer).top_k for cut in layout.layers)
    with open_transfer(spec, layout, store, probe.hardware.device) as transfer:
        memory = ExpertMemory(spec, layout, places, staging_experts=staging, transfer=transfer)
        memory.warm()
        turns: Counter[int] = Counter()

        def run(number: int, hidden: torch.Tensor, count: int) -> torch.Tensor:
            among = spec.moe(number).num_experts if moves or keeps or not slots else slots
            turn = turns[number]
            more = [keeps + (turn + place) % (among - keeps) for place in range(count - keeps)]
            turns[number] += len(more)
            chosen = sorted((*range(keeps), *more))
            ids = torch.tensor(chosen, device=hidden.device).expand(len(hidden), count)
            weights = torch.full(ids.shape, 1 / count, device=hidden.device)
            total = torch.zeros_like(hidden, dtype=torch.float32)
            block = Block(hidden, Routing(ids, weights))
            layer_pass = memory.step(number, ids.tolist())
            add_experts(spec.moe(number), [block], [total], layer_pass)
            layer_pass.report()
            return total.to(hidden.dtype)

        yield run


def priced_in_order_s(link_s: float, expert_s: float, *, there: int, missing: int) -> float:
    """What the replay says of a prompt's experts: first those that are there, then the others."""
    now_s = there * expert_s
    for number in range(1, missing + 1):
        now_s = max(now_s, number * link_s) + expert_s
    return now_s


def priced_missing_s(
    probe: Probe,
    number: int,
    fixed_s: float,
    expert_s: float,
    *,
    missing: int,
    read_s: float | None = None,
) -> float:
    """What the cost model says of one token's pass of which so many experts are missing.

    Parameters
    ----------
    read_s
        What reading one took meanwhile; None: as in the hardware profile. Disks that are shared
        change from minute to minute, and that is not the computing thread's time.
    """
    spec = probe.engine.spec
    moe = spec.moe(number)
    shape = layer_segment(spec, layer_layout(spec, number, 1.0), "top")
    assert shape is not None
    there = moe.top_k - missing
    priced_s = decode_layer_s(
        # What is there is computed while the first of the others comes, as a shared expert is.
        LayerTimes(fixed_s, expert_s, shared_s=there * expert_s),
        missing,
        Parts(read_s or probe.hardware.link_seconds(shape.stored_bytes), 0.0, 1.0),
        Held(top=0.0, bottom=1.0),
        staging_experts=moe.top_k,
        as_ready=True,
    )
    return float(priced_s.item())
