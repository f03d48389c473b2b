"""``moepack preset``: the machines, links and routings that ship, to look at and to start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moepack import records
from moepack.cli.options import JsonOption
from moepack.cli.output import emit, note
from moepack.errors import OutputError
from moepack.presets import KINDS, KindName, Preset, find_preset, kind_of, presets

preset = typer.Typer(
    name="preset",
    help="Look at the machines, links and routings that ship, and make your own from them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="One of moepack preset list.")]


@preset.command("list")
def list_presets(
    kind: Annotated[
        KindName | None,
        typer.Argument(help="Of one kind only.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what ships."""
    from moepack.report.preset import presets_view

    found = presets([kind] if kind else tuple(KINDS))
    emit(
        {"presets": [_place(preset) for preset in found]},
        as_json=json,
        view=lambda: presets_view(found),
    )


@preset.command()
def show(name: NameArgument, json: JsonOption = False) -> None:
    """Print a preset with the source of each number, as the YAML that it is."""
    found = find_preset(name)
    if json:
        emit(_place(found) | {"preset": records.to_data(found.load())}, as_json=True)
    else:
        typer.echo(found.path.read_text("utf-8"), nl=False)


@preset.command()
def copy(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to, for instance mine.yaml.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Copy a preset, to edit it and to plan with it."""
    from moepack.atomic import write_atomically
    from moepack.yaml_files import to_yaml_text

    found = find_preset(name)
    if file.exists() and not force:
        raise OutputError(f"{file} exists; name another file, or overwrite it with --force")
    # Under the name of its file: a plan for it must not pass for one for the preset.
    named = to_yaml_text({"name": file.stem}, flow=False)
    text = found.path.read_text("utf-8")
    text = re.sub(r"^name: .*\n", lambda _: named, text, count=1, flags=re.MULTILINE)
    write_atomically(file, text.encode())
    note(f"{name} copied to {file}; moepack preset check {file} tells whether it can still be read")
    emit(_place(found) | {"file": str(file)}, as_json=json)


@preset.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copied and edited preset.")],
    json: JsonOption = False,
) -> None:
    """Tell whether a file can be read, and if not, which field is wrong."""
    from rich.text import Text

    kind = kind_of(file)
    record = kind.load(file)
    emit(
        {"kind": kind.name, "name": record.name, "file": str(file), "valid": True},
        as_json=json,
        view=lambda: Text(f"{file}: {record.name}, a {kind.name} preset without a mistake in it"),
    )


def _place(preset: Preset) -> dict[str, object]:
    return {"kind": preset.kind.name, "name": preset.name, "file": str(preset.path)}
