"""``moepack plan``: decide what the fast memory holds, and say how fast that will be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepack import records
from moepack.atomic import require_writable
from moepack.cli.models import Source
from moepack.cli.options import JsonOption, LinkOption, ModelArgument, SizeRange, size, size_range
from moepack.cli.output import emit, note
from moepack.cli.plan_answer import Asked, answer_document, answer_view, find_answer
from moepack.cli.planning import (
    AssumeEngineOption,
    Conditions,
    ContextOption,
    HardwareOption,
    MissThresholdsOption,
    NewOption,
    NoCalibrationOption,
    OnMissOption,
    PromptOption,
    RoutingOption,
    asked_low,
    asked_thresholds,
    kept_layout,
    open_case,
    with_asked_calibration,
)
from moepack.cli.precision import (
    BitsOption,
    QualityOption,
    TrunkOption,
    asked_precision,
    asked_trunk,
    measured_damage,
    require_bounded,
)
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack.layout import LayerLayout
    from moepack.plan import LayerPlacement, Plan


def plan(
    model: ModelArgument = None,
    vram: Annotated[
        int | None,
        typer.Option(
            "--vram",
            parser=size,
            metavar="SIZE",
            help="Bound on the fast tier (RAM where there is no GPU), as in 24G. Needed, unless "
            "there is --sweep.",
            show_default=False,
        ),
    ] = None,
    ram: Annotated[
        int | None,
        typer.Option(
            "--ram",
            parser=size,
            metavar="SIZE",
            help="Bound on the whole process in host memory. Default: the machine's less 10 %.",
            show_default=False,
        ),
    ] = None,
    hardware: HardwareOption = None,
    routing: RoutingOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    new: NewOption = None,
    link: LinkOption = None,
    quality: QualityOption = None,
    bits: BitsOption = None,
    trunk: TrunkOption = None,
    on_miss: OnMissOption = None,
    miss_thresholds: MissThresholdsOption = None,
    no_calibration: NoCalibrationOption = False,
    keep_layout: Annotated[
        bool,
        typer.Option("--keep-layout", help="Keep the pack as it is; decide the placement alone."),
    ] = False,
    assume_engine: AssumeEngineOption = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say what limits the machine, and what another one would gain."
        ),
    ] = False,
    sweep: Annotated[
        SizeRange | None,
        typer.Option(
            "--sweep",
            parser=size_range,
            metavar="LO:HI",
            help="Plan for a range of budgets, as in 4G:24G, and plot them.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write all of it, explained, as one page for a browser.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the plan there, and leave the current one alone.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Decide what the fast memory holds, and predict the speed."""
    from moepack.planner import Planner

    if vram is None and sweep is None:
        raise typer.BadParameter("give one, or --sweep LO:HI", param_hint="'--vram'")
    if vram is None and out is not None:
        raise typer.BadParameter("a sweep alone makes no plan; give --vram", param_hint="'--out'")
    asked = Asked(vram, sweep, explain, html)
    workspace = Workspace.locate()
    conditions = Conditions(hardware, routing, context, prompt, new, link, assume_engine)
    case = open_case(workspace, model, conditions)
    kept = kept_layout(case) if keep_layout else None
    low = asked_low(case, on_miss, kept)
    stored = asked_trunk(case, trunk, quality, kept)
    precision = asked_precision(case, quality, bits, kept, low=on_miss is not None, trunk=stored)
    request = dataclasses.replace(
        case.request,
        fast_budget_bytes=asked.most_bytes,
        ram_budget_bytes=ram,
        keep_layout=kept,
        encoding=precision.encoding,
        by_expert=precision.by_expert,
        low=low,
        trunk=stored,
        compute=case.request.compute.with_trunk(stored),
        on_miss=asked_thresholds(case, on_miss, miss_thresholds, low),
    )
    request = with_asked_calibration(case, request, ignored=no_calibration)
    require_bounded(case, quality, request)
    for path in (out, html):
        if path is not None:
            require_writable(path)  # planning a large model takes minutes
    _note_source(case.source)
    answer = find_answer(Planner(request), asked, measured_damage(case))
    document = answer_document(answer)
    document["source"] = records.to_data(case.source.checkpoint.source_size)
    if answer.plan is not None:
        _keep(workspace, case.source, answer.plan, out)
        document = plan_document(answer.plan) | document
    emit(document, as_json=json, view=lambda: answer_view(answer))


def _note_source(source: Source) -> None:
    """Say what a quantised checkpoint becomes: its own size is not what is planned with."""
    from moepack.units import format_size

    spec, size = source.spec, source.checkpoint.source_size
    if size.encoding != spec.dtype:
        note(
            f"the checkpoint holds {format_size(size.size_bytes)} in {size.encoding}; in "
            f"{spec.dtype} that is {format_size(spec.weights_bytes)}"
        )


def _keep(workspace: Workspace, source: Source, made: Plan, out: Path | None) -> None:
    """Write a plan to a file; or make it current, if it can be run here."""
    from moepack.atomic import write_atomically

    if out is not None:
        write_atomically(out, records.encode(made, indent=1).encode())
        note(f"plan written to {out}")
    elif made.provenance.hardware_is_this_machine and source.is_here:
        folder = workspace.remember(source.record)
        folder.save_plan(made)
        workspace.make_current(folder)
    else:
        here = made.provenance.hardware_is_this_machine
        missing = "its weights are not here" if here else "it is another machine"
        note(f"shown only, since {missing}; --out FILE keeps it")


def plan_document(plan: Plan) -> dict[str, object]:
    """What ``--json`` says of a plan."""
    from moepack.trunk import trunk_name

    placement, prediction = plan.placement, plan.prediction
    return {
        "model": plan.model_name,
        "model_digest": plan.model_digest,
        "layout_digest": plan.layout.digest,
        "device": placement.device,
        "fast_budget_bytes": placement.fast_budget_bytes,
        "fast_used_bytes": placement.memory.total_bytes,
        "memory": records.to_data(placement.memory),
        **({} if placement.host is None else {"host": records.to_data(placement.host)}),
        **_low_document(plan),
        **({"calibration": plan.layout.calibration} if plan.layout.calibration else {}),
        **({"trunk": trunk_name(plan.layout.trunk)} if plan.layout.trunk else {}),
        "staging_experts": placement.staging_experts,
        "layers": [
            _without_nulls(
                {
                    "layer": place.layer,
                    "budget_bytes": place.budget_bytes,
                    "encoding": cut.encoding,
                    **_classes_document(cut, place),
                    "split_ratio": cut.split_ratio,
                    "cached_tops": place.top_slots,
                    "cached_bottoms": place.bottom_slots,
                    "policy": place.policy,
                    "half_life_tokens": place.half_life_tokens,
                    "prefetch": place.prefetch,
                    "prefetch_depth": place.prefetch_depth,
                }
            )
            for cut, place in zip(plan.layout.layers, placement.layers, strict=True)
        ],
        "prediction": records.to_data(prediction),
        "baselines": {name: records.to_data(baseline) for name, baseline in plan.baselines.items()},
        "provenance": records.to_data(plan.provenance),
        "planner": _without_nulls(records.to_data(plan.planner)),
        "context": placement.context_tokens,
        "max_context": plan.max_context_tokens,
    }


def _classes_document(cut: LayerLayout, place: LayerPlacement) -> dict[str, object]:
    """Where experts of a layer differ: how many have each encoding, and the slots of these."""
    if not cut.encodings:
        return {}
    from moepack.budget import class_slots

    return {
        "experts_by_encoding": cut.class_sizes(len(cut.encodings)),
        "class_slots": dict(zip(cut.classes, class_slots(cut, place), strict=True)),
    }


def _low_document(plan: Plan) -> dict[str, object]:
    """What low copies there are, and for which misses they are taken."""
    if not plan.layout.low:
        return {}
    rule = plan.placement.on_miss
    return {
        "low_copies": plan.layout.low,
        **({} if rule is None else {"on_miss": records.to_data(rule)}),
    }


def _without_nulls(data: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in data.items() if value is not None}
