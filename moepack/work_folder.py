"""The folder in which a pack grows, until it appears under its name in one step.

Beside ``OUT`` lie, while packing, ``OUT.partial`` (exactly the files of the finished pack) and
``OUT.partial.journal``. The journal is the lock against a second packer, and the truth about what
is finished: a unit gets its line after its files have been flushed to the disk, and any file that
no line vouches for is removed when packing resumes. A kill at any point therefore loses one unit
at most.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from moepack import records
from moepack.atomic import sync_folder
from moepack.errors import OutputError, OutputInUseError, PackFormatError
from moepack.manifest import MANIFEST_FILE, is_manifest
from moepack.records import record
from moepack.shards import FinishedUnit

T = TypeVar("T")

_JOURNAL_VERSION = 1


@record
class _Start:
    """First line of the journal: what is being packed."""

    journal: Literal["moepack"]
    version: int
    model_digest: str
    weights_digest: str


@record
class _Publishing:
    """Last line: from here on the folder may already have changed places with an older pack.

    Packs of two models can agree in every size and header, so a journal must not vouch for files
    that it did not see written: on resuming, its lines count only if the manifest is this one.
    """

    manifest_sha256: str


class WorkFolder:
    """``OUT.partial`` under lock. Made by :meth:`hold`."""

    def __init__(self, out: Path, journal: BinaryIO, start: _Start) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        self.finished: dict[str, FinishedUnit] = {}
        self._journal = journal
        self._start = start

    @classmethod
    @contextmanager
    def hold(cls, out: Path, *, model_digest: str, weights_digest: str) -> Iterator[WorkFolder]:
        """Take the folder, with what an interrupted pack of the same weights has left in it.

        On an error, what has been finished stays for the next attempt; where nothing has, nothing
        stays.

        Raises
        ------
        OutputInUseError
            When another process is packing to the same place.
        OutputError
            When ``OUT`` or ``OUT.partial`` is something that moepack did not make.
        """
        refuse_foreign(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.with_name(f"{out.name}.partial.journal")
        start = _Start("moepack", _JOURNAL_VERSION, model_digest, weights_digest)
        with _locked(path, out) as journal:
            work = cls(out, journal, start)
            work._recover()
            try:
                yield work
            except BaseException:
                if not work.finished:
                    shutil.rmtree(work.folder, ignore_errors=True)
                    path.unlink()
                raise
            path.unlink()

    def record(self, unit: FinishedUnit) -> None:
        """Vouch for a unit. Its files must have been flushed."""
        for parent in {self.folder, *((self.folder / item.path).parent for item in unit.shards)}:
            sync_folder(parent)
        self._append(unit)
        self.finished[unit.name] = unit

    def publish(self) -> None:
        """Give the folder its name; an older pack of that name is removed.

        Everything in the folder must have been flushed.
        """
        manifest = (self.folder / MANIFEST_FILE).read_bytes()
        sync_folder(self.folder)
        self._append(_Publishing(hashlib.sha256(manifest).hexdigest()))
        if self.out.exists():
            _exchange(self.folder, self.out)
        else:
            self.folder.rename(self.out)
        sync_folder(self.out.parent)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def keep(self, names: Collection[str]) -> None:
        """Vouch for these of the finished units alone, and remove every other file."""
        dropped = self.finished.keys() - set(names)
        self.finished = {name: self.finished[name] for name in names}
        if dropped:
            # First the lines, then the files: a line must never outlive what it vouched for.
            self._journal.truncate(len(_encode(self._start)))
            for unit in self.finished.values():
                self._append(unit)
        vouched = {shard.path for unit in self.finished.values() for shard in unit.shards}
        for path in self.folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                continue
            if path.relative_to(self.folder).as_posix() not in vouched:
                path.unlink()

    def _recover(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().splitlines(keepends=True)
        ours = bool(lines) and _decode(_Start, lines[0]) is not None
        if not ours and self.folder.exists() and any(self.folder.iterdir()):
            if not lines:
                Path(self._journal.name).unlink()
            raise OutputError(
                f"{self.folder}: exists and is not the rest of an interrupted pack; "
                "move it away or choose another output"
            )
        good_bytes = self._read(lines)
        # The folder goes before the line that marks it as ours, and comes after it.
        if not good_bytes and self.folder.exists():
            shutil.rmtree(self.folder)
        self._journal.truncate(good_bytes)
        if not good_bytes:
            self._append(self._start)
        self.folder.mkdir(exist_ok=True)

    def _read(self, lines: list[bytes]) -> int:
        """Take over what the journal vouches for; how many of its bytes hold."""
        if not lines or _decode(_Start, lines[0]) != self._start:
            return 0
        good_bytes = len(lines[0])
        for line in lines[1:]:
            unit = _decode(FinishedUnit, line)
            if unit is None:
                publishing = _decode(_Publishing, line)
                if publishing is not None and not self._is_ours(publishing):
                    self.finished.clear()
                    return 0
                break
            self.finished[unit.name] = unit
            good_bytes += len(line)
        return good_bytes

    def _is_ours(self, publishing: _Publishing) -> bool:
        try:
            manifest = (self.folder / MANIFEST_FILE).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(manifest).hexdigest() == publishing.manifest_sha256

    def _append(self, line: _Start | FinishedUnit | _Publishing) -> None:
        self._journal.write(_encode(line))
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _encode(line: _Start | FinishedUnit | _Publishing) -> bytes:
    return records.encode(line).encode() + b"\n"


def _decode(cls: type[T], line: bytes) -> T | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return records.decode(cls, line, what="journal", error=PackFormatError)
    except PackFormatError:
        return None


def refuse_foreign(out: Path) -> None:
    """Refuse to replace what is not a pack.

    Raises
    ------
    OutputError
        When ``out`` exists and is neither a pack nor an empty folder.
    """
    if not out.exists() or is_manifest(out / MANIFEST_FILE):
        return
    if not out.is_dir() or any(out.iterdir()):
        raise OutputError(
            f"{out}: exists and is not a packed folder; choose another output or move it away"
        )


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[BinaryIO]:
    """The journal, open and locked. It is removed under the lock, so it may be gone once locked."""
    while True:
        with path.open("a+b") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputInUseError(
                    f"{out}: another process is packing to it; wait for it or choose another output"
                ) from None
            try:
                current = os.path.samestat(os.fstat(journal.fileno()), path.stat())
            except FileNotFoundError:
                current = False
            if current:
                yield journal
                return


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(new: Path, old: Path) -> None:
    """Let two folders change places: in one step, or in two where the system cannot."""
    if _exchange_at_once(new, old):
        return
    aside = old.with_name(f"{old.name}.previous")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _exchange_at_once(new: Path, old: Path) -> bool:
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(old))
    return False
