"""Which model, and which packed folder, a command means.

A command names a model (a folder, a hub id, ``default``), or nothing: then it means the current
one, and before any was named, the one that ships with moepack.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moepack.cli.progress import TerminalProgress
from moepack.errors import PlanMismatchError, WorkspaceError
from moepack.shipped import SHIPPED_MODEL, shipped_model
from moepack.source_files import local_folder
from moepack.workspace import ModelFolder, ModelRecord, Workspace

if TYPE_CHECKING:
    from moepack.checkpoint import Checkpoint
    from moepack.formats import PackedModel
    from moepack.model_spec import ModelSpec
    from moepack.plan import Plan


class Source(NamedTuple):
    """An opened model, and how to open it again."""

    checkpoint: Checkpoint
    record: ModelRecord

    @property
    def spec(self) -> ModelSpec:
        """The model, under the name that the user gave it."""
        return dataclasses.replace(self.checkpoint.spec, name=self.record.name)

    @property
    def is_here(self) -> bool:
        """Its weights are on this machine."""
        return self.checkpoint.folder is not None


def open_source(workspace: Workspace, model: str | None, *, headers_only: bool) -> Source:
    """Open the model that is meant.

    Raises
    ------
    CheckpointError
        When there is no such model, or it cannot be used.
    """
    from moepack.checkpoint import Checkpoint

    if model is None:
        current = workspace.current()
        model = SHIPPED_MODEL if current is None else current.record.source
    if model == SHIPPED_MODEL:
        place, source = str(shipped_model()), model
    else:
        folder = local_folder(model)
        place = source = model if folder is None else str(folder.resolve())
    checkpoint = Checkpoint.open(place, headers_only=headers_only, progress=TerminalProgress())
    record = ModelRecord(
        name=source if source == SHIPPED_MODEL else checkpoint.name,
        source=source,
        spec_digest=checkpoint.spec.digest,
        weights_digest=checkpoint.weights_digest,
    )
    return Source(checkpoint, record)


def open_pack(workspace: Workspace, model: str | None) -> PackedModel:
    """Open the packed folder that is meant: one that is named, or that of a model.

    Raises
    ------
    WorkspaceError
        When the model has not been packed.
    PackError
        When the folder cannot be used.
    """
    from moepack.formats import PackedModel

    return PackedModel.open(pack_folder(workspace, model))


def pack_folder(workspace: Workspace, model: str | None) -> Path:
    """Where the packed folder is that is meant.

    Raises
    ------
    WorkspaceError
        When the model has not been packed.
    CheckpointError
        When the name can be that of no model.
    """
    if model is None:
        current = workspace.current()
        if current is not None:
            return current.pack_folder()
    elif is_pack(model):
        return Path(model)
    if model is None or model == SHIPPED_MODEL or local_folder(model) is not None:
        known = workspace.find(open_source(workspace, model, headers_only=True).record.key)
    else:
        known = workspace.find_source(model)  # a hub id: no need to ask the hub
    if known is None:
        raise WorkspaceError(
            f"{model or 'the shipped model'} has not been packed, and is no packed folder; run "
            "moepack profile, plan and pack"
        )
    return known.pack_folder()


def is_pack(model: str) -> bool:
    """Whether a name is that of a packed folder that can be reached."""
    from moepack.manifest import MANIFEST_FILE

    try:
        return (Path(model) / MANIFEST_FILE).exists()
    except OSError:  # opened as a model, it is refused by name
        return False


def current_plan(folder: ModelFolder) -> Plan:
    """The newest plan of a model.

    Raises
    ------
    WorkspaceError
        When there is none.
    PlanError
        When it cannot be read.
    """
    from moepack.plan import load_plan

    if not folder.plan_path.exists():
        raise WorkspaceError(f"{folder.record.name} has no plan; run moepack plan --vram SIZE")
    return load_plan(folder.plan_path)


def plan_to_run(workspace: Workspace, packed: PackedModel, *, named: bool) -> Plan:
    """The newest plan for a packed folder.

    That is the model's newest plan in the workspace. A folder that is ``named`` on the command
    line falls back on the plan that lies in it, where the workspace's is for another layout.

    Raises
    ------
    PlanMismatchError
        When the newest plan needs other segments, naming the layers to pack again.
    """
    from moepack.formats import check_plan_fits

    known = find_packed(workspace, packed)
    if known is None or not known.plan_path.exists():
        return packed.plan()
    plan = current_plan(known)
    try:
        check_plan_fits(plan, packed.manifest, str(packed.folder))
    except PlanMismatchError:
        if not named:
            raise
        return packed.plan()
    return plan


def find_packed(workspace: Workspace, packed: PackedModel) -> ModelFolder | None:
    """What the workspace knows of the model in a packed folder."""
    digests = ModelRecord("", "", packed.spec.digest, packed.manifest.weights_digest)
    return workspace.find(digests.key)
