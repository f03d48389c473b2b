"""``moepack run``: execute the packed model, to plan."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from moepack.cli.generation import (
    Session,
    drift_of,
    link_efficiency,
    link_of,
    open_session,
    run_document,
    traced,
)
from moepack.cli.options import CheckOption, JsonOption, PackOption, TraceOption
from moepack.cli.output import emit, note, show_beside
from moepack.cli.progress import TerminalProgress
from moepack.cli.replanning import replan_live
from moepack.errors import ContextLengthError
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack_runtime.sampling import SamplingParams
    from moepack_runtime.stats import RunStats

    from moepack.plan import Plan

#: After how many tokens slots may move between layers.
REPLAN_EVERY_TOKENS = 5000


def run(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="What to go on from; '-' reads standard input: at a terminal one prompt a line, "
            "until it ends.",
        ),
    ],
    model: PackOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="New tokens at most. Default: what was planned, as far as the context reaches.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0: always the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw among the K likeliest; 0: among all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Draw among the likeliest that together have P."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Equal seeds draw equal texts.")] = 0,
    check: CheckOption = "first",
    stats: Annotated[
        bool, typer.Option("--stats", help="Say afterwards what was measured.")
    ] = False,
    replan_every: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Every N tokens, between two prompts, slots may move between layers as the "
            "planner would have it for what the routers decided lately. 0: never.",
        ),
    ] = REPLAN_EVERY_TOKENS,
    trace: TraceOption = None,
    json: JsonOption = False,
) -> None:
    """Write on from a prompt, to plan."""
    from moepack_runtime.sampling import SamplingParams

    prompts = _prompts(prompt, several=not json)
    try:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    except ValueError as failure:
        raise typer.BadParameter(str(failure)) from None
    workspace = Workspace.locate()
    with traced(trace) as timeline:
        session = open_session(workspace, model, check=check)
        plan = session.plan
        with session.engine as engine:
            engine.observe_time(timeline)
            replans = replan_live(engine, plan, link_of(workspace, plan), replan_every)
            for given in prompts:
                ids = _encode(session, given)
                new_tokens = _new_tokens(session, len(ids), max_new_tokens)
                tokens, text = _generate(session, ids, new_tokens, params, quiet=json)
                measured = engine.stats()
                if stats:
                    _show_stats(workspace, plan, measured)
    if json:
        document = run_document(
            workspace, plan, measured, tokens=tokens, text=text, replans=replans
        )
        emit(document, as_json=True)


def _show_stats(workspace: Workspace, plan: Plan, measured: RunStats) -> None:
    from moepack.report.run import run_view

    drifts = drift_of(plan, measured)
    efficiency = link_efficiency(workspace, plan, measured)
    show_beside(run_view(measured, drifts, plan.prediction.band, efficiency))
    if "ttft_s" not in drifts:
        note(
            f"the first token is not compared: planned for {plan.placement.prompt_tokens} prompt "
            f"tokens, given {measured.prompt_tokens}"
        )


def _prompts(prompt: str, *, several: bool) -> Iterable[str]:
    """The prompt, or what standard input gives for ``-``; at a terminal each line of it."""
    if several and prompt == "-" and sys.stdin.isatty():
        return _lines()
    return [_read_prompt(prompt)]


def _lines() -> Iterator[str]:
    """What is typed, line by line, but for empty ones."""
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            typer.echo(err=True)
            return
        if line.strip():
            yield line.removesuffix("\n")


def _read_prompt(prompt: str) -> str:
    """The prompt, or standard input for ``-``; its last line break belongs to the terminal."""
    try:
        if prompt == "-":
            return sys.stdin.read().removesuffix("\n")
        prompt.encode()  # what the shell passed may not have been UTF-8
    except UnicodeError as failure:
        raise typer.BadParameter(f"the prompt is not UTF-8: {failure}") from None
    return prompt


def _encode(session: Session, prompt: str) -> list[int]:
    """Tokens of the prompt, as a user's turn where the model has a chat template."""
    tokenizer = session.tokenizer
    if tokenizer.template is not None:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def _new_tokens(session: Session, prompt_tokens: int, wanted: int | None) -> int:
    """How many to draw. What was asked for is the engine's to refuse; a default gives way."""
    if wanted is not None:
        return wanted
    placement = session.plan.placement
    room = placement.context_tokens - prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"prompt of {prompt_tokens} tokens leaves no room in the planned context of "
            f"{placement.context_tokens}; plan with --context {prompt_tokens + 1} or more (at most "
            f"{session.plan.max_context_tokens} fits the budget), or shorten the prompt"
        )
    return min(placement.new_tokens, room)


def _generate(
    session: Session, ids: list[int], new_tokens: int, params: SamplingParams, *, quiet: bool
) -> tuple[list[int], str]:
    """Draw tokens, and show their text as it comes unless ``quiet``."""
    from moepack_runtime.sampling import Sampler

    stream = session.tokenizer.stream()
    tokens: list[int] = []
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        if not quiet:
            typer.echo(piece, nl=False)
            sys.stdout.flush()

    try:
        for token in session.engine.generate(
            ids,
            max_new_tokens=new_tokens,
            sampler=Sampler(params),
            stop_ids=session.stop_ids,
            progress=TerminalProgress(),
        ):
            tokens.append(token)
            say(stream.push(token))
        say(stream.finish())
    finally:
        if not quiet and tokens:
            typer.echo()
    return tokens, "".join(pieces)
