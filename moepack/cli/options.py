"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

import typer

from moepack import units

if TYPE_CHECKING:
    from moepack.model_spec import ModelSpec

T = TypeVar("T")


class Link(NamedTuple):
    """A throttled link."""

    rate_bytes_per_s: float
    latency_s: float


class SizeRange(NamedTuple):
    """Ends of a range of sizes."""

    low_bytes: int
    high_bytes: int


def usage(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose ``ValueError`` is the user's: exit 2, with its message."""

    @wraps(parse)
    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as failure:
            raise typer.BadParameter(str(failure)) from None

    return checked


#: Bytes of ``24G``.
size = usage(units.parse_size)


@usage
def size_range(text: str) -> SizeRange:
    """Bytes of both ends of ``4G:24G``."""
    low, colon, high = text.partition(":")
    if not colon:
        raise ValueError(f"not a range of sizes: {text!r}; expected LO:HI, as in 4G:24G")
    ends = units.parse_size(low), units.parse_size(high)
    if not 0 < ends[0] <= ends[1]:
        raise ValueError(f"the range {text!r} is empty; expected LO:HI, as in 4G:24G")
    return SizeRange(*ends)


@usage
def link(text: str) -> Link:
    """Bytes per second and seconds of ``2G``, of ``2G,50us``, of a preset or of a file.

    Raises
    ------
    ProfileError
        When it names a file that is not a link.
    """
    from moepack.presets import is_file_name, preset_names

    rate, comma, latency = text.partition(",")
    try:
        return Link(units.parse_rate(rate), units.parse_duration(latency) if comma else 0.0)
    except ValueError as failure:
        names = preset_names("link")
        if text not in names and (comma or not is_file_name(text)):
            raise ValueError(f"{failure}; or one of {', '.join(names)}") from None
    from moepack.links import find_link

    found = find_link(text)
    return Link(found.rate_bytes_per_s, found.latency_s)


class Lengths(NamedTuple):
    """What a plan is priced for, in tokens."""

    context_tokens: int
    prompt_tokens: int
    new_tokens: int


DEFAULT_LENGTHS = Lengths(context_tokens=4096, prompt_tokens=512, new_tokens=128)


def lengths(
    spec: ModelSpec, context: int | None = None, prompt: int | None = None, new: int | None = None
) -> Lengths:
    """What was asked for; a default gives way where the model's or the asked context is short."""
    if context is None:
        context = min(DEFAULT_LENGTHS.context_tokens, spec.context_length)
    if prompt is None:
        prompt = max(1, min(DEFAULT_LENGTHS.prompt_tokens, context // 2))
    if new is None:
        new = max(1, min(DEFAULT_LENGTHS.new_tokens, context - prompt))
    return Lengths(context, prompt, new)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub id such as Qwen/Qwen3-30B-A3B, or 'default' for the model that ships "
        "with moepack. Without it: the current model.",
        show_default=False,
    ),
]
PackOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR|MODEL",
        help="A packed folder, or a model that has been packed. Without it: the current model.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.")
]
LinkOption = Annotated[
    Link | None,
    typer.Option(
        "--link",
        parser=link,
        metavar="RATE[,LATENCY]|NAME",
        help="Throttle the link, as in 2G,50us or pcie3-x16 (moepack preset list link), to study a "
        "slower one.",
        show_default=False,
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write when everything happened, as a trace for ui.perfetto.dev: the first two "
        "million events, which is about a thousand tokens of a model of 48 layers. That takes up "
        "to 64 MiB of memory beside what is planned, and 400 MiB of disk.",
        show_default=False,
    ),
]
CheckOption = Annotated[
    Literal["first", "always", "never"],
    typer.Option("--check", help="Which reads of a segment are compared with its CRC-32."),
]
OutFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Where to write. Default: the workspace.", show_default=False
    ),
]
