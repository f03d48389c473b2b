"""What a replay of a placement took, as the planner and reports read it."""

from __future__ import annotations

from typing import NamedTuple

from moepack.lane_clock import Seconds


class Replayed(NamedTuple):
    """What a replay of one part of the trace took.

    Attributes
    ----------
    ttft_s, tpot_s : float
        To the first token of the prompt, and for each further token.
    hit_rate, ready_rate : float
        Of the experts activated while decoding: those whose cached part was resident, and those
        that were whole in the fast tier when the routing was known.
    demand_bytes, ahead_used_bytes, ahead_wasted_bytes : float
        Over the link for one decoded token: on demand, and ahead of the routing.
    link_s : float
        The link's work for one decoded token.
    layer_wait_s : float64 [L]
        For one decoded token, what the compute of each layer waited for.
    events : int
        (layer, token) passes that were replayed.
    disk_bytes, disk_s : float
        Over three tiers: what of it RAM did not hold, and the disk's work for it, for one decoded
        token.
    substituted_rate, skipped_rate : float
        Of the experts activated while decoding: those that were missing and were replaced by their
        low copies, or left out.
    prompt_wait_s : float
        Of ``ttft_s``, what the compute waited for the link.
    """

    ttft_s: float
    tpot_s: float
    hit_rate: float
    ready_rate: float
    demand_bytes: float
    ahead_used_bytes: float
    ahead_wasted_bytes: float
    link_s: float
    layer_wait_s: Seconds
    events: int
    disk_bytes: float = 0.0
    disk_s: float = 0.0
    substituted_rate: float = 0.0
    skipped_rate: float = 0.0
    prompt_wait_s: float = 0.0

    @property
    def link_bytes_per_token(self) -> float:
        """Everything that crosses the link for one decoded token."""
        return self.demand_bytes + self.ahead_used_bytes + self.ahead_wasted_bytes
