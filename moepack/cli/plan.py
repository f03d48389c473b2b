"""``moepack plan``: decide what the fast memory holds, and say how fast that will be."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moepack import records
from moepack.cli.models import Source, open_source
from moepack.cli.options import JsonOption, LinkOption, ModelArgument, lengths, size
from moepack.cli.output import emit, note
from moepack.errors import ProfileError, WorkspaceError
from moepack.workspace import ModelFolder, Workspace

if TYPE_CHECKING:
    from moepack.compute import ComputeProfile
    from moepack.hardware import HardwareProfile
    from moepack.plan import Layout, Plan
    from moepack.routing import RoutingProfile


class AssumedEngine(StrEnum):
    """Engines that are not here."""

    FULL = "full"


class _Machine(NamedTuple):
    """Hardware to plan for."""

    profile: HardwareProfile
    is_this_machine: bool


def plan(
    vram: Annotated[
        int,
        typer.Option(
            "--vram",
            parser=size,
            metavar="SIZE",
            help="Bound on the fast tier (RAM where there is no GPU), as in 24G.",
            show_default=False,
        ),
    ],
    model: ModelArgument = None,
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
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME|FILE",
            help="Plan for another machine: a preset, or a profile.",
            show_default=False,
        ),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            metavar="NAME|FILE",
            help="Routing to plan with: a preset, or a profile. Default: the model's own profile.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that the KV cache holds. Default: 4096, or the model's own limit.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Prompt tokens to price. Default: 512.", show_default=False
        ),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="New tokens to price. Default: 128.", show_default=False
        ),
    ] = None,
    link: LinkOption = None,
    keep_layout: Annotated[
        bool,
        typer.Option("--keep-layout", help="Keep the pack as it is; decide the placement alone."),
    ] = False,
    assume_engine: Annotated[
        AssumedEngine | None,
        typer.Option(
            "--assume-engine",
            help="Plan for an engine that also fetches ahead; moepack run refuses such a plan.",
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
    from moepack_runtime.capabilities import CAPABILITIES

    from moepack.atomic import write_atomically
    from moepack.plan_request import PlanRequest
    from moepack.planner import make_plan
    from moepack.report.plan import plan_view
    from moepack.routing_presets import is_sampled
    from moepack.strategies import FULL_ENGINE

    workspace = Workspace.locate()
    source = open_source(workspace, model, headers_only=True)
    folder = workspace.find(source.record.key)
    machine = _machine(workspace, hardware)
    priced = lengths(source.spec, context, prompt, new)
    found = _routing(source, folder, routing)
    made = make_plan(
        PlanRequest(
            spec=source.spec,
            hardware=machine.profile,
            hardware_is_this_machine=machine.is_this_machine,
            compute=_compute(source, folder, machine),
            routing=found,
            routing_is_assumed=is_sampled(found),
            engine=FULL_ENGINE if assume_engine else CAPABILITIES,
            assumed_engine=assume_engine is not None,
            device=machine.profile.device,
            fast_budget_bytes=vram,
            ram_budget_bytes=ram,
            context_tokens=priced.context_tokens,
            prompt_tokens=priced.prompt_tokens,
            new_tokens=priced.new_tokens,
            link=link,
            keep_layout=_kept_layout(folder, source) if keep_layout else None,
        )
    )
    if out is not None:
        write_atomically(out, records.encode(made, indent=1).encode())
        note(f"plan written to {out}")
    elif machine.is_this_machine and source.is_here:
        folder = workspace.remember(source.record)
        folder.save_plan(made)
        workspace.make_current(folder)
    else:
        missing = "its weights are not here" if machine.is_this_machine else "it is another machine"
        note(f"shown only, since {missing}; --out FILE keeps it")
    emit(plan_document(made), as_json=json, view=lambda: plan_view(made))


def _machine(workspace: Workspace, name: str | None) -> _Machine:
    from moepack.hardware import find_hardware, load_hardware

    if name is not None:
        return _Machine(find_hardware(name), False)
    if not workspace.hardware_path.exists():
        raise WorkspaceError(
            "this machine has not been measured; run moepack profile --hardware-only, or plan for "
            "a preset with --hardware"
        )
    return _Machine(load_hardware(workspace.hardware_path), True)


def _compute(source: Source, folder: ModelFolder | None, machine: _Machine) -> ComputeProfile:
    """Measured where the model was profiled on the machine in question, else derived.

    Raises
    ------
    ProfileError
        When it was measured on another device than the machine's newest profile.
    """
    from moepack.compute import load_compute
    from moepack.roofline import derive_compute

    if machine.is_this_machine and folder is not None and folder.compute_path.exists():
        compute = load_compute(folder.compute_path)
        if compute.device != machine.profile.device:
            raise ProfileError(
                f"{folder.compute_path}: compute was measured on {compute.device}, this machine's "
                f"profile is for {machine.profile.device}; run moepack profile"
            )
        return compute
    return derive_compute(source.spec, machine.profile)


def _routing(source: Source, folder: ModelFolder | None, name: str | None) -> RoutingProfile:
    """What was named; else recorded from this model; else every expert equally likely."""
    from moepack.routing import load_routing
    from moepack.routing_presets import UNIFORM, find_routing

    if name is None and folder is not None and folder.routing_path.exists():
        return load_routing(folder.routing_path)
    return find_routing(name or UNIFORM, source.spec)


def _kept_layout(folder: ModelFolder | None, source: Source) -> Layout:
    from moepack.formats import PackedModel

    if folder is None:
        raise WorkspaceError(
            f"{source.record.name} has not been packed, so there is no layout to keep; plan "
            "without --keep-layout"
        )
    return PackedModel.open(folder.pack_folder()).layout


def plan_document(plan: Plan) -> dict[str, object]:
    """What ``--json`` says of a plan."""
    placement, prediction = plan.placement, plan.prediction
    return {
        "model": plan.model_name,
        "model_digest": plan.model_digest,
        "layout_digest": plan.layout.digest,
        "device": placement.device,
        "fast_budget_bytes": placement.fast_budget_bytes,
        "fast_used_bytes": placement.memory.total_bytes,
        "memory": records.to_data(placement.memory),
        "staging_experts": placement.staging_experts,
        "layers": [
            {
                "layer": place.layer,
                "budget_bytes": place.budget_bytes,
                "split_ratio": cut.split_ratio,
                "cached_tops": place.top_slots,
                "cached_bottoms": place.bottom_slots,
                "policy": place.policy,
                "prefetch": place.prefetch,
                "prefetch_depth": place.prefetch_depth,
            }
            for cut, place in zip(plan.layout.layers, placement.layers, strict=True)
        ],
        "prediction": records.to_data(prediction),
        "baselines": {name: records.to_data(baseline) for name, baseline in plan.baselines.items()},
        "provenance": records.to_data(plan.provenance),
        "planner": _without_nulls(records.to_data(plan.planner)),
        "context": placement.context_tokens,
        "max_context": plan.max_context_tokens,
    }


def _without_nulls(data: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in data.items() if value is not None}
