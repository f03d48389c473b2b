"""What one pass over one layer found and did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class PassReport(NamedTuple):
    """Of one pass over one layer, summed over its (token, expert) activations.

    Attributes
    ----------
    tokens : int
        Of the pass.
    activations : int
    hits : int
        Those whose cached part (the top, or the whole expert at split 0) was resident.
    ready : int
        Those that were whole in the fast tier when the routing was known, fetched ahead or not.
    predicted : int
        Activations of tokens for which a prediction existed.
    recalled : int
        Those of them that the prediction named, to the depth that the plan looks at.
    demand_bytes, ahead_used_bytes, ahead_wasted_bytes : int
        Over the link for this pass: asked for once the routing was known, and before that.
    wait_s : float
        The computing thread waited for the link.
    substituted, skipped : int
        Activations whose expert was missing, and replaced by its low copy, or left out.
    """

    tokens: int
    activations: int
    hits: int
    ready: int
    predicted: int
    recalled: int
    demand_bytes: int
    ahead_used_bytes: int
    ahead_wasted_bytes: int
    wait_s: float
    substituted: int = 0
    skipped: int = 0


NO_PASS = PassReport(0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0)


def total(reports: Sequence[PassReport]) -> PassReport:
    """The sum of several passes."""
    if not reports:
        return NO_PASS
    return PassReport(*(sum(values) for values in zip(*reports, strict=True)))
