"""What a plan is expected to do, what else was considered, and what it was made from."""

from __future__ import annotations

import math

from moepack.records import added, record


@record
class Prediction:
    """What a plan is expected to do, in the fields that a run measures.

    ``band`` is the factor within which measured times are expected: [t / band, t * band].
    ``slow_bytes`` are all experts', of which a device's host may hold some
    (:class:`moepack.footprint.HostTier`); ``disk_bytes_per_token`` is what of the bytes over the
    link it has to read first.

    ``yardstick_s`` is how fast the processor was that the times are for
    (:mod:`moepack.yardstick`); 0 where that is not known. Of ``ttft_s`` and ``tpot_s`` the link has
    ``ttft_wait_s`` and ``tpot_wait_s``: they do not change with the processor.
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
    disk_bytes_per_token: float = 0.0
    yardstick_s: float = added(default=0.0)
    ttft_wait_s: float = added(default=0.0)
    tpot_wait_s: float = added(default=0.0)

    def __post_init__(self) -> None:
        if not 1 <= self.band < math.inf:
            raise ValueError(f"a band of {self.band}, expected a factor of 1 or more")
        for name in ("ttft_s", "tpot_s", "yardstick_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more seconds")
        for name in ("ttft_wait_s", "tpot_wait_s"):  # by rounding less than 0 in early plans
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected seconds")


@record
class Baseline:
    """The same model under a simpler strategy, or under a bound, in a prediction's fields.

    ``eligible``: this engine could run it as it is, within the budget; else ``why_not`` says what
    is in the way.
    """

    ttft_s: float
    tpot_s: float
    hit_rate: float
    link_bytes_per_token: float
    eligible: bool
    why_not: str = ""


@record
class PlannerReport:
    """How a plan was found.

    Attributes
    ----------
    seconds : float
        That planning took.
    chosen : str
        What won: ``optimised``, or the baseline that is the plan.
    gap_to_exact : float or None
        (exchange - exact) / exact of the separable objective; None where a layout was kept or no
        budget was left to divide.
    replayed_events : int
        (layer, token) events that were replayed to choose and to report.
    """

    seconds: float
    chosen: str
    gap_to_exact: float | None
    replayed_events: int


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
