"""The plan: Layout (which bytes exist), Placement (what happens with them), Prediction.

Arithmetic-free records and their JSON. Planning is in :mod:`moepack.planner`; how many bytes a
placement takes is in :mod:`moepack.budget`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from moepack import records
from moepack.errors import PlanError
from moepack.footprint import HostTier, MemoryBreakdown
from moepack.forecast import Baseline, PlannerReport, Prediction, Provenance
from moepack.layout import Layout
from moepack.records import added, record

PLAN_VERSION = 3

#: No machine has more; a file that says so is damaged.
MAX_THREADS = 4096

DeviceKind = Literal["cpu", "cuda"]

#: Which expert leaves a full cache; the rules are in :mod:`moepack.residency`.
Policy = Literal["lru", "lfu", "lcp", "lfu_decay", "pinned"]
POLICIES: tuple[Policy, ...] = ("lru", "lfu", "lcp", "lfu_decay", "pinned")

#: Those that know no layers.
POOL_POLICIES: tuple[Policy, ...] = ("lru", "lfu", "lcp", "pinned")

#: What of the predicted experts is fetched ahead: nothing, the bottoms of those whose top is
#: resident, or whatever each lacks.
PrefetchMode = Literal["off", "bottoms", "all"]
PREFETCH_MODES: tuple[PrefetchMode, ...] = ("off", "bottoms", "all")


def require_half_life(what: str, policy: Policy, half_life_tokens: float | None) -> None:
    """Refuse a half-life that a policy has no use for, and the lack of one that it needs.

    Raises
    ------
    ValueError
        Beginning with ``what``.
    """
    if policy != "lfu_decay":
        if half_life_tokens is not None:
            raise ValueError(
                f"{what} has a half-life of {half_life_tokens} tokens, expected none for {policy}"
            )
    elif half_life_tokens is None or not 1 <= half_life_tokens < math.inf:
        raise ValueError(
            f"{what} has a half-life of {half_life_tokens} tokens, expected 1 or more for {policy}"
        )


@record
class LayerPlacement:
    """What one layer keeps in the fast tier.

    Attributes
    ----------
    budget_bytes : int
        What its slots may take.
    top_slots, bottom_slots : int
        How many tops, and how many bottoms, stay. A bottom stays only where the budget holds
        more than all tops, or where there are no tops (split 0).
    policy : str
        Which expert leaves when another is admitted.
    hot : tuple of int
        Every expert of the layer, hottest first: the cache starts from its head.
    prefetch : str
        What of this layer's predicted experts is fetched while the layer before it runs.
    prefetch_depth : int
        How many predicted experts, best first, are looked at for that; 0 where it is off.
    half_life_tokens : float or None
        After how many tokens an activation counts half, where the policy is ``lfu_decay``.
    class_slots : tuple of int
        Of a mixed layer: how many of its slots are for the experts of each encoding, in the order
        of :attr:`LayerLayout.classes`; experts of one encoding compete for those. Empty where all
        experts are stored alike, and it may be where none has a slot or all do.
    """

    layer: int
    budget_bytes: int
    top_slots: int
    bottom_slots: int
    policy: Policy
    hot: tuple[int, ...]
    prefetch: PrefetchMode = "off"
    prefetch_depth: int = 0
    half_life_tokens: float | None = None
    class_slots: tuple[int, ...] = added(default=())

    def __post_init__(self) -> None:
        experts = len(self.hot)
        if sorted(self.hot) != list(range(experts)):
            raise ValueError(f"hot of layer {self.layer} is no ranking of all its experts")
        if not (0 <= self.top_slots <= experts and 0 <= self.bottom_slots <= experts):
            raise ValueError(
                f"layer {self.layer} has slots for {self.top_slots} tops and {self.bottom_slots} "
                f"bottoms, expected 0 to {experts} of each"
            )
        if self.budget_bytes < 0 or self.prefetch_depth < 0:
            raise ValueError(f"a size or depth of layer {self.layer} is negative")
        classes = self.class_slots
        if classes and (min(classes) < 0 or sum(classes) != self.top_slots + self.bottom_slots):
            raise ValueError(
                f"layer {self.layer} has {classes} slots for its encodings, expected "
                f"{self.top_slots + self.bottom_slots} of them in all"
            )
        if (self.prefetch == "off") != (self.prefetch_depth == 0):
            raise ValueError(
                f"layer {self.layer} has prefetch {self.prefetch} to a depth of "
                f"{self.prefetch_depth}, expected a depth of 0 where it is off, else 1 or more"
            )
        require_half_life(f"layer {self.layer}", self.policy, self.half_life_tokens)


@record
class SharedPool:
    """Slots for whole experts that all layers share, instead of slots of each layer.

    Possible where no layer is cut and all experts are of one size. The policy is none whose
    half-life is each layer's own.
    """

    slots: int
    policy: Policy

    def __post_init__(self) -> None:
        if self.policy not in POOL_POLICIES:
            raise ValueError(
                f"a shared pool is {self.policy}, expected one of {', '.join(POOL_POLICIES)}"
            )
        if self.slots < 1:
            raise ValueError(f"a shared pool of {self.slots} slots, expected 1 or more")


@record
class OnMiss:
    """What is fetched for an expert that is missing when a token is decoded, by what it counts.

    A token's experts are taken in descending order of their weights, and ``s`` is the share of all
    their weights that those before one have: 0 for the first. Up to ``exact_up_to`` the expert
    itself is fetched, up to ``low_up_to`` its low copy; beyond, it is left out. Rule and defaults
    are HOBBIT's (arXiv 2411.01433: T1 and T2).
    """

    exact_up_to: float = 0.6
    low_up_to: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.exact_up_to <= self.low_up_to <= 1:
            raise ValueError(
                f"thresholds of a miss {self.exact_up_to} and {self.low_up_to}, expected "
                "0 <= T1 <= T2 <= 1"
            )


@record
class Placement:
    """What happens with the bytes of a layout on one machine. May change without repacking.

    Attributes
    ----------
    ram_budget_bytes : int or None
        Bound on the whole process in host memory; None: the machine's limit.
    threads : int
        That the processor's kernels use; like the layout, it decides the bits of a result.
    readers : int
        Reads from the disk in flight at once.
    pool : SharedPool or None
        Slots that all layers share; their own are then 0.
    host : HostTier or None
        What RAM holds behind a device; None where the processor computes.
    on_miss : OnMiss or None
        Which missing experts are replaced by their low copies, or left out; None: none.
    """

    device: DeviceKind
    fast_budget_bytes: int
    staging_experts: int
    context_tokens: int
    prompt_tokens: int
    new_tokens: int
    memory: MemoryBreakdown
    layers: tuple[LayerPlacement, ...]
    ram_budget_bytes: int | None = None
    threads: int = 1
    readers: int = 4
    pool: SharedPool | None = None
    host: HostTier | None = None
    on_miss: OnMiss | None = added(default=None)

    def __post_init__(self) -> None:
        counts = {
            "staging_experts": self.staging_experts,
            "context_tokens": self.context_tokens,
            "threads": self.threads,
            "readers": self.readers,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}, expected 1 or more")
        if self.threads > MAX_THREADS or self.readers > MAX_THREADS:
            raise ValueError(
                f"{self.threads} threads and {self.readers} readers, expected {MAX_THREADS} at most"
            )
        if min(self.prompt_tokens, self.new_tokens, self.fast_budget_bytes) < 0:
            raise ValueError("a number of tokens, or the budget, is negative")
        if self.pool is not None and any(p.top_slots or p.bottom_slots for p in self.layers):
            raise ValueError("there is a shared pool and a layer has slots of its own")


@record
class EngineCapabilities:
    """What an engine can execute; a planner chooses among this and nothing else.

    Attributes
    ----------
    prefetch : tuple of str
        Modes of fetching ahead.
    max_prefetch_depth : int
        Predicted experts that it can fetch ahead; 0 where it fetches on demand only.
    shared_pool : bool
        Whether it has slots that all layers share.
    mixed_layers : bool
        Whether experts of one layer may be stored in different encodings.
    low_copies : tuple of str
        Kinds of devices on which it takes low copies of experts that are missing.
    as_ready : bool
        Whether it computes what is resident while the rest arrives. False: experts are computed in
        one fixed order, and a missing one holds up those behind it.
    encodings : tuple of str
        In which experts may be stored for it to compute with them.
    trunks : tuple of str
        What the trunk may be stored in (:mod:`moepack.trunk`).
    """

    policies: tuple[Policy, ...]
    devices: tuple[DeviceKind, ...]
    prefetch: tuple[PrefetchMode, ...] = ("off",)
    max_prefetch_depth: int = 0
    shared_pool: bool = False
    as_ready: bool = False
    encodings: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    mixed_layers: bool = False
    low_copies: tuple[DeviceKind, ...] = ()
    trunks: tuple[str, ...] = ("",)


@record
class Plan:
    """Layout, placement and prediction for one model."""

    version: int
    model_name: str
    model_digest: str
    max_context_tokens: int
    layout: Layout
    placement: Placement
    prediction: Prediction
    baselines: dict[str, Baseline]
    provenance: Provenance
    planner: PlannerReport
    # Planned for an engine that can do more than the one that is here: not to be run.
    assumed_engine: bool = False
    # (bytes per second, latency in seconds) of a throttled link that the plan was priced for.
    link: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        cut = [layer.layer for layer in self.layout.layers]
        placed = [layer.layer for layer in self.placement.layers]
        if cut != placed:
            raise ValueError(f"the layout is of layers {cut}, the placement of {placed}")
        if self.placement.on_miss is not None and not self.layout.low:
            raise ValueError(
                "the placement replaces missing experts by low copies, the layout has none"
            )
        if self.link is not None and not (self.link[0] > 0 and self.link[1] >= 0):
            raise ValueError(f"a link of {self.link[0]} bytes/s and {self.link[1]} s")


def load_plan(path: Path) -> Plan:
    """Read a plan.

    Raises
    ------
    PlanError
        When the file cannot be read, is not a plan, or is of another version.
    """
    try:
        text = path.read_bytes()
    except OSError as failure:
        raise PlanError(
            f"{path}: {failure.strerror}; expected a plan made by moepack plan"
        ) from None
    version = records.Version(PLAN_VERSION, "plan again")
    return records.decode(Plan, text, what=f"plan {path}", error=PlanError, version=version)
