"""``moepack bench``: predicted beside measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moepack.cli.generation import Session, drift_of, open_session, run_document
from moepack.cli.options import JsonOption, LinkOption, PackOption
from moepack.cli.output import emit, note
from moepack.cli.progress import TerminalProgress
from moepack.errors import DriftError, WorkspaceError
from moepack.shipped import shipped_texts
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack_runtime.stats import RunStats

#: Texts measured: one could lie by its subject, and more take longer than they teach.
NUM_TEXTS = 3

_AVERAGED_RATES = ("tokens_per_s", "prefill_tokens_per_s", "link_bytes_per_s")
_PEAKS = ("prompt_tokens", "new_tokens", "peak_fast_bytes", "process_base_bytes")


def bench(
    model: PackOption = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Prompt tokens. Default: as planned.", show_default=False
        ),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="New tokens. Default: as planned.", show_default=False
        ),
    ] = None,
    link: LinkOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a measurement lies outside the band.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure, and compare with what was predicted."""
    from moepack.report.run import bench_view

    workspace = Workspace.locate()
    session = open_session(workspace, model, check="first", link=link)
    with session.engine:
        plan = session.plan
        prompt_tokens = prompt or plan.placement.prompt_tokens
        new_tokens = new or plan.placement.new_tokens
        prompts = _prompts(session, prompt_tokens)
        note(
            f"{len(prompts)} texts, {prompt_tokens} tokens of each as prompt, {new_tokens} new "
            "tokens drawn at temperature 1 (seed 0)"
        )
        measured, tokens = _measure(session, prompts, new_tokens)
    text = session.tokenizer.decode(tokens)
    drifts = drift_of(plan, measured)
    if "ttft_s" not in drifts:
        note(f"the first token is not compared: planned for {plan.placement.prompt_tokens} tokens")
    emit(
        run_document(workspace, plan, measured, tokens=tokens, text=text),
        as_json=json,
        view=lambda: bench_view(measured, drifts, plan.prediction.band),
    )
    outside = [metric for metric, drift in drifts.items() if not drift.in_band]
    if strict and outside:
        raise DriftError(
            f"outside the band of {plan.prediction.band:.2f}: "
            + ", ".join(f"{metric} ({_ratio(drifts[metric].ratio)})" for metric in outside)
            + "; profile and plan again on a quiet machine"
        )


def _ratio(ratio: float | None) -> str:
    return "predicted 0" if ratio is None else f"{ratio:.2f} of the prediction"


def _prompts(session: Session, length: int) -> list[list[int]]:
    """The ends of some texts: a routing profile holds the end of each back from its fitting."""
    texts = shipped_texts()
    if not texts:
        raise WorkspaceError("this installation of moepack lacks its texts; install it again")
    step = max(1, len(texts) // NUM_TEXTS)
    prompts = []
    for path in texts[::step][:NUM_TEXTS]:
        ids = session.tokenizer.encode(path.read_text("utf-8"))
        ids *= -(-length // len(ids))  # a text that is too short is repeated
        prompts.append(ids[-length:])
    return prompts


def _measure(
    session: Session, prompts: Sequence[list[int]], new_tokens: int
) -> tuple[RunStats, list[int]]:
    """Mean over the prompts, and every token drawn."""
    from moepack_runtime.sampling import Sampler, SamplingParams

    progress = TerminalProgress()
    runs: list[RunStats] = []
    tokens: list[int] = []
    # The first pass of a process picks its kernels, one for every shape, and reads every file for
    # the first time: not what is priced. The last prompt, so that the first finds other experts.
    list(session.engine.generate(prompts[-1], max_new_tokens=2, sampler=Sampler()))
    progress.start("measure (tokens)", len(prompts) * new_tokens, "items")
    try:
        for prompt in prompts:
            sampler = Sampler(SamplingParams(temperature=1.0))
            for token in session.engine.generate(
                prompt, max_new_tokens=new_tokens, sampler=sampler
            ):
                tokens.append(token)
                progress.advance(1)
            runs.append(session.engine.stats())
    finally:
        progress.done()
    return average(runs), tokens


def average(runs: Sequence[RunStats]) -> RunStats:
    """Of several generations: means of times and shares, harmonic of rates, the most of sizes."""
    from moepack_runtime.stats import RunStats

    fields: dict[str, float | None] = {}
    for field in dataclasses.fields(RunStats):
        values = [value for run in runs if (value := getattr(run, field.name)) is not None]
        if not values:
            fields[field.name] = None
        elif field.name in _PEAKS:
            fields[field.name] = max(values)
        elif field.name in _AVERAGED_RATES:
            fields[field.name] = statistics.harmonic_mean(values)
        else:
            fields[field.name] = statistics.fmean(values)
    return RunStats(**fields)  # type: ignore[arg-type]
