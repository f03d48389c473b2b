"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moepack.errors import DiskFullError, OutputError, ReadOnlyError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    The folder is made where it does not exist.

    Raises
    ------
    DiskFullError, ReadOnlyError, OutputError
        Naming the file.
    """
    with writing_atomically(path) as out:
        out.write(data)


@contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """The same for what is written in pieces; after an error inside, the old content stays."""
    try:
        _refuse_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as out:  # with the mode that any new file gets
                yield out
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as failure:
        raise output_error(path, failure) from failure


def require_writable(path: Path) -> None:
    """Refuse what :func:`write_atomically` would, before the work whose result it is.

    Raises
    ------
    ReadOnlyError, DiskFullError, OutputError
        Naming the file.
    """
    try:
        _refuse_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as failure:
        raise output_error(path, failure) from failure


def _refuse_folder(path: Path) -> None:
    # Before a name is made of the path's: that of the empty path, a folder, is none.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_error(path: Path, failure: OSError) -> OutputError:
    """The named error for a failure to write ``path``."""
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{path}: the disk is full; free some space and try again")
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ReadOnlyError(f"{path}: {failure.strerror}; choose a folder that can be written")
    return OutputError(f"{path}: {failure.strerror}; expected a place that can be written")
