"""What is compared with what at each number of bits, and which of these pairs count.

Neither side may win by losing quality: a pair counts when moepack's divergence on the shipped model
is no larger than the peer's there (:mod:`benchmarks.peer_quality`), in the same encodings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.peer_precision import Asked, Precision
from benchmarks.peer_report import OWN, Bar, Row, Verdict, judge, sentence


class Pair(NamedTuple):
    """moepack and one kind of GGUF: whether their speeds may be compared, and why."""

    kind: str
    counts: bool
    why: str


def pairs(both: Precision, encoding: str, quality: Mapping[str, Any] | None) -> list[Pair]:
    """The pairs of such a precision.

    Parameters
    ----------
    encoding
        What moepack's experts are stored in, in the model whose speed is measured.
    quality
        What :func:`benchmarks.peer_quality.measure` has found with such a trunk; None where it has
        not been.
    """
    asked, kinds = both.asked, [kind.name for kind in both.kinds]
    if asked == Asked("exact"):
        return [Pair(kind, counts=True, why="the same weights") for kind in kinds]
    if quality is None:
        why = (
            "quality has not been measured: python -m benchmarks.peer_quality --trunk "
            f"{asked.trunk}"
        )
        return [Pair(kind, counts=False, why=why) for kind in kinds]
    own = quality["moepack"][asked.quality]
    return [_pair(kind, encoding, own, quality["peers"].get(kind, {})) for kind in kinds]


def _pair(kind: str, encoding: str, own: Mapping[str, Any], peer: Mapping[str, Any]) -> Pair:
    if own["stored"] != encoding:
        why = f"quality is that of {own['stored']}, speed that of {encoding}"
        return Pair(kind, counts=False, why=why)
    if "kl" not in peer:
        why = peer.get("failure", "its quality has not been measured")
        return Pair(kind, counts=False, why=why)
    why = f"KL {own['kl']:.5f}, the peer's {peer['kl']:.5f}"
    if peer["stored"] != kind:
        # It has more bits: who loses no more than that loses no more than the kind itself.
        why += f" in {peer['stored']}, which is what llama-quantize stores there for {kind}"
    return Pair(kind, counts=own["kl"] <= peer["kl"], why=why)


class Judged(NamedTuple):
    """A pair at one share."""

    pair: Pair
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """What JSON says of it."""
        return {**self.pair._asdict(), "verdict": self.verdict._asdict()}


def judge_pairs(
    found: Sequence[Pair], rows: Sequence[Row], kinds: Mapping[str, str], bar: Bar
) -> list[Judged]:
    """Hold moepack against the programs of each pair.

    Parameters
    ----------
    kinds
        Of each program in ``rows`` but moepack, by its name.
    """
    return [Judged(pair, judge(_rows_of(pair, rows, kinds), bar)) for pair in found]


def told(
    judged: Judged, rows: Sequence[Row], kinds: Mapping[str, str], bar: Bar, share: float
) -> str:
    """One line of it."""
    pair, verdict = judged
    its_rows = _rows_of(pair, rows, kinds)
    said = sentence(verdict, bar, its_rows, judged=share < 1)
    verb = "counts" if pair.counts else "does not count"
    return f"{pair.kind} {verb} ({pair.why}). {said}"


def _rows_of(pair: Pair, rows: Sequence[Row], kinds: Mapping[str, str]) -> list[Row]:
    return [row for row in rows if row.name == OWN or kinds[row.name] == pair.kind]
