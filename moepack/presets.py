"""The profiles that ship with moepack, and where they are."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path

import moepack
from moepack.errors import PresetNotFoundError, ProfileError


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


def preset_names() -> list[str]:
    """Every hardware preset, sorted."""
    return sorted(path.stem for path in (presets_folder() / "hardware").glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a hardware preset.

    Raises
    ------
    PresetNotFoundError
        Naming the ones there are, and the closest.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else "or give the path of a file"
        raise PresetNotFoundError(
            f"no hardware preset is called {name!r}; there are {', '.join(names)}; {hint}"
        )
    return presets_folder() / "hardware" / f"{name}.yaml"
