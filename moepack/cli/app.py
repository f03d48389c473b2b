"""The commands put together, and how each of them ends.

Exit codes: 0 done; 1 a named error, told in one line on standard error; 2 wrong usage; 130
interrupted. Standard output carries the result and nothing else. What a command needs is imported
when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import moepack
from moepack.cli.bench import bench
from moepack.cli.evaluate import evaluate
from moepack.cli.inspect import inspect
from moepack.cli.pack import pack
from moepack.cli.plan import plan
from moepack.cli.preset import preset
from moepack.cli.profile import profile
from moepack.cli.replay import replay
from moepack.cli.run import run
from moepack.cli.verify import verify
from moepack.errors import MoepackError

app = typer.Typer(
    name="moepack",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to load than the help takes to print
    pretty_exceptions_enable=False,
)
for command in (profile, plan, pack, run, bench, evaluate, replay, verify, inspect):
    # Python has a function that is called eval.
    app.command("eval" if command is evaluate else None)(command)
app.add_typer(preset)


@dataclasses.dataclass
class _Call:
    """What one command line says that every command obeys."""

    debug: bool = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moepack {moepack.__version__}")
        raise typer.Exit


@app.callback()
def moepack_command(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MOEPACK_DEBUG", help="Show the traceback of errors.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run mixture-of-experts models that are larger than fast memory, to plan.

    profile, plan, pack, run: each step finds what the step before it left. A model that is named
    once stays current; with none named, it is the small one that ships with moepack.
    """
    call: _Call = context.obj
    call.debug = debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; ``None`` means the process's own. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of failing.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone. Nothing is left for the interpreter's own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code


def _run(arguments: Sequence[str] | None) -> int:
    call = _Call()
    try:
        app(arguments, obj=call)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code == 130:
            typer.echo("interrupted", err=True)
        return code
    except MoepackError as failure:
        if call.debug:
            raise
        message = " ".join(str(failure).splitlines())
        typer.echo(f"{type(failure).__name__}: {message}", err=True)
        return 1
    return 0
