"""Running the programs in turns, round after round."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peer_report import Row, best_threads, row_of, say
from benchmarks.peer_runners import Generation, Measured, Runner

Runs = dict[int, list[Measured]]


def compare(
    runners: Sequence[Runner],
    generation: Generation,
    *,
    rounds: int,
    limit_bytes: int,
    timeout_s: float,
    scratch: Path,
) -> list[Row]:
    """Run every program once a round, in turns.

    The first round chooses: of a program's numbers of threads the one that decodes fastest, of its
    variants that one and the one with the fastest prefill.
    """
    found: dict[str, Runs] = {each.name: {} for each in runners}
    failures = {each.name: f"absent: {each.absent}" for each in runners if each.absent}
    order = deque(each for each in runners if not each.absent)
    for number in range(rounds):
        for runner in order:
            runs = found[runner.name]
            counts = runner.threads if number == 0 else tuple(filter(None, [best_threads(runs)]))
            for threads in counts:
                say(f"round {number + 1}: {runner.name}, {threads} threads")
                outcome = runner.run(
                    generation,
                    threads,
                    limit_bytes=limit_bytes,
                    timeout_s=timeout_s,
                    scratch=scratch,
                )
                if isinstance(outcome, str):
                    failures[runner.name] = outcome
                    say(f"    {outcome}")
                else:
                    runs.setdefault(threads, []).append(outcome)
                    say(
                        f"    {outcome.prefill_tokens_per_s:.1f} and "
                        f"{outcome.decode_tokens_per_s:.2f} tokens/s"
                    )
        if number == 0:
            kept = chosen(order, found)
            order = deque(each for each in order if each.name in kept)
        order.rotate(-1)
    return [row_of(name, runs, failures.get(name, "")) for name, runs in found.items()]


def chosen(runners: Sequence[Runner], found: Mapping[str, Runs]) -> set[str]:
    """Names of each program's fastest variants, after one round."""
    programs: dict[str, dict[str, Measured]] = defaultdict(dict)
    for runner in runners:
        threads = best_threads(found[runner.name])
        if threads is not None:
            programs[runner.program][runner.name] = found[runner.name][threads][0]
    kept: set[str] = set()
    for variants in programs.values():
        kept.add(max(variants, key=lambda name: variants[name].decode_tokens_per_s))
        kept.add(max(variants, key=lambda name: variants[name].prefill_tokens_per_s))
    return kept
