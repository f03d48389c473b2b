"""The plan: Layout (which bytes exist), Placement (what happens with them), Prediction.

Arithmetic-free records and their JSON. Planning is in :mod:`moepack.planner`; how many bytes a
placement takes is in :mod:`moepack.budget`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moepack import records
from moepack.errors import PlanError
from moepack.records import record

PLAN_VERSION = 1

DeviceKind = Literal["cpu", "cuda"]
Policy = Literal["lru"]


@record
class LayerLayout:
    """How the experts of one layer are cut: ``split`` neurons of ``width`` go to the top.

    ``encoding`` is the dtype of the segments, as safetensors spells it.
    """

    layer: int
    split: int
    width: int
    granularity: int
    encoding: str

    @property
    def split_ratio(self) -> float:
        """The fraction in the top segment, theta."""
        return self.split / self.width


@record
class Layout:
    """Which bytes a pack holds. Equal layouts of one model give equal packs.

    ``prefill_block_tokens`` belongs here: the shape of a batch decides the bits of its result.
    """

    model_digest: str
    layers: tuple[LayerLayout, ...]
    prefill_block_tokens: int = 512

    @property
    def digest(self) -> str:
        """Identity of the layout, lower-case hex."""
        return records.digest(self)


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
    prefetch_depth : int
        How many predicted experts are fetched ahead; 0 for none.
    """

    layer: int
    budget_bytes: int
    top_slots: int
    bottom_slots: int
    policy: Policy
    hot: tuple[int, ...]
    prefetch_depth: int = 0


@record
class MemoryBreakdown:
    """Every byte of the fast tier that a placement takes."""

    trunk_bytes: int
    kv_bytes: int
    hidden_bytes: int
    workspace_bytes: int
    staging_bytes: int
    slots_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum: what must not exceed the budget."""
        return (
            self.trunk_bytes
            + self.kv_bytes
            + self.hidden_bytes
            + self.workspace_bytes
            + self.staging_bytes
            + self.slots_bytes
        )


@record
class Placement:
    """What happens with the bytes of a layout on one machine. May change without repacking.

    ``threads`` is the number that the processor's kernels use; like the layout, it decides the
    bits of a result.
    """

    device: DeviceKind
    fast_budget_bytes: int
    staging_experts: int
    context_tokens: int
    prompt_tokens: int
    new_tokens: int
    memory: MemoryBreakdown
    layers: tuple[LayerPlacement, ...]
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected 1 or more")


@record
class EngineCapabilities:
    """What an engine can execute; a planner chooses among this and nothing else.

    Attributes
    ----------
    max_prefetch_depth : int
        Predicted experts that it can fetch ahead; 0 where it fetches on demand only.
    """

    policies: tuple[Policy, ...]
    devices: tuple[DeviceKind, ...]
    max_prefetch_depth: int


@record
class Prediction:
    """What a plan is expected to do, in the fields that a run measures.

    ``band`` is the factor within which measured times are expected: [t / band, t * band].
    """

    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    hit_rate: float
    ready_rate: float
    link_bytes_per_token: float
    fast_bytes: int
    slow_bytes: int
    band: float


@record
class Baseline:
    """The same model under a simpler strategy. ``eligible``: it could be run as it is."""

    ttft_s: float
    tpot_s: float
    eligible: bool


@record
class Provenance:
    """What a plan was made from.

    ``assumptions`` names, in sentences, everything that was assumed rather than measured.
    """

    hardware: str
    hardware_is_this_machine: bool
    compute: str
    routing: str
    assumptions: tuple[str, ...] = ()


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
    planner_s: float
    # (bytes per second, latency in seconds) of a throttled link that the plan was priced for.
    link: tuple[float, float] | None = None


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
    plan = records.decode(Plan, text, what=f"plan {path}", error=PlanError)
    if plan.version != PLAN_VERSION:
        raise PlanError(
            f"plan {path}: version {plan.version}, this moepack reads {PLAN_VERSION}; plan again"
        )
    return plan
