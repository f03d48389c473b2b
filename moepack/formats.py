"""A packed folder, opened: every byte of its structure checked before a weight is read.

:meth:`PackedModel.open` trusts nothing: the version first, then the manifest's own digest, then
everything in :mod:`moepack.index_rules` and :mod:`moepack.file_rules`. Weights are not read; they
are checked when fetched (CRC-32) or by :mod:`moepack.verify` (SHA-256). The format is in
``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from moepack.errors import PackError, PlanMismatchError
from moepack.file_rules import check_files, check_shards
from moepack.index_rules import check_manifest
from moepack.layout import Layout
from moepack.manifest import (
    MANIFEST_FILE,
    PLAN_FILE,
    TRUNK_FILE,
    Manifest,
    SegmentEntry,
    TrunkTensor,
    read_manifest,
)
from moepack.model_spec import ModelSpec
from moepack.plan import Plan, load_plan
from moepack.segments import SegmentId
from moepack.trunk import trunk_name

__all__ = ["PackedModel", "SegmentEntry", "TrunkTensor", "check_plan_fits"]


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A packed folder whose structure has been checked. Made by :meth:`open`.

    Attributes
    ----------
    folder : Path
        Absolute.
    manifest : Manifest
        As read.
    entries : mapping
        Every segment, in the order of the manifest: by layer, top before bottom, by expert.
    trunk : tuple of TrunkTensor
        In the order of the shard; all in :attr:`trunk_path`.
    """

    folder: Path
    manifest: Manifest
    entries: Mapping[SegmentId, SegmentEntry]
    trunk: tuple[TrunkTensor, ...]

    @classmethod
    def open(cls, folder: Path) -> PackedModel:
        """Open a packed folder.

        Raises
        ------
        PackFormatError
            Of the class that names the broken rule.
        DamagedSegmentError
            When the manifest does not match its own digest.
        PackError
            When a file cannot be read.
        """
        try:
            folder = folder.resolve()
        except RuntimeError as failure:
            raise PackError(f"{failure}; expected a folder made by moepack pack") from None
        manifest = read_manifest(folder / MANIFEST_FILE)
        check_manifest(manifest)
        try:
            check_files(folder, manifest)
            check_shards(folder, manifest)
        except OSError as failure:
            raise PackError(f"{failure.filename or folder}: {failure.strerror}") from failure
        entries = {entry.id: entry for entry in manifest.entries()}
        return cls(folder, manifest, MappingProxyType(entries), manifest.trunk_tensors())

    @property
    def spec(self) -> ModelSpec:
        """The model, without a name."""
        return self.manifest.spec

    @property
    def layout(self) -> Layout:
        """How its experts are cut."""
        return self.manifest.layout

    @property
    def trunk_path(self) -> Path:
        """The file that holds every trunk tensor."""
        return self.folder / TRUNK_FILE

    def entry(self, segment: SegmentId) -> SegmentEntry:
        """Where a segment is.

        Raises
        ------
        PackError
            When the folder holds no such segment.
        """
        try:
            return self.entries[segment]
        except KeyError:
            raise PackError(f"{self.folder}: holds no segment {segment}") from None

    def path(self, entry: SegmentEntry) -> Path:
        """The file that a segment is in."""
        return self.folder / entry.path

    def plan(self) -> Plan:
        """The plan that lies in the folder.

        Raises
        ------
        PlanError
            When it cannot be read.
        PlanMismatchError
            When it is for another model or layout.
        """
        plan = load_plan(self.folder / PLAN_FILE)
        check_plan_fits(plan, self.manifest, str(self.folder))
        return plan


def check_plan_fits(plan: Plan, manifest: Manifest, where: str) -> None:
    """Refuse a plan that was made for another model, or for another layout of this one.

    Raises
    ------
    PlanMismatchError
        Naming the layers that would have to be packed again.
    """
    if plan.model_digest != manifest.layout.model_digest:
        raise PlanMismatchError(
            f"{where}: the plan is for model {plan.model_digest[:12]} ({plan.model_name}), the "
            f"folder holds {manifest.layout.model_digest[:12]}; plan this model or pack that one"
        )
    if plan.layout.low and plan.layout.low != manifest.layout.low:
        raise PlanMismatchError(
            f"{where}: the plan replaces missing experts by low copies in {plan.layout.low}, the "
            f"folder has {manifest.layout.low or 'none'}; pack again (what is there is reused), or "
            "plan without --on-miss"
        )
    if plan.layout.trunk != manifest.layout.trunk:
        raise PlanMismatchError(
            f"{where}: the plan's trunk is {trunk_name(plan.layout.trunk)}, the folder's "
            f"{trunk_name(manifest.layout.trunk)}; pack again (what is alike is reused) or plan "
            "with --keep-layout"
        )
    if plan.layout.digest != manifest.layout_digest:
        held = {layer.layer: layer for layer in manifest.layout.layers}
        changed = [str(cut.layer) for cut in plan.layout.layers if held.get(cut.layer) != cut]
        what = f"layers {', '.join(changed)}" if changed else "the prefill block"
        if not changed and plan.layout.low != manifest.layout.low:
            what = f"the low copies, of which the folder has some in {manifest.layout.low}"
        elif not changed and plan.layout.calibration != manifest.layout.calibration:
            has, wants = (
                f"calibration {name[:12]}" if name else "no calibration"
                for name in (manifest.layout.calibration, plan.layout.calibration)
            )
            what = f"how experts are rounded: by {has}, the plan by {wants}"
        raise PlanMismatchError(
            f"{where}: the plan's layout differs from the folder's in {what}; pack again "
            "(the other layers are reused) or plan with --keep-layout"
        )
