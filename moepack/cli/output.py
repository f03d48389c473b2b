"""Where a command's words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Lines are not broken for a reader that is a file or another program.
_FILE_WIDTH = 160


def emit(
    document: Mapping[str, object],
    *,
    as_json: bool,
    view: Callable[[], RenderableType] | None = None,
) -> None:
    """Print a command's result: the document with ``--json``, else what ``view`` draws."""
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))
    elif view is not None:
        _draw(view(), sys.stdout)


def show_beside(renderable: RenderableType) -> None:
    """Draw something beside the result."""
    _draw(renderable, sys.stderr)


def note(text: str) -> None:
    """Say something beside the result."""
    typer.echo(text, err=True)


def _draw(renderable: RenderableType, stream: TextIO) -> None:
    from rich.console import Console

    if stream.isatty():
        Console(file=stream, highlight=False).print(renderable)
        return
    console = Console(file=stream, width=_FILE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    # Cells are padded to the width of their column; a file has no use for that.
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), file=stream)
