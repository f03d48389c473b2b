"""What limits a machine, and what one would gain from another."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from moepack.explain import Explanation
from moepack.report.tables import columns, facts
from moepack.units import format_duration, short_size
from moepack.what_if import SAME, WhatIf

#: Head of the table of other machines, in the terminal and on the page.
WHAT_IF_HEAD = ("a token on other machines", "first token", "hit rate")


def explanation_view(explanation: Explanation) -> RenderableType:
    """The limit, a sentence for each part of the machine, and the table of other machines."""
    findings = facts([(finding.about, finding.text) for finding in explanation.findings])
    parts: list[RenderableType] = [Text(limit_sentence(explanation), style="bold"), findings]
    if explanation.what_if:
        rows = columns(WHAT_IF_HEAD, (what_if_cells(row) for row in explanation.what_if))
        parts += ["", rows]
    return Group(*parts)


def limit_sentence(explanation: Explanation) -> str:
    """What takes the larger part of a token, and which change would gain the most."""
    token = explanation.token
    what, larger_s = "computing", token.compute_s
    if explanation.limit != "compute":
        what, larger_s = f"waiting for the {explanation.limit}", token.wait_s
    text = f"{what} takes {larger_s / token.tpot_s:.0%} of a token"
    best = max(explanation.what_if, key=lambda row: row.gain, default=None)
    if best is None or best.gain < 1 + SAME:
        return text
    more = short_size(best.fast_budget_bytes) if best.change == "memory" else f"{best.factor:.3g}x"
    return f"{text}; of the changes below, {best.change} {more} gains the most"


def what_if_cells(row: WhatIf) -> tuple[str, ...]:
    """The cells under :data:`WHAT_IF_HEAD`."""
    return row.text, format_duration(row.ttft_s), f"{row.hit_rate:.1%}"
