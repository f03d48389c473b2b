"""The profiles that ship with moepack: which kinds there are, what they are called, where they lie.

Names are unique over all kinds, so that a name alone says what is meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import moepack
from moepack.errors import PresetNotFoundError, ProfileError


class Kind(NamedTuple):
    """One kind of preset: its folder, and by name what is imported when one is read."""

    name: str
    folder: str
    module: str
    record: str
    loader: str

    def load(self, path: Path) -> Any:
        """Read a file of this kind.

        Raises
        ------
        ProfileError
            When it cannot be read, or a field is wrong, naming it.
        """
        return getattr(importlib.import_module(self.module), self.loader)(path)

    @property
    def fields(self) -> set[str]:
        """Keys of such a file."""
        record = getattr(importlib.import_module(self.module), self.record)
        return {field.name for field in dataclasses.fields(record)}


KindName = Literal["hardware", "link", "routing"]

KINDS = {
    kind.name: kind
    for kind in (
        Kind("hardware", "hardware", "moepack.hardware", "HardwareProfile", "load_hardware"),
        Kind("link", "links", "moepack.links", "LinkPreset", "load_link"),
        Kind("routing", "routing", "moepack.routing_model", "RoutingModel", "load_routing_model"),
    )
}


class Preset(NamedTuple):
    """A file that ships."""

    kind: Kind
    name: str
    path: Path

    def load(self) -> Any:
        """The record in it."""
        return self.kind.load(self.path)


def presets_folder() -> Path:
    """The folder ``profiles``: inside the installed package, or beside it in the repository.

    Raises
    ------
    ProfileError
        When it is in neither place.
    """
    installed = Path(str(importlib.resources.files(moepack) / "profiles"))
    beside = Path(moepack.__file__).parents[1] / "profiles"
    for folder in (installed, beside):
        if folder.is_dir():
            return folder
    raise ProfileError(
        f"moepack's presets are neither in {installed} nor in {beside}; install it anew"
    )


def presets(kinds: Sequence[str] = tuple(KINDS)) -> list[Preset]:
    """Every preset of some kinds, sorted within each."""
    folder = presets_folder()
    return [
        Preset(KINDS[kind], path.stem, path)
        for kind in kinds
        for path in sorted((folder / KINDS[kind].folder).glob("*.yaml"))
    ]


def preset_names(kind: str = "hardware") -> list[str]:
    """Names of every preset of a kind, sorted."""
    return [preset.name for preset in presets([kind])]


def find_preset(name: str, kinds: Sequence[str] = tuple(KINDS)) -> Preset:
    """The preset of a name.

    Raises
    ------
    PresetNotFoundError
        Naming the ones there are, and the closest.
    """
    known = {preset.name: preset for preset in presets(kinds)}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        what, hint = "preset", "see moepack preset list"
        if len(kinds) == 1:
            what, hint = f"{kinds[0]} preset", "or give the path of a file"
        hint = f"did you mean {close[0]}?" if close else hint
        raise PresetNotFoundError(
            f"no {what} is called {name!r}; there are {', '.join(known)}; {hint}"
        )
    return known[name]


def preset_path(name: str, kind: str = "hardware") -> Path:
    """The file of a preset; see :func:`find_preset`."""
    return find_preset(name, [kind]).path


def resolve(name_or_path: str, kind: str) -> Path:
    """The file that is meant by a preset's name or by a path.

    Raises
    ------
    PresetNotFoundError
        When there is no such preset, and it does not look like a path.
    """
    if is_file_name(name_or_path):
        return Path(name_or_path)
    return preset_path(name_or_path, kind)


def is_file_name(text: str) -> bool:
    """Whether a text looks like a path, or is the name of a file that is there."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return True
    try:
        return path.is_file()
    except OSError:  # too long a name, for one
        return False


def kind_of(path: Path) -> Kind:
    """Which kind of preset a file is, right or wrong, by the keys in it.

    Raises
    ------
    ProfileError
        When it cannot be read, or looks like none.
    """
    from moepack.yaml_files import read_yaml

    remedy = "copy a preset with moepack preset copy"
    data = read_yaml(path, what=f"preset {path}", error=ProfileError, remedy=remedy)
    keys = {str(key) for key in data} if isinstance(data, dict) else set()
    fields = {name: kind.fields for name, kind in KINDS.items()}
    common = set.intersection(*fields.values())
    likeness = {name: len(keys & (own - common)) for name, own in fields.items()}
    best = max(likeness, key=lambda name: likeness[name])
    if not likeness[best]:
        known = "; ".join(
            f"{name}: {', '.join(sorted(own - common))}" for name, own in fields.items()
        )
        raise ProfileError(
            f"preset {path}: none of its keys is one of a preset ({known}); {remedy}"
        )
    return KINDS[best]
