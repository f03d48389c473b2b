"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from moepack.errors import DiskFullError, OutputError, ReadOnlyError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    The folder is made where it does not exist.

    Raises
    ------
    DiskFullError, ReadOnlyError, OutputError
        Naming the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                os.fchmod(handle, _file_mode())
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as failure:
        raise output_error(path, failure) from failure


def _file_mode() -> int:
    """What an ordinary new file gets; a temporary one is the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


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
