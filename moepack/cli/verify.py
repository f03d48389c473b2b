"""``moepack verify``: every byte of a packed folder against its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moepack import records
from moepack.cli.models import pack_folder
from moepack.cli.options import JsonOption
from moepack.cli.output import emit
from moepack.cli.progress import TerminalProgress
from moepack.workspace import Workspace


def verify(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A packed folder. Without it: that of the current model.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check every byte of a packed folder against its digest."""
    from moepack.report.model import verify_view
    from moepack.verify import verify as check

    folder = folder or pack_folder(Workspace.locate(), None)
    found = check(folder, progress=TerminalProgress())
    emit(records.to_data(found), as_json=json, view=lambda: verify_view(found))
    found.raise_if_damaged()
