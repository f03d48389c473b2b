"""The workspace: which model is current, and where what is known of it lies.

::

    $MOEPACK_HOME/                  else the platform's folder for a user's data
        hardware.yaml               this machine, for every model
        current                     key of the current model
        models/<key>/
            model.json              name, source and digests of the model; where its pack is
            compute.yaml            seconds a layer on this machine
            routing.yaml, .npz      how it routes
            damage.json             what rounding does to its experts
            calibration.npz         what rounding them is weighed by
            second_moments.bin      and by what errors are made good
            plan.json               the newest plan
            pack/                   the packed folder, unless another place was chosen

The key is made of the digest of the model's structure and that of its weights, so two models
never share a folder, and one model keeps its folder when it is moved or renamed. Files are
written atomically: processes may share a workspace, and the last writer of a file wins.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from moepack import records
from moepack.atomic import output_error, write_atomically
from moepack.errors import PlanMismatchError, WorkspaceError
from moepack.plan import Plan
from moepack.records import record

_KEY_HEX = 16


@record
class ModelRecord:
    """What a model's folder is about.

    Attributes
    ----------
    name : str
        For people.
    source : str
        What opens it again: an absolute folder, a hub id, or ``default`` for the shipped model.
    spec_digest, weights_digest : str
        Identity of its structure and of its weights.
    pack : str or None
        Its newest packed folder, absolute.
    """

    name: str
    source: str
    spec_digest: str
    weights_digest: str
    pack: str | None = None

    @property
    def key(self) -> str:
        """Name of the model's folder in the workspace."""
        return f"{self.spec_digest[:_KEY_HEX]}-{self.weights_digest[:_KEY_HEX]}"


@record
class _Current:
    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the workspace knows of one model. Its files exist once the step that makes them ran."""

    folder: Path
    record: ModelRecord

    @property
    def compute_path(self) -> Path:
        """Compute profile."""
        return self.folder / "compute.yaml"

    @property
    def routing_path(self) -> Path:
        """Summary of the routing profile; its trace lies beside it."""
        return self.folder / "routing.yaml"

    @property
    def plan_path(self) -> Path:
        """The newest plan."""
        return self.folder / "plan.json"

    @property
    def default_pack(self) -> Path:
        """Where ``moepack pack`` writes when it is not told."""
        return self.folder / "pack"

    def save_plan(self, plan: Plan) -> None:
        """Make a plan the model's newest.

        Raises
        ------
        PlanMismatchError
            When it is for another machine or another model: such a plan is never current.
        """
        if not plan.provenance.hardware_is_this_machine:
            raise PlanMismatchError(
                f"a plan for {plan.provenance.hardware}, which is not this machine, cannot become "
                "current; write it to a file with --out"
            )
        if plan.model_digest != self.record.spec_digest:
            raise PlanMismatchError(
                f"a plan for model {plan.model_digest[:12]} cannot become current for "
                f"{self.record.name} ({self.record.spec_digest[:12]}); plan this model"
            )
        write_atomically(self.plan_path, records.encode(plan, indent=1).encode())

    def pack_folder(self) -> Path:
        """Where the model's packed folder is.

        Raises
        ------
        WorkspaceError
            When the model has not been packed.
        """
        if self.record.pack is None:
            raise WorkspaceError(f"{self.record.name} has not been packed; run moepack pack")
        return Path(self.record.pack)

    def with_pack(self, folder: Path) -> ModelFolder:
        """Remember where the model's newest packed folder is."""
        known = dataclasses.replace(self.record, pack=str(folder.resolve()))
        write_atomically(self.folder / "model.json", records.encode(known, indent=1).encode())
        return ModelFolder(self.folder, known)


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """The folder that the commands share. See the module's docstring for what is in it."""

    root: Path

    @classmethod
    def locate(cls) -> Workspace:
        """``$MOEPACK_HOME``, else the platform's folder for a user's data.

        Raises
        ------
        WorkspaceError
            When there is no such home directory.
        """
        chosen = os.environ.get("MOEPACK_HOME")
        try:
            return cls(Path(chosen).expanduser().absolute() if chosen else _user_data() / "moepack")
        except RuntimeError as failure:
            raise WorkspaceError(
                f"{chosen or '~'}: {failure} set MOEPACK_HOME to a folder of your own"
            ) from None

    def create(self) -> None:
        """Make the folder where it does not exist.

        Raises
        ------
        OutputError
            When it cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise output_error(self.root, failure) from None

    @property
    def hardware_path(self) -> Path:
        """Hardware profile of this machine."""
        return self.root / "hardware.yaml"

    def current(self) -> ModelFolder | None:
        """The current model; None before the first was named.

        Raises
        ------
        WorkspaceError
            When what the workspace says of it cannot be read.
        """
        path = self.root / "current"
        text = _read(path)
        if text is None:
            return None
        key = records.decode(_Current, text, what=str(path), error=WorkspaceError).key
        folder = self.find(key)
        if folder is None:
            raise WorkspaceError(
                f"{path}: names the model {key}, of which {self.root} knows nothing; name a model, "
                "as in: moepack profile default"
            )
        return folder

    def find(self, key: str) -> ModelFolder | None:
        """The model of a key; None where the workspace does not know it."""
        if key != Path(key).name:
            raise WorkspaceError(f"{self.root}: {key!r} is not the key of a model; name a model")
        folder = self.root / "models" / key
        path = folder / "model.json"
        text = _read(path)
        if text is None:
            return None
        known = records.decode(ModelRecord, text, what=str(path), error=WorkspaceError)
        if known.key != key:
            raise WorkspaceError(
                f"{path}: is about {known.key}; remove {folder} and profile the model again"
            )
        return ModelFolder(folder, known)

    def find_source(self, source: str) -> ModelFolder | None:
        """The model that was last opened under this source; None where there was none."""
        found = None
        for path in sorted(self.root.glob("models/*/model.json"), key=lambda p: p.stat().st_mtime):
            known = self.find(path.parent.name)
            if known is not None and known.record.source == source:
                found = known
        return found

    def remember(self, model: ModelRecord) -> ModelFolder:
        """Give a model its folder, or renew what is known of it. Its pack stays remembered."""
        before = self.find(model.key)
        if before is not None and model.pack is None:
            model = dataclasses.replace(model, pack=before.record.pack)
        folder = self.root / "models" / model.key
        # Even where nothing has changed: find_source goes by the time of writing.
        write_atomically(folder / "model.json", records.encode(model, indent=1).encode())
        return ModelFolder(folder, model)

    def make_current(self, model: ModelFolder) -> None:
        """Later commands that name no model mean this one."""
        current = _Current(model.record.key)
        write_atomically(self.root / "current", records.encode(current).encode())


def _user_data() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    chosen = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification has relative paths ignored.
    return Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".local" / "share"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise WorkspaceError(
            f"{path}: {failure.strerror}; expected a readable file: correct its permissions, or "
            "set MOEPACK_HOME to another folder"
        ) from None
