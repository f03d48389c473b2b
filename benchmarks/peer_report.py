"""Medians of what was measured, a table of them, and how moepack stands among them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.peer_runners import Measured
from moepack.units import format_rate, format_size

OWN = "moepack"
PEER_FACTOR = 2.5
LINK_FACTOR = 0.9


class Bar(NamedTuple):
    """The speed of a link that carries exactly what the best online policy misses.

    Attributes
    ----------
    policy : str
        The strategy that misses the fewest bytes in the replay of the recorded routing.
    bandwidth_bytes_per_s : float
        Of the disk as profiled, at the size of an expert.
    """

    policy: str
    missed_bytes_per_token: float
    bandwidth_bytes_per_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """None where nothing is missed."""
        missed = self.missed_bytes_per_token
        return self.bandwidth_bytes_per_s / missed if missed else None


class Row(NamedTuple):
    """One program at one share: medians over the rounds, or why there are none.

    ``stats`` is what the program itself counted in the last round.
    """

    name: str
    failure: str
    threads: int | None = None
    rounds: int = 0
    load_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    bytes_before: float = 0.0
    bytes_per_token: float = 0.0
    peak_group_bytes: int = 0
    peak_process_bytes: int = 0
    stats: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """What JSON says of it; nothing that was not measured."""
        if self.failure:
            return {"name": self.name, "failure": self.failure}
        return {key: value for key, value in self._asdict().items() if value not in ("", None)}


class Verdict(NamedTuple):
    """moepack against the bar, at one share.

    Attributes
    ----------
    decode_ratio, prefill_ratio : float or None
        Over what is asked for; None where there is nothing to compare.
    """

    best_peer: str
    bar_tokens_per_s: float | None
    decode_ratio: float | None
    prefill_ratio: float | None
    passed: bool


def say(text: str) -> None:
    """What is being done, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def best_threads(runs: Mapping[int, Sequence[Measured]]) -> int | None:
    """The number of threads that decoded fastest; None where no run went through."""
    speed = {threads: several[0].decode_tokens_per_s for threads, several in runs.items()}
    return max(speed, key=lambda threads: speed[threads]) if speed else None


def row_of(name: str, found: Mapping[int, Sequence[Measured]], failure: str) -> Row:
    """The medians of what went through; ``failure`` is told where nothing did."""
    threads = best_threads(found)
    if threads is None:
        return Row(name, failure or "it did not run")
    runs = found[threads]
    speeds = [run.decode_tokens_per_s for run in runs]
    return Row(
        name=name,
        failure="",
        threads=threads,
        rounds=len(runs),
        load_s=statistics.median(run.load_s for run in runs),
        prefill_tokens_per_s=statistics.median(run.prefill_tokens_per_s for run in runs),
        decode_tokens_per_s=statistics.median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        bytes_before=statistics.median(run.bytes_before for run in runs),
        bytes_per_token=statistics.median(run.bytes_per_token for run in runs),
        peak_group_bytes=max(run.peak_group_bytes or 0 for run in runs),
        peak_process_bytes=max(run.peak_process_bytes for run in runs),
        stats=runs[-1].stats,
    )


def judge(rows: Sequence[Row], bar: Bar) -> Verdict:
    """Hold moepack against the best peer and against the disk."""
    ran = [row for row in rows if not row.failure]
    own = next((row for row in ran if row.name == OWN), None)
    peers = [row for row in ran if row.name != OWN]
    best = max(peers, key=lambda row: row.decode_tokens_per_s, default=None)
    least: list[float] = []
    if best is not None:
        least.append(PEER_FACTOR * best.decode_tokens_per_s)
    if bar.tokens_per_s is not None:
        least.append(LINK_FACTOR * bar.tokens_per_s)
    asked = min(least, default=None)
    prefill = max((row.prefill_tokens_per_s for row in peers), default=None)
    decode_ratio = own.decode_tokens_per_s / asked if own and asked else None
    prefill_ratio = own.prefill_tokens_per_s / prefill if own and prefill else None
    compared = [ratio for ratio in (decode_ratio, prefill_ratio) if ratio is not None]
    passed = bool(compared) and min(compared) >= 1
    return Verdict(best.name if best else "", asked, decode_ratio, prefill_ratio, passed)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield (
        "| | threads | load | prefill, tokens/s | decode, tokens/s | slowest to fastest "
        "| read a token | read before | peak, group | peak, process |"
    )
    yield "| --- " * 10 + "|"
    for row in rows:
        if row.failure:
            yield f"| {row.name} | {row.failure} " + "| " * 8 + "|"
            continue
        sizes = (row.bytes_per_token, row.bytes_before, row.peak_group_bytes)
        told = " | ".join(format_size(round(size)) for size in (*sizes, row.peak_process_bytes))
        yield (
            f"| {row.name} | {row.threads} | {row.load_s:.1f} s | {row.prefill_tokens_per_s:.1f} "
            f"| {row.decode_tokens_per_s:.2f} | {row.slowest:.2f} to {row.fastest:.2f} | {told} |"
        )


def sentence(verdict: Verdict, bar: Bar, rows: Sequence[Row], *, judged: bool) -> str:
    """What was missed, and how moepack stands.

    Parameters
    ----------
    judged
        Whether the bar holds at this share.
    """
    missed = {row.name: format_size(round(row.bytes_per_token)) for row in rows if not row.failure}
    own, best = missed.get(OWN, "-"), missed.get(verdict.best_peer, "-")
    parts = [f"Missed for each token: moepack {own}, {verdict.best_peer or 'no peer'} {best}"]
    if bar.policy:
        parts[0] += (
            f", {bar.policy} {format_size(round(bar.missed_bytes_per_token))} in replay; the disk "
            f"gives {format_rate(bar.bandwidth_bytes_per_s)}"
        )
    parts[0] += "."
    if verdict.decode_ratio is not None and verdict.bar_tokens_per_s is not None:
        parts.append(
            f"Decode: {verdict.decode_ratio:.2f} of the bar of {verdict.bar_tokens_per_s:.2f} "
            "tokens/s."
        )
    if verdict.prefill_ratio is not None:
        parts.append(f"Prefill: {verdict.prefill_ratio:.2f} of the best peer's.")
    parts.append(("pass" if verdict.passed else "FAIL") if judged else "No bar at this share.")
    return " ".join(parts)
