"""Frozen records, and their strict way to and from JSON and YAML.

Everything that crosses a module or a file is a record: a frozen, slotted dataclass whose fields
pydantic checks when it is read (no unknown keys, no missing ones, no conversions).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from moepack.errors import MoepackError

T = TypeVar("T")

# Of a field, in its metadata: files leave it out where it is at its default.
_LEFT_OUT = "left out"


def added(*, default: T) -> T:
    """A field that was added to a record later, left out of files where it is at its default.

    So records that do not use it are written as before, byte for byte, and read by older versions.
    Its default has to be what a file without it meant: as it was then, or not known. A field for
    which there is no such value, and one whose meaning changes, takes a new version of the record
    that is the file.
    """
    field: T = dataclasses.field(default=default, metadata={_LEFT_OUT: True})
    return field


@dataclass_transform(frozen_default=True, field_specifiers=(added, dataclasses.field))
def record(cls: type[T]) -> type[T]:
    """Make a class a frozen, slotted dataclass that forbids unknown fields when it is read."""
    made = dataclasses.dataclass(frozen=True, slots=True)(cls)
    # Read by pydantic where the record is decoded; the record itself does not need pydantic.
    made.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
    return made


@functools.cache
def _adapter(cls: type[T]) -> Any:
    from pydantic import TypeAdapter  # deferred: a tenth of a second that most imports never need

    return TypeAdapter(cls)


def decode(
    cls: type[T],
    text: str | bytes,
    *,
    what: str,
    error: type[MoepackError],
    version: Version | None = None,
) -> T:
    """Read a record from JSON, strictly.

    Parameters
    ----------
    what
        How to name the document in the message, for instance ``plan plan.json``.
    error
        The class to raise.
    version
        That its ``version`` has to be; None for a record without one.

    Raises
    ------
    MoepackError
        ``error``, naming the first field that is wrong, what it holds and what was expected. Of a
        document of another version its version alone: that its fields differ follows from it.
    """
    from pydantic import ValidationError

    from moepack.complaints import complaint

    try:
        found: T = _adapter(cls).validate_json(text)  # type: ignore[arg-type]
    except ValidationError as failure:
        if version is not None:
            version.require(_stated_version(text), what, error)
        raise error(f"{what}: {complaint(cls, failure)}; correct it or make it anew") from None
    if version is not None:
        version.require(found.version, what, error)  # type: ignore[attr-defined]
    return found


class Version(NamedTuple):
    """The one version of a kind of document that this moepack reads.

    Attributes
    ----------
    number : int
    remedy : str
        How to get a document of this version, for instance ``plan again``.
    """

    number: int
    remedy: str

    def require(self, found: int | None, what: str, error: type[MoepackError]) -> None:
        """Raise ``error`` where a document states another version; None where it states none."""
        if found is None or found == self.number:
            return
        newer = "update moepack, or " if found > self.number else ""
        raise error(
            f"{what}: version {found}, this moepack reads {self.number}; {newer}{self.remedy}"
        )


def _stated_version(text: str | bytes) -> int | None:
    """What a document that is no such record says its version is."""
    from pydantic_core import from_json

    try:
        fields = from_json(text)
    except ValueError:
        return None
    found = fields.get("version") if isinstance(fields, dict) else None
    return found if type(found) is int else None


def decode_object(
    cls: type[T],
    data: object,
    *,
    what: str,
    error: type[MoepackError],
    version: Version | None = None,
) -> T:
    """Read a record from parsed JSON or YAML data, strictly. See :func:`decode`."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as failure:
        raise error(f"{what}: {failure}; expected plain numbers, texts, lists and maps") from None
    return decode(cls, text, what=what, error=error, version=version)


def load_yaml(
    cls: type[T],
    path: Path,
    *,
    what: str,
    error: type[MoepackError],
    remedy: str,
    version: int | None = None,
    limit_bytes: int | None = None,
) -> T:
    """Read a record from a YAML file, strictly.

    Parameters
    ----------
    what
        The kind of document, for instance ``compute profile``.
    remedy
        What to do when it cannot be read, for instance ``make one with moepack profile``.
    version
        That its ``version`` has to be; None for a record without one.
    limit_bytes
        A larger file is something else; None for a limit that suits them all.

    Raises
    ------
    MoepackError
        ``error``, when the file cannot be read, is not YAML, or is not such a record, or one of
        another version.
    """
    # Deferred: only profiles and presets are YAML.
    from moepack.yaml_files import MAX_YAML_BYTES, read_yaml

    what = f"{what} {path}"
    limit_bytes = limit_bytes or MAX_YAML_BYTES
    data = read_yaml(path, what=what, error=error, remedy=remedy, limit_bytes=limit_bytes)
    expected = None if version is None else Version(version, remedy)
    return decode_object(cls, data, what=what, error=error, version=expected)


def to_yaml(item: Any, *, header: str) -> bytes:
    """A record as YAML under a line of comment."""
    from moepack.yaml_files import to_yaml_text

    return f"# {header}\n{to_yaml_text(to_data(item))}".encode()


def to_data(item: Any) -> Any:
    """A record as plain dicts and lists (``None`` fields are kept)."""
    return json.loads(encode(item))


def to_short_data(item: Any) -> Any:
    """The same without the fields that are at their default."""
    return json.loads(json.dumps(_without_defaults(item)))


def encode(item: Any, *, indent: int | None = None) -> str:
    """A record as JSON. Equal records give equal text."""
    text: str = json.dumps(to_plain(item), indent=indent, ensure_ascii=False)
    return text


def to_plain(item: Any) -> Any:
    """A record as a dict, and what it holds as well: what a file of it says."""
    if isinstance(item, tuple | list):
        return tuple(map(to_plain, item))
    if isinstance(item, dict):
        return {name: to_plain(element) for name, element in item.items()}
    if not dataclasses.is_dataclass(item):
        return item
    return {
        field.name: to_plain(value)
        for field in dataclasses.fields(item)
        if (value := getattr(item, field.name)) != field.default
        or not field.metadata.get(_LEFT_OUT)
    }


def digest(item: Any) -> str:
    """SHA-256 over the canonical JSON of a record, as lower-case hex.

    Fields at their default are left out, so that a field that is added later, with a default,
    changes no digest.
    """
    canonical = json.dumps(_without_defaults(item), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_defaults(item: Any) -> Any:
    if isinstance(item, tuple | list):
        return [_without_defaults(element) for element in item]
    if isinstance(item, dict):
        return {name: _without_defaults(element) for name, element in item.items()}
    if not dataclasses.is_dataclass(item):
        return item
    return {
        field.name: _without_defaults(value)
        for field in dataclasses.fields(item)
        if (value := getattr(item, field.name)) != field.default
    }
