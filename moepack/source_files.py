"""The files of a checkpoint: where they are, and their bytes by range.

What is in them is parsed in :mod:`moepack.source_headers`.
"""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Protocol

from moepack.errors import CheckpointError, ModelNotFoundError
from moepack.source_headers import (
    LENGTH_BYTES,
    TensorHeader,
    damaged,
    header_bytes,
    parse_header,
)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class ModelFiles(Protocol):
    """Where a model's files come from: a folder, or a repository on the hub."""

    @property
    def name(self) -> str:
        """What messages call the model."""

    @property
    def files(self) -> Container[str]:
        """Names of the files."""

    def read(self, file: str) -> bytes:
        """A small file, whole."""

    def read_header(self, file: str) -> dict[str, TensorHeader]:
        """Every tensor of a shard."""

    def weights_digest(self, shards: tuple[str, ...]) -> str | None:
        """Identity of the weights, where it is known without reading them."""


def local_folder(name: str | Path) -> Path | None:
    """The folder that a model's name stands for; None where there is no such folder.

    Raises
    ------
    ModelNotFoundError
        When the name can be that of no folder: of a user who does not exist, or too long.
    CheckpointError
        When the folder cannot be reached.
    """
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except RuntimeError:
        raise ModelNotFoundError(
            f"{name}: there is no such user; expected a model's folder, or a hub id such as"
            " Qwen/Qwen3-30B-A3B"
        ) from None
    except PermissionError as failure:
        raise CheckpointError(
            f"{name}: {failure.strerror}; expected a readable folder; correct its permissions"
        ) from None
    except OSError as failure:
        raise ModelNotFoundError(
            f"{name}: {failure.strerror}; expected a model's folder, or a hub id such as"
            " Qwen/Qwen3-30B-A3B"
        ) from None


class FolderFiles:
    """A model's folder.

    Raises
    ------
    CheckpointError
        When it cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        try:
            self.files = frozenset(path.name for path in folder.iterdir())
        except OSError as failure:
            raise CheckpointError(
                f"{folder}: {failure.strerror}; expected a readable folder; correct its permissions"
            ) from None
        self._folder = folder

    def read(self, file: str) -> bytes:
        """See :class:`ModelFiles`."""
        return read_file(self._folder / file)

    def read_header(self, file: str) -> dict[str, TensorHeader]:
        """See :class:`ModelFiles`."""
        return read_header(self._folder / file, file, f"{self.name}: {file}")

    def weights_digest(self, shards: tuple[str, ...]) -> str | None:  # noqa: ARG002
        """See :class:`ModelFiles`; a folder does not know."""
        return None


def read_header(path: Path, file: str, what: str) -> dict[str, TensorHeader]:
    """Every tensor of a shard on disk. See :func:`parse_header`."""
    try:
        with path.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            length = header_bytes(stream.read(LENGTH_BYTES), file_bytes, what)
            header = stream.read(length)
    except OSError as failure:
        raise damaged(what, f"no readable file ({failure.strerror})", "a shard") from None
    return parse_header(header, file, file_bytes, what)


def read_file(path: Path) -> bytes:
    """A small file, whole.

    Raises
    ------
    DamagedCheckpointError
        When it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as failure:
        raise damaged(str(path), f"unreadable ({failure.strerror})", "a file") from None


def read_range(path: Path, offset_bytes: int, size_bytes: int) -> bytearray:
    """Bytes of a file, by position.

    Raises
    ------
    DamagedCheckpointError
        When the file ends before, or cannot be read.
    """
    return read_places(path, [(offset_bytes, size_bytes)])


def read_places(path: Path, places: Sequence[tuple[int, int]]) -> bytearray:
    """Several (offset, size) of a file, one after another. Raises as :func:`read_range` does."""
    buffer = bytearray(sum(size_bytes for _, size_bytes in places))
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            for offset_bytes, size_bytes in places:
                _read_into(file.fileno(), view[:size_bytes], offset_bytes)
                view = view[size_bytes:]
    except EOFError as failure:
        raise damaged(str(path), "it ends too early", f"{failure} bytes or more") from None
    except OSError as failure:
        raise damaged(str(path), f"unreadable ({failure.strerror})", "a shard") from None
    return buffer


def _read_into(descriptor: int, view: memoryview, offset_bytes: int) -> None:
    done_bytes = 0
    while done_bytes < len(view):
        count = os.preadv(descriptor, [view[done_bytes:]], offset_bytes + done_bytes)
        if count == 0:
            raise EOFError(offset_bytes + len(view))
        done_bytes += count
