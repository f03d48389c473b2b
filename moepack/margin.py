"""How a plan stands against the strategies that it was chosen from.

Everything here is told on *test*, which nothing was chosen by: a margin may be lost there.
"""

from __future__ import annotations

from moepack.forecast import Baseline, Prediction
from moepack.plan import Plan
from moepack.records import record

#: Strategies that keep whole experts and could be run as they are.
WHOLE_EXPERT_CACHES = (
    "lru",
    "lfu",
    "lcp",
    "lru_prefetch",
    "lcp_prefetch",
    "mixtral_offloading",
    "adapmoe",
    "moe_infinity",
    "pooled",
)

#: What no plan can do: told beside the others, never to be run.
BOUNDS = ("belady", "resident")


@record
class Margin:
    """A plan beside the best strategy that could be run in its place.

    Attributes
    ----------
    baseline : str
        The strategy.
    speedup : float
        The time of a generation under it over that under the plan: below 1 the plan loses.
    """

    baseline: str
    speedup: float


def generation_s(figures: Prediction | Baseline, new_tokens: int) -> float:
    """What is minimised: ``TTFT + (new tokens - 1) * TPOT``."""
    return figures.ttft_s + max(0, new_tokens - 1) * figures.tpot_s


def best_baseline(plan: Plan, names: tuple[str, ...] | None = None) -> str | None:
    """The fastest strategy that this engine could run, of all or of some; None without any."""
    rivals = {
        name: generation_s(baseline, plan.placement.new_tokens)
        for name, baseline in plan.baselines.items()
        if baseline.eligible and name not in BOUNDS and (names is None or name in names)
    }
    return min(rivals, key=lambda name: rivals[name], default=None)


def margin(plan: Plan) -> Margin | None:
    """What the plan gains over the best baseline; None where there is none to compare with."""
    name = best_baseline(plan)
    if name is None:
        return None
    new_tokens = plan.placement.new_tokens
    rival_s = generation_s(plan.baselines[name], new_tokens)
    return Margin(name, rival_s / generation_s(plan.prediction, new_tokens))
