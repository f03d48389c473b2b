"""``moepack replay``: the recorded routing under every strategy, side by side."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepack import records
from moepack.cli.models import current_plan
from moepack.cli.options import JsonOption, LinkOption, ModelArgument, size
from moepack.cli.output import emit
from moepack.cli.planning import (
    AssumedEngine,
    AssumeEngineOption,
    Case,
    Conditions,
    ContextOption,
    HardwareOption,
    NewOption,
    PromptOption,
    RoutingOption,
    open_case,
)
from moepack.cli.progress import TerminalProgress
from moepack.errors import WorkspaceError
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack.plan import Plan
    from moepack.plan_request import PlanRequest

#: What the current plan is called beside the strategies.
PLAN = "plan"


class TracePart(StrEnum):
    """The parts of a trace that nothing is learnt from."""

    SELECT = "select"
    TEST = "test"


def replay(
    model: ModelArgument = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="A strategy, as in lcp_prefetch; may be given several times. Default: all of "
            "them, and the current plan.",
            show_default=False,
        ),
    ] = None,
    vram: Annotated[
        int | None,
        typer.Option(
            "--vram",
            parser=size,
            metavar="SIZE",
            help="Bound on the fast tier, as in 24G. Default: the current plan's.",
            show_default=False,
        ),
    ] = None,
    hardware: HardwareOption = None,
    routing: RoutingOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    new: NewOption = None,
    link: LinkOption = None,
    assume_engine: AssumeEngineOption = None,
    part: Annotated[
        TracePart,
        typer.Option("--part", help="Which tokens of the routing: plans are chosen on select."),
    ] = TracePart.TEST,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Replay the published settings of MoEpic (arXiv 2509.08342) instead, beside its "
            "figures. Takes a minute or so.",
        ),
    ] = False,
    recording: Annotated[
        Path | None,
        typer.Option(
            "--recording",
            metavar="FILE",
            help="With --paper: recorded routing of Qwen1.5-MoE, an .npz, for its last table.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Replay the recorded routing under every strategy, and under the current plan."""
    conditions = Conditions(hardware, routing, context, prompt, new, link, assume_engine)
    if paper:
        if any(given is not None for given in (model, policy, vram, *conditions)):
            raise typer.BadParameter("takes no model, strategy or condition", param_hint="--paper")
        _replay_paper(recording, as_json=json)
        return
    if recording is not None:
        raise typer.BadParameter("belongs to --paper", param_hint="--recording")
    _replay_strategies(model, policy, vram, conditions, part, as_json=json)


def _replay_paper(recording: Path | None, *, as_json: bool) -> None:
    from moepack.paper.figures import TABLES, paper_tables
    from moepack.paper.settings import ASSUMPTIONS
    from moepack.report.paper import paper_view

    progress = TerminalProgress()
    progress.start("replay the published settings", TABLES, "items")
    tables = []
    try:
        for table in paper_tables(recording):
            tables.append(table)
            progress.advance(1)
    finally:
        progress.done()
    document = {
        "paper": "arXiv 2509.08342",
        "tables": [records.to_data(table) for table in tables],
        "assumptions": ASSUMPTIONS,
    }
    emit(document, as_json=as_json, view=lambda: paper_view(tables, ASSUMPTIONS))


def _replay_strategies(
    model: str | None,
    policy: list[str] | None,
    vram: int | None,
    conditions: Conditions,
    part: TracePart,
    *,
    as_json: bool,
) -> None:
    from moepack.replayed_strategies import STRATEGIES, replay_strategies
    from moepack.report.replay import replay_view
    from moepack.variants import contender_of

    wanted = tuple(policy or (*STRATEGIES, PLAN))
    for name in wanted:
        if name not in (*STRATEGIES, PLAN):
            known = ", ".join((*STRATEGIES, PLAN))
            raise typer.BadParameter(f"{name} is none of {known}", param_hint="'--policy'")
    case = open_case(Workspace.locate(), model, conditions)
    plan = _plan_at_hand(case)
    if plan is None and (vram is None or PLAN in (policy or ())):
        raise WorkspaceError(
            f"{case.source.record.name} has no plan for this machine; say how much fast memory "
            "there is with --vram, or run moepack plan"
        )
    request = case.request
    if plan is not None:
        request = _as_planned(request, plan, conditions)
    if vram is not None:
        request = dataclasses.replace(request, fast_budget_bytes=vram)
    also = []
    if plan is not None and PLAN in wanted:
        also = [contender_of(request, plan)._replace(name=PLAN)]
    found = replay_strategies(
        request,
        [name for name in wanted if name != PLAN],
        part.value,
        also=also,
        progress=TerminalProgress(),
    )
    document = {
        "model": case.source.record.name,
        "hardware": request.hardware.name,
        "routing": request.routing.summary.how,
        "part": part.value,
        "fast_budget_bytes": request.fast_budget_bytes,
        "context": request.context_tokens,
        "prompt": request.prompt_tokens,
        "new": request.new_tokens,
        "strategies": {
            each.name: records.to_data(each) | {"events_per_s": each.events_per_s} for each in found
        },
    }
    emit(document, as_json=as_json, view=lambda: replay_view(found, _about(request, part)))


def _plan_at_hand(case: Case) -> Plan | None:
    """The newest plan of the model, where it is for the machine that is asked about."""
    here = case.request.hardware_is_this_machine
    if not here or case.folder is None or not case.folder.plan_path.exists():
        return None
    return current_plan(case.folder)


def _as_planned(request: PlanRequest, plan: Plan, conditions: Conditions) -> PlanRequest:
    """The request under the plan's conditions, but for those that were asked for."""
    from moepack.strategies import FULL_ENGINE

    placement = plan.placement
    assumed = plan.assumed_engine or conditions.assume_engine is AssumedEngine.FULL
    return dataclasses.replace(
        request,
        fast_budget_bytes=placement.fast_budget_bytes,
        ram_budget_bytes=placement.ram_budget_bytes,
        context_tokens=conditions.context or placement.context_tokens,
        prompt_tokens=conditions.prompt or placement.prompt_tokens,
        new_tokens=conditions.new or placement.new_tokens,
        link=conditions.link or plan.link,
        engine=FULL_ENGINE if assumed else request.engine,
        assumed_engine=assumed,
        # The strategies in the precision of the plan that they stand beside.
        trunk=plan.layout.trunk,
        compute=request.compute.with_trunk(plan.layout.trunk),
        by_expert=tuple(
            tuple(map(cut.encoding_of, range(request.spec.moe(cut.layer).num_experts)))
            for cut in plan.layout.layers
        ),
    )


def _about(request: PlanRequest, part: TracePart) -> list[str]:
    from moepack.units import format_size

    budget = format_size(request.fast_budget_bytes)
    lengths = f"prompts of {request.prompt_tokens} tokens, {request.new_tokens} new ones"
    return [
        f"within {budget} of fast memory on {request.hardware.name}; {lengths}",
        f"routing: {request.routing.summary.how}; its {part.value} part",
    ]
