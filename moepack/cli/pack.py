"""``moepack pack``: rewrite the checkpoint into the packed folder of its plan."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from moepack import records
from moepack.cli.models import current_plan, open_source
from moepack.cli.options import JsonOption, ModelArgument, OutFolderOption
from moepack.cli.output import emit, note
from moepack.cli.progress import TerminalProgress
from moepack.errors import PackError
from moepack.units import format_size
from moepack.workspace import ModelFolder, Workspace


def pack(
    model: ModelArgument = None,
    out: OutFolderOption = None,
    json: JsonOption = False,
) -> None:
    """Rewrite the model for its newest plan."""
    from moepack.calibration import load_calibration
    from moepack.pack import disk_space
    from moepack.pack import pack as write_pack
    from moepack.report.model import pack_done_view

    workspace = Workspace.locate()
    source = open_source(workspace, model, headers_only=False)
    folder = workspace.remember(source.record)
    plan = current_plan(folder)
    place = folder.default_pack if out is None else out
    space = disk_space(source.spec, plan, place)
    note(
        f"packing {source.record.name} to {place}: at most {format_size(space.needed_bytes)}, "
        f"{format_size(space.free_bytes)} free"
    )
    weighed = load_calibration(folder.folder) if plan.layout.calibration else nullcontext()
    with weighed as calibration:
        done = write_pack(
            source.checkpoint,
            plan,
            place,
            progress=TerminalProgress(),
            reuse=_earlier_pack(folder, place),
            calibration=calibration,
        )
    workspace.make_current(folder.with_pack(place))
    emit(records.to_data(done), as_json=json, view=lambda: pack_done_view(done))


def _earlier_pack(folder: ModelFolder, place: Path) -> Path | None:
    """The model's pack at another place, whose layers may be linked; none if it is damaged."""
    from moepack.formats import PackedModel

    earlier = folder.record.pack
    if earlier is None or Path(earlier) == place.resolve():
        return None
    try:
        return PackedModel.open(Path(earlier)).folder if Path(earlier).exists() else None
    except (PackError, OSError) as failure:
        note(f"nothing is reused of {earlier}: {failure}")
        return None
