"""Taking over, by hard link, what an earlier pack of the same weights holds in the same cut.

Its bytes are checked against their digests first (about the price of reading them): a link never
carries damage from pack to pack, so packing again repairs a damaged folder.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moepack.errors import PackError
from moepack.formats import PackedModel
from moepack.progress import Progress
from moepack.shard_writer import Source
from moepack.shards import FinishedUnit, Unit
from moepack.verify import damages_in

#: The file system has no hard links, or no more of them.
_NO_LINKS = (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP)


def find_donors(source: Source, out: Path, reuse: Path | None) -> list[PackedModel]:
    """Packs of the same weights on the same disk as ``out``: ``reuse``, and ``out`` itself.

    A folder that cannot be opened gives nothing: packing again is how it is repaired.
    """
    models = []
    for folder in dict.fromkeys(path.resolve() for path in (reuse, out) if path is not None):
        with suppress(PackError):
            models.append(PackedModel.open(folder))
    device = out.parent.stat().st_dev
    return [
        model
        for model in models
        if model.manifest.weights_digest == source.weights_digest
        and model.spec.digest == source.spec.digest
        and model.folder.stat().st_dev == device
    ]


def find_donor(unit: Unit, donors: Iterable[PackedModel]) -> PackedModel | None:
    """A pack that holds a unit in the same cut: equal headers describe equal geometry."""
    entries = {shard.entry for shard in unit.shards}
    return next((model for model in donors if entries <= set(model.manifest.shards)), None)


def link_unit(
    donor: PackedModel, unit: Unit, folder: Path, progress: Progress
) -> FinishedUnit | None:
    """Link a unit's files into a folder; None, and no file, where they are damaged or will not.

    Raises
    ------
    OSError
        When a link fails for another reason than that the file system has none.
    """
    paths = [shard.path for shard in unit.shards]
    if any(damages_in(donor, path, progress) for path in paths):
        return None
    try:
        for path in paths:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(donor.folder / path)
    except OSError as failure:
        for path in paths:
            (folder / path).unlink(missing_ok=True)
        if failure.errno not in _NO_LINKS:
            raise
        return None
    return FinishedUnit(
        unit.name,
        tuple(shard.entry for shard in unit.shards),
        donor.manifest.trunk if unit.layer is None else (),
        tuple(group for group in donor.manifest.groups if group.shard in paths),
    )
