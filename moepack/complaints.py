"""What is wrong with a document that is not the record it should be, for whoever wrote it."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from moepack import units

if TYPE_CHECKING:
    from pydantic import ValidationError

_PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}

_UNKNOWN = "unexpected_keyword_argument"

#: What a number is, and how people write it, by the end of its field's name.
_UNITS = (
    ("bytes_per_s", "bytes per second", units.parse_rate),
    ("flop_per_s", "operations per second", None),
    ("_bytes", "bytes", units.parse_size),
    ("_s", "seconds", units.parse_duration),
)


def complaint(cls: type, failure: ValidationError) -> str:
    """The first thing that is wrong: which field, what it holds, what was expected.

    Parameters
    ----------
    cls
        The record that was read.
    failure
        From pydantic.
    """
    errors = failure.errors(include_url=False)
    # A misspelt key is also a missing one; its spelling is what helps.
    first = next((error for error in errors if error["type"] == _UNKNOWN), errors[0])
    path = first["loc"]
    text = _reason(cls, path, first)
    if path:
        text = f"{'.'.join(str(part) for part in path)}: {text}"
    return text if len(errors) == 1 else f"{text} (and {len(errors) - 1} more)"


def _reason(cls: type, path: Sequence[str | int], error: Any) -> str:
    kind, found = error["type"], error["input"]
    if kind == "value_error":  # a record's own check, which says all of this itself
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        return str(error["msg"]).lower()
    if not path:
        return f"the document: expected {_words(cls, '')}, got {_short(found)}"
    fields = _fields_around(cls, path)
    name = path[-1]
    if kind == _UNKNOWN:
        close = difflib.get_close_matches(str(name), fields, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"there are {', '.join(fields)}, unless a newer moepack wrote it"
        )
        return f"unknown key (got {_short(found)}); {hint}"
    field = next((part for part in reversed(path) if isinstance(part, str)), "")
    if field not in fields:  # an entry of a map
        return f"{str(error['msg']).replace('Input should be', 'expected')}, got {_short(found)}"
    expected = _words(fields[field], field, inside=isinstance(name, int))
    got = "" if kind == "missing" else f", got {_short(found)}"
    missing = "missing, " if kind == "missing" else ""
    return f"{missing}expected {expected}{got}{_conversion(field, fields[field], found)}"


def _fields_around(cls: type, path: Sequence[str | int]) -> dict[Any, Any]:
    """Name and type of each field of the record that the last name of a path is in."""
    names = [part for part in path if isinstance(part, str)]
    around: type | None = cls
    outer = iter(names[:-1])
    for name in outer:
        hint = typing.get_type_hints(around).get(name)
        around = next(_records_in(hint), None)
        if around is None:
            return {}
        if typing.get_origin(hint) is dict:
            next(outer, None)  # the name of an entry
    return typing.get_type_hints(around)


def _records_in(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for argument in typing.get_args(hint):
        yield from _records_in(argument)


def _words(hint: Any, field: str, *, inside: bool = False) -> str:
    """What a type means to whoever writes the document; ``inside``: an element of the field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(argument, field, inside=inside) for argument in arguments)
    if origin in (tuple, list):
        return _words(arguments[0], field) if inside else "a list"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"a map of {', '.join(item.name for item in dataclasses.fields(hint))}"
    if origin is dict:
        return "a map"
    unit = next((unit for suffix, unit, _ in _UNITS if field.endswith(suffix)), None)
    words = _PLAIN.get(hint, "something else")
    return f"{words} of {unit}" if unit and hint in (int, float) else words


def _conversion(field: str, hint: Any, found: object) -> str:
    """``24G`` or ``2.0e+09`` as what should have been written."""
    wanted = {hint, *typing.get_args(hint)}
    if int in wanted and isinstance(found, float) and found.is_integer():
        return f"; write {found:.0f}"
    if isinstance(found, str) and wanted & {int, float}:
        for suffix, _, parse in _UNITS:
            if parse is not None and field.endswith(suffix):
                try:
                    return f"; write {parse(found):.12g}"
                except ValueError:
                    return ""
    return ""


def _short(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
