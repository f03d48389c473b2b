"""``moepack profile``: measure this machine, and how the model computes and routes on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moepack import records
from moepack.cli.models import Source, open_source
from moepack.cli.options import JsonOption, ModelArgument
from moepack.cli.output import emit, note
from moepack.cli.progress import TerminalProgress
from moepack.errors import ProfileError
from moepack.shipped import shipped_texts
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moepack.agreement import Comparison
    from moepack.compute import ComputeProfile
    from moepack.damage_probe import Measured
    from moepack.hardware import HardwareProfile
    from moepack.progress import Progress
    from moepack.roofline_check import RooflineCheck
    from moepack.routing import RoutingProfile
    from moepack.workspace import ModelFolder


def profile(
    model: ModelArgument = None,
    hardware_only: Annotated[
        bool, typer.Option("--hardware-only", help="Measure the machine and no model.")
    ] = False,
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        typer.Option("--device", help="What computes; auto: a GPU where there is one."),
    ] = "auto",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to record the routing on; may be repeated. Default: the texts that ship "
            "with moepack.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        bool,
        typer.Option(
            "--bits",
            help="Also measure what the inputs of each expert are like, by which plan then has "
            "experts rounded; what rounding does to each, and what choosing the precision of each "
            "by that would gain. Rounds the whole model to every precision that it fits.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Measure this machine and how the model routes."""
    from moepack.probe import probe_hardware
    from moepack.profiling import profile_model
    from moepack.report.profile import hardware_view, profile_view
    from moepack.roofline_check import check_roofline

    if bits and hardware_only:
        raise typer.BadParameter(
            "it measures the model, and --hardware-only none; leave out one of the two",
            param_hint="'--bits'",
        )
    workspace = Workspace.locate()
    progress = TerminalProgress()
    texts = tuple(text or shipped_texts())
    source = None
    if not hardware_only:
        # First, so that a misspelt name is told before half a minute of measuring.
        _check_texts(texts)
        source = open_source(workspace, model, headers_only=False)
    workspace.create()
    before = _last_profile(workspace)
    hardware = probe_hardware(scratch=workspace.root, progress=progress, device=device)
    hardware.save(workspace.hardware_path)
    comparisons = _compare(before, hardware)
    if source is None:
        emit(
            hardware_document(hardware, comparisons),
            as_json=json,
            view=lambda: hardware_view(hardware, comparisons),
        )
        return
    compute, routing = profile_model(
        source.checkpoint,
        hardware=hardware,
        texts=texts,
        scratch=workspace.root,
        progress=progress,
    )
    # The shipped model's folder is called otherwise than the model.
    name = source.record.name
    compute = dataclasses.replace(compute, model_name=name)
    summary = dataclasses.replace(routing.summary, model_name=name)
    routing = dataclasses.replace(routing, summary=summary)
    folder = workspace.remember(source.record)
    compute.save(folder.compute_path)
    routing.save(folder.folder)
    workspace.make_current(folder)
    measured = _measure_damage(source, folder, hardware, texts, progress) if bits else None
    check = check_roofline(source.spec, hardware, compute)
    # Whole curves take seconds: only for those who read them.
    of_model = model_document(compute, routing, check) if json else {}
    if measured is not None:
        of_model["damage"] = records.to_data(measured.damage)
        of_model["second_moments"] = {
            "bytes": measured.calibration.second_bytes,
            "layers": {
                str(layer): records.to_data(kept)
                for layer, kept in measured.calibration.kept.items()
            },
        }
    emit(
        hardware_document(hardware, comparisons) | of_model,
        as_json=json,
        view=lambda: _view(
            profile_view(hardware, compute, routing, check, comparisons), source, measured
        ),
    )


def _measure_damage(
    source: Source,
    folder: ModelFolder,
    hardware: HardwareProfile,
    texts: Sequence[Path],
    progress: Progress,
) -> Measured:
    from moepack.damage_probe import measure_damage
    from moepack.factor_file import FactorFile

    with FactorFile.temporary(folder.folder) as factors:
        measured = measure_damage(
            source.checkpoint,
            device=hardware.device,
            texts=texts,
            factors=factors,
            progress=progress,
        )
        measured.calibration.save(folder.folder)
    measured = measured._replace(
        damage=dataclasses.replace(measured.damage, model_name=source.record.name)
    )
    measured.damage.save(folder.folder)
    return measured


def _view(profile: RenderableType, source: Source, measured: Measured | None) -> RenderableType:
    """The profile, with what rounding does where that was measured."""
    from rich.console import Group

    from moepack.miss_thresholds import fitted_rule
    from moepack.mixed_precision import sample_choices
    from moepack.report.damage import damage_view

    if measured is None:
        return profile
    spec, damage = source.spec, measured.damage
    rule = None if damage.misses is None else fitted_rule(spec, damage, damage.misses.encoding)
    choices = sample_choices(spec, damage)
    return Group(profile, "", damage_view(damage, choices, rule, measured.calibration))


def _last_profile(workspace: Workspace) -> HardwareProfile | None:
    """What was measured here before; None where nothing was, or (said) it cannot be read."""
    from moepack.hardware import load_hardware

    if not workspace.hardware_path.exists():
        return None
    try:
        return load_hardware(workspace.hardware_path)
    except ProfileError as failure:
        note(f"the profile of before is not compared: {failure}")
        return None


def _compare(before: HardwareProfile | None, now: HardwareProfile) -> list[Comparison]:
    from moepack.agreement import compare_profiles

    if before is None or (before.source, before.name) != (now.source, now.name):
        return []
    return compare_profiles(before, now)


def _check_texts(texts: Sequence[Path]) -> None:
    from moepack.texts import read_texts

    if not texts:
        raise ProfileError(
            "this installation of moepack lacks its texts; name files with --text, or install it "
            "again"
        )
    read_texts(texts)


def hardware_document(
    hardware: HardwareProfile, comparisons: Sequence[Comparison] = ()
) -> dict[str, object]:
    """What ``--json`` says of the machine, and of the profile before where there was one."""
    document: dict[str, object] = {"hardware": records.to_data(hardware)}
    if comparisons:
        outside = [comparison for comparison in comparisons if not comparison.agrees]
        document["agreement"] = {
            "figures": len(comparisons),
            "within_spread": len(comparisons) - len(outside),
            "outside": [comparison._asdict() for comparison in outside],
        }
    return document


def model_document(
    compute: ComputeProfile, routing: RoutingProfile, check: RooflineCheck
) -> dict[str, object]:
    """What ``--json`` says of the model: also the whole curves, over every size of a cache."""
    from moepack.hit_rates import layer_curves

    curves = [records.to_data(entry) for entry in layer_curves(routing.trace, routing.layers)]
    pieces = [piece._asdict() for piece in check.pieces]
    ratios = {"token_ratio": check.token_ratio, "block_ratio": check.block_ratio}
    return {
        "compute": records.to_data(compute),
        "roofline": check._asdict() | ratios | {"pieces": pieces},
        "routing": records.to_data(routing.summary) | {"curves": curves},
    }
