"""``moepack bench``: predicted beside measured."""

from __future__ import annotations

from typing import Annotated

import typer

from moepack.cli.generation import (
    drift_of,
    link_efficiency,
    link_of,
    open_session,
    run_document,
    traced,
)
from moepack.cli.options import JsonOption, LinkOption, PackOption, TraceOption
from moepack.cli.output import emit, note
from moepack.cli.progress import TerminalProgress
from moepack.cli.replanning import replan_live
from moepack.drift import slowness
from moepack.errors import DriftError
from moepack.measuring import measure, shipped_prompts
from moepack.workspace import Workspace
from moepack.yardstick import MixedYardstick, PaceKeeper


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
    replan_every: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Let slots move between layers every N tokens, between two texts, as the routing "
            "would have it. 0, for a measurement is of one plan: never.",
        ),
    ] = 0,
    trace: TraceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure, and compare with what was predicted."""
    from moepack.report.run import run_view

    workspace = Workspace.locate()
    with traced(trace) as timeline:
        session = open_session(workspace, model, check="first", link=link)
        with session.engine:
            plan = session.plan
            prompt_tokens = prompt or plan.placement.prompt_tokens
            new_tokens = new or plan.placement.new_tokens
            prompts = shipped_prompts(session.tokenizer, prompt_tokens)
            note(
                f"{len(prompts)} texts, {prompt_tokens} tokens of each as prompt, {new_tokens} new "
                "tokens drawn at temperature 1 (seed 0)"
            )
            session.engine.observe_time(timeline)
            replans = replan_live(session.engine, plan, link_of(workspace, plan), replan_every)
            keeper = PaceKeeper(MixedYardstick()) if plan.prediction.yardstick_s else None
            measured, tokens = measure(
                session.engine, prompts, new_tokens, keeper=keeper, progress=TerminalProgress()
            )
            pace = None if keeper is None else keeper.pace()
    text = session.tokenizer.decode(tokens)
    drifts = drift_of(plan, measured, pace)
    if "ttft_s" not in drifts:
        note(f"the first token is not compared: planned for {plan.placement.prompt_tokens} tokens")
    emit(
        run_document(
            workspace, plan, measured, tokens=tokens, text=text, replans=replans, pace=pace
        ),
        as_json=json,
        view=lambda: run_view(
            measured,
            drifts,
            plan.prediction.band,
            link_efficiency(workspace, plan, measured),
            slowness(plan.prediction, pace),
        ),
    )
    outside = [metric for metric, drift in drifts.items() if not drift.in_band]
    if strict and outside:
        raise DriftError(
            f"outside the band of {plan.prediction.band:.2f}: "
            + ", ".join(f"{metric} ({_ratio(drifts[metric].ratio)})" for metric in outside)
            + "; profile and plan again, with nothing else running"
        )


def _ratio(ratio: float | None) -> str:
    return "expected 0" if ratio is None else f"{ratio:.2f} of what was expected"
