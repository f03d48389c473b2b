"""What ``moepack plan`` and ``moepack replay`` are asked under: options, and a request of them."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moepack.cli.models import Source, open_source
from moepack.cli.options import Link, lengths
from moepack.cli.output import note
from moepack.errors import ProfileError, WorkspaceError
from moepack.workspace import ModelFolder, Workspace

if TYPE_CHECKING:
    from moepack.compute import ComputeProfile
    from moepack.hardware import HardwareProfile
    from moepack.layout import Layout
    from moepack.plan import OnMiss
    from moepack.plan_request import PlanRequest
    from moepack.routing import RoutingProfile


class AssumedEngine(StrEnum):
    """Engines that are not here."""

    FULL = "full"


HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="NAME|FILE",
        help="Plan for another machine: a preset, or a profile.",
        show_default=False,
    ),
]
RoutingOption = Annotated[
    str | None,
    typer.Option(
        "--routing",
        metavar="NAME|FILE",
        help="Routing to plan with: a preset, or a profile. Default: the model's own profile, or "
        "uniform.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        metavar="N",
        help="Tokens that the KV cache holds. Default: 4096, or the model's own limit.",
        show_default=False,
    ),
]
PromptOption = Annotated[
    int | None,
    typer.Option(
        "--prompt",
        min=1,
        metavar="N",
        help="Prompt tokens to price. Default: 512.",
        show_default=False,
    ),
]
NewOption = Annotated[
    int | None,
    typer.Option(
        "--new",
        min=1,
        metavar="N",
        help="New tokens to price. Default: 128.",
        show_default=False,
    ),
]
AssumeEngineOption = Annotated[
    AssumedEngine | None,
    typer.Option(
        "--assume-engine",
        help="Plan for an engine that also fetches ahead; moepack run refuses such a plan.",
        show_default=False,
    ),
]


OnMissOption = Annotated[
    str | None,
    typer.Option(
        "--on-miss",
        metavar="low[:ENCODING]",
        help="Lossy: pack a copy of every expert in fewer bits, and fetch that, or nothing, for a "
        "missing expert of little weight. Default: what is missing is fetched as it is.",
        show_default=False,
    ),
]
MissThresholdsOption = Annotated[
    str | None,
    typer.Option(
        "--miss-thresholds",
        metavar="T1,T2",
        help="With --on-miss: which share of a token's weights goes before an expert that is still "
        "fetched exact, and before one that is fetched at all. Default: as moepack profile --bits "
        "has fitted them, else 0.6,0.9.",
        show_default=False,
    ),
]


NoCalibrationOption = Annotated[
    bool,
    typer.Option(
        "--no-calibration",
        help="Round experts as if all their inputs counted the same. Default: by the inputs that "
        "moepack profile --bits has seen, where it has.",
    ),
]


class Conditions(NamedTuple):
    """What was asked for, as on the command line: None where nothing was."""

    hardware: str | None
    routing: str | None
    context: int | None
    prompt: int | None
    new: int | None
    link: Link | None
    assume_engine: AssumedEngine | None


class Case(NamedTuple):
    """A model under conditions.

    Attributes
    ----------
    folder : ModelFolder or None
        What the workspace knows of the model.
    request : PlanRequest
        Its budget and what it keeps are the caller's to say.
    """

    source: Source
    folder: ModelFolder | None
    request: PlanRequest


def open_case(workspace: Workspace, model: str | None, conditions: Conditions) -> Case:
    """Find a model and everything that a plan for it is made from.

    Raises
    ------
    CheckpointError, WorkspaceError, ProfileError, PresetNotFoundError
        When something of it is not there, or is not what it should be.
    """
    from moepack_runtime.capabilities import CAPABILITIES

    from moepack.plan_request import PlanRequest
    from moepack.routing_presets import is_sampled
    from moepack.strategies import FULL_ENGINE

    source = open_source(workspace, model, headers_only=True)
    folder = workspace.find(source.record.key)
    machine = _machine(workspace, conditions.hardware)
    priced = lengths(source.spec, conditions.context, conditions.prompt, conditions.new)
    routing = _routing(source, folder, conditions.routing)
    assumed = conditions.assume_engine is not None
    request = PlanRequest(
        spec=source.spec,
        hardware=machine.profile,
        hardware_is_this_machine=machine.is_this_machine,
        compute=_compute(source, folder, machine),
        routing=routing,
        routing_is_assumed=is_sampled(routing),
        engine=FULL_ENGINE if assumed else CAPABILITIES,
        assumed_engine=assumed,
        device=machine.profile.device,
        fast_budget_bytes=0,
        context_tokens=priced.context_tokens,
        prompt_tokens=priced.prompt_tokens,
        new_tokens=priced.new_tokens,
        link=conditions.link,
    )
    return Case(source, folder, request)


class _Machine(NamedTuple):
    """Hardware to plan for."""

    profile: HardwareProfile
    is_this_machine: bool


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


def asked_low(case: Case, on_miss: str | None, kept: Layout | None) -> str:
    """What low copies are to be stored in; empty for none.

    Without an encoding: what the pack has whose layout is kept, or 4 bits.

    Raises
    ------
    EncodingError
        When the model's experts cannot be stored so, or there is no such encoding.
    """
    from moepack.encodings import encoding
    from moepack.precision import encoding_of

    if on_miss is None:
        return "" if kept is None else kept.low
    what, colon, name = on_miss.partition(":")
    if what != "low" or (colon and not name):
        raise typer.BadParameter(
            f"{on_miss}; expected low, or low:INT4_G32 and the like", param_hint="'--on-miss'"
        )
    if name:
        return encoding(name.upper()).name
    if kept is not None and kept.low:
        return kept.low
    return encoding_of(case.source.spec, "int4")


def with_asked_calibration(case: Case, request: PlanRequest, *, ignored: bool) -> PlanRequest:
    """What rounding is to be weighed by: what the model's profile has, where anything is rounded.

    Raises
    ------
    ProfileError
        When what it has cannot be read.
    """
    from moepack.calibration import CALIBRATION_FILE, load_calibration

    kept = request.keep_layout is not None
    if ignored and kept:
        raise typer.BadParameter(
            "the pack whose layout is kept is rounded as it is; leave out one of the two",
            param_hint="'--no-calibration'",
        )
    if ignored or kept or case.folder is None or not request.is_rounded:
        return request
    if not (case.folder.folder / CALIBRATION_FILE).exists():
        return request
    with load_calibration(case.folder.folder) as found:
        kept_second, digest = found.kept, found.digest
    if not kept_second:
        note(
            "the calibration has no second moments, by which errors are made good; moepack profile "
            "--bits measures them"
        )
    return replace(request, calibration=digest)


def asked_thresholds(
    case: Case, on_miss: str | None, thresholds: str | None, low: str
) -> OnMiss | None:
    """From which weights on a missing expert is replaced, and left out.

    Where nothing is said: as fitted to the model, if it was profiled with low copies in ``low``.

    Raises
    ------
    ProfileError, PlanMismatchError
        When that profile cannot be used.
    """
    from moepack.damage import DAMAGE_FILE, load_damage
    from moepack.miss_thresholds import fitted_rule
    from moepack.plan import OnMiss

    if on_miss is None:
        if thresholds is not None:
            raise typer.BadParameter("belongs to --on-miss", param_hint="'--miss-thresholds'")
        return None
    if thresholds is None:
        folder = None if case.folder is None else case.folder.folder
        if folder is None or not (folder / DAMAGE_FILE).exists():
            return OnMiss()
        return fitted_rule(case.source.spec, load_damage(folder), low) or OnMiss()
    try:
        exact_up_to, low_up_to = map(float, thresholds.split(","))
        return OnMiss(exact_up_to, low_up_to)
    except ValueError:
        raise typer.BadParameter(
            f"{thresholds}; expected two numbers T1,T2 with 0 <= T1 <= T2 <= 1, as in 0.6,0.9",
            param_hint="'--miss-thresholds'",
        ) from None


def kept_layout(case: Case) -> Layout:
    """The layout of the pack that the model has.

    Raises
    ------
    WorkspaceError
        When it has none.
    PackError
        When it cannot be used.
    """
    from moepack.formats import PackedModel

    if case.folder is None:
        raise WorkspaceError(
            f"{case.source.record.name} has not been packed, so there is no layout to keep; plan "
            "without --keep-layout"
        )
    return PackedModel.open(case.folder.pack_folder()).layout
