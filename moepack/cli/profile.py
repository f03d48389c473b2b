"""``moepack profile``: measure this machine, and how the model computes and routes on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moepack import records
from moepack.cli.models import open_source
from moepack.cli.options import JsonOption, ModelArgument
from moepack.cli.output import emit
from moepack.cli.progress import TerminalProgress
from moepack.errors import ProfileError
from moepack.shipped import shipped_texts
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack.compute import ComputeProfile
    from moepack.hardware import HardwareProfile
    from moepack.routing import RoutingProfile


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
    json: JsonOption = False,
) -> None:
    """Measure this machine and how the model routes."""
    from moepack.probe import probe_hardware
    from moepack.profiling import profile_model
    from moepack.report.profile import hardware_view, profile_view

    workspace = Workspace.locate()
    progress = TerminalProgress()
    texts = tuple(text or shipped_texts())
    source = None
    if not hardware_only:
        # First, so that a misspelt name is told before half a minute of measuring.
        _check_texts(texts)
        source = open_source(workspace, model, headers_only=False)
    workspace.create()
    hardware = probe_hardware(scratch=workspace.root, progress=progress, device=device)
    hardware.save(workspace.hardware_path)
    if source is None:
        emit(
            hardware_document(hardware),
            as_json=json,
            view=lambda: hardware_view(hardware),
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
    # Whole curves take seconds: only for those who read them.
    of_model = model_document(compute, routing) if json else {}
    emit(
        hardware_document(hardware) | of_model,
        as_json=json,
        view=lambda: profile_view(hardware, compute, routing),
    )


def _check_texts(texts: Sequence[Path]) -> None:
    from moepack.profiling import read_texts

    if not texts:
        raise ProfileError(
            "this installation of moepack lacks its texts; name files with --text, or install it "
            "again"
        )
    read_texts(texts)


def hardware_document(hardware: HardwareProfile) -> dict[str, object]:
    """What ``--json`` says of the machine."""
    return {"hardware": records.to_data(hardware)}


def model_document(compute: ComputeProfile, routing: RoutingProfile) -> dict[str, object]:
    """What ``--json`` says of the model: also the whole curves, over every size of a cache."""
    from moepack.hit_rates import layer_curves

    curves = [records.to_data(entry) for entry in layer_curves(routing.trace, routing.layers)]
    return {
        "compute": records.to_data(compute),
        "routing": records.to_data(routing.summary) | {"curves": curves},
    }
