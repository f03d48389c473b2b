"""The model and the texts that travel inside the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from moepack.errors import ModelNotFoundError

#: The name under which the shipped model is asked for.
SHIPPED_MODEL = "default"


def shipped_model() -> Path:
    """Folder of the shipped model: an ordinary Hugging Face checkpoint.

    Raises
    ------
    ModelNotFoundError
        When this installation was made without it.
    """
    folder = _assets() / "model"
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{folder}: this installation of moepack lacks the shipped model; expected "
            "config.json and model.safetensors there: install again, or name a model"
        )
    return folder


def shipped_texts() -> tuple[Path, ...]:
    """The default calibration and evaluation texts, one file a domain, by name."""
    return tuple(sorted((_assets() / "texts").glob("*.txt")))


def _assets() -> Path:
    return Path(str(resources.files("moepack"))) / "assets"
