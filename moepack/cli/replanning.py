"""Planning again from live routing, for ``run`` and ``bench``: when it happens they say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moepack.cli.output import note
from moepack.records import record
from moepack.units import format_size

if TYPE_CHECKING:
    from moepack_runtime.engine import Engine
    from moepack_runtime.live_routing import LiveRouting

    from moepack.cost import LinkSeconds
    from moepack.plan import LayerPlacement, Plan


@record
class ReplanReport:
    """One time that slots moved: after how many tokens, how much, and the layers concerned."""

    after_tokens: int
    moved_bytes: int
    layers: tuple[int, ...]


def replan_live(
    engine: Engine, plan: Plan, link: LinkSeconds | None, every_tokens: int
) -> list[ReplanReport]:
    """Let slots move between layers every so many tokens.

    Parameters
    ----------
    link
        Seconds of one transfer; where that is not known, bytes count.
    every_tokens
        0: never.

    Returns
    -------
    list of ReplanReport
        Filled while the engine runs; it stays empty where all layers share their slots, or one
        holds experts in several encodings.
    """
    reports: list[ReplanReport] = []
    mixed = any(cut.encodings for cut in plan.layout.layers)
    if not every_tokens or mixed or plan.placement.pool is not None:
        return reports

    def again(live: LiveRouting) -> Sequence[LayerPlacement] | None:
        from moepack.replan import replan

        found = replan(engine.spec, plan.layout, engine.placement.layers, live.ids, link or float)
        if found is None:
            return None
        reports.append(ReplanReport(live.tokens, found.moved_bytes, found.changed))
        note(
            f"after {live.tokens:,} tokens {format_size(found.moved_bytes)} of slots move between "
            f"{len(found.changed)} layers: misses are expected to cost {found.saved:.0%} less"
        )
        return found.layers

    engine.replan_every(every_tokens, again)
    return reports
