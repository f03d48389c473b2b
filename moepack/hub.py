"""Models on the Hugging Face hub: what a repository has, headers by range, resumable downloads.

The client is huggingface_hub's own, imported when the first hub id is named: its endpoint
(``HF_ENDPOINT``), cache, tokens and offline mode (``HF_HUB_OFFLINE``) apply.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moepack import source_files, source_headers
from moepack.errors import CheckpointError, HubUnreachableError, ModelNotFoundError
from moepack.progress import Progress
from moepack.source_headers import LENGTH_BYTES, TensorHeader
from moepack.units import format_size

_LOG = logging.getLogger(__name__)

#: What the first request for a shard's header asks for: most headers fit, so one request does.
FIRST_RANGE_BYTES = 100_000

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)

#: What huggingface_hub calls its bar of the bytes written.
_BYTES_BAR = "huggingface_hub.snapshot_download"


@dataclasses.dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its size, and the hub's digest of its contents."""

    size_bytes: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Repository:
    """A model on the hub, at the commit that its main branch had when it was found.

    Attributes
    ----------
    name : str
        The hub id.
    revision : str
        The commit.
    files : mapping
        Every file of the repository (of the cached copy where the hub is out of reach).
    """

    name: str
    revision: str
    files: Mapping[str, HubFile]

    @classmethod
    def find(cls, name: str) -> Repository:
        """Ask the hub for a repository; where it is out of reach, look into the local cache.

        Raises
        ------
        ModelNotFoundError
            The hub has no such repository, or does not show it to this user.
        CheckpointError
            The repository is gated.
        HubUnreachableError
            The hub did not answer, and the model is not in the cache.
        """
        from huggingface_hub import HfApi

        try:
            with _named_errors(name):
                info = HfApi().model_info(name, files_metadata=True)
        except HubUnreachableError as failure:
            cached = _cached(name)
            if cached is None:
                raise
            _LOG.warning("%s; using the copy in the cache", failure)
            return cached
        files = {}
        for file in info.siblings or []:
            # The cache names a blob by the same digest.
            digest = file.lfs.sha256 if file.lfs is not None else file.blob_id
            files[file.rfilename] = HubFile(file.size or 0, digest or "")
        return cls(name, info.sha or "main", files)

    def weights_digest(self, shards: tuple[str, ...]) -> str | None:
        """Identity of the weights from the hub's digests; None where they are not known."""
        if not all(self.files[shard].digest for shard in shards):
            return None
        lines = (f"{shard} {self.files[shard].digest}\n" for shard in sorted(shards))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def size_bytes(self, needed: tuple[str, ...]) -> int:
        """Bytes of some files."""
        return sum(self.files[file].size_bytes for file in needed)

    def read(self, file: str) -> bytes:
        """A small file, whole, from the cache if it is there."""
        path = self._local_path(file)
        return self._fetch(file, None) if path is None else source_files.read_file(path)

    def read_header(self, file: str) -> dict[str, TensorHeader]:
        """Every tensor of a shard: from the cache, else by one or two range requests.

        Raises
        ------
        DamagedCheckpointError
            See :func:`moepack.source_headers.parse_header`.
        HubUnreachableError
            The hub did not answer, or does not answer range requests.
        """
        what = f"{self.name}: {file}"
        path = self._local_path(file)
        if path is not None:
            return source_files.read_header(path, file, what)
        file_bytes = self.files[file].size_bytes
        data = self._fetch(file, min(FIRST_RANGE_BYTES, file_bytes)) if file_bytes else b""
        length = source_headers.header_bytes(data, file_bytes, what)
        if len(data) < LENGTH_BYTES + length:
            data = self._fetch(file, LENGTH_BYTES + length)
        header = data[LENGTH_BYTES : LENGTH_BYTES + length]
        return source_headers.parse_header(header, file, file_bytes, what)

    def download(self, needed: tuple[str, ...], progress: Progress) -> Path:
        """Download files, or what of them is missing, and say where they are.

        A connection that breaks is taken up again by range. Of a download that was interrupted the
        files that were complete are kept, and the others start anew: the client's own rule.

        Raises
        ------
        HubUnreachableError
            The connection failed for good.
        CheckpointError
            The files cannot be written, or do not fit the disk.
        """
        from huggingface_hub import constants, snapshot_download

        missing_bytes = self.size_bytes(self.missing(needed))
        _check_room(self.name, Path(constants.HF_HUB_CACHE), missing_bytes)
        progress.start(f"download {self.name}", missing_bytes)
        try:
            with _named_errors(self.name):
                # By branch, not by commit: only so does the client note the commit of the branch,
                # which is what it is found by when the hub is out of reach.
                folder = Path(
                    snapshot_download(
                        self.name, allow_patterns=list(needed), tqdm_class=_bar(progress)
                    )
                )
        finally:
            progress.done()
        if folder.name != self.revision:
            raise CheckpointError(
                f"{self.name}: its commit changed from {self.revision} to {folder.name} meanwhile;"
                " expected one; try again"
            )
        return folder

    def missing(self, needed: tuple[str, ...]) -> tuple[str, ...]:
        """The files that are not in the cache."""
        return tuple(file for file in needed if self._local_path(file) is None)

    def folder(self, needed: tuple[str, ...]) -> Path | None:
        """Where the files are, if all of them have been downloaded before."""
        paths = [self._local_path(file) for file in needed]
        return None if None in paths or not paths[0] else paths[0].parent

    def _local_path(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def _fetch(self, file: str, size_bytes: int | None) -> bytes:
        """The first bytes of a file, or all of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        headers = build_hf_headers()
        if size_bytes is not None:
            headers["range"] = f"bytes=0-{size_bytes - 1}"
        url = hf_hub_url(self.name, file, revision=self.revision)
        with (
            _named_errors(self.name),
            http_stream_backoff("GET", url, headers=headers, max_retries=2) as answer,
        ):
            hf_raise_for_status(answer)
            if size_bytes is not None and answer.status_code != 206:
                raise HubUnreachableError(
                    f"{self.name}: the hub answers a range request for {file} with"
                    f" {answer.status_code}; expected 206; download the model and name its folder"
                )
            return answer.read()


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository."""
    return _HUB_ID.fullmatch(name) is not None


def _cached(name: str) -> Repository | None:
    """What the local cache has of a model, whatever the hub would say."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(
            snapshot_download(
                name, local_files_only=True, allow_patterns=[source_files.CONFIG_FILE]
            )
        )
    except LocalEntryNotFoundError:
        return None
    files = {path.name: _cached_file(path) for path in snapshot.iterdir() if path.is_file()}
    return Repository(name, snapshot.name, files)


def _cached_file(path: Path) -> HubFile:
    """The cache keeps a file as a link to a blob that is named by the hub's digest."""
    digest = path.readlink().name if path.is_symlink() else ""
    return HubFile(path.stat().st_size, digest)


def _check_room(name: str, cache: Path, needed_bytes: int) -> None:
    place = cache
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{name}: {format_size(needed_bytes)} to download, {format_size(free_bytes)} free in"
            f" {place}; expected room for it; free some, or point HF_HOME at a larger disk"
        )


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    from huggingface_hub import constants, errors

    network: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name}: the repository is gated; expected access to it; accept its terms on"
            f" {constants.ENDPOINT}/{name} and log in with: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelNotFoundError(
            f"{name}: no folder here and no repository on {constants.ENDPOINT} has this name;"
            " correct it, or log in with: hf auth login, if it is private"
        ) from None
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as failure:
        got = f"gone from the hub ({_first_line(failure)})"
        raise source_headers.damaged(name, got, "it there") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, network) as failure:
        raise HubUnreachableError(
            f"{name}: no folder here has this name and {constants.ENDPOINT} cannot be reached"
            f" ({_first_line(failure)}); expected an answer; check the connection and"
            " HF_HUB_OFFLINE and try again: files that are complete are not downloaded again"
        ) from None
    except OSError as failure:
        raise CheckpointError(
            f"{name}: the download failed ({failure.strerror or failure}); expected a complete"
            f" transfer into {constants.HF_HUB_CACHE}; try again, or point HF_HOME at another place"
        ) from None


def _first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__


def _bar(progress: Progress) -> type[Any]:
    """A silent tqdm class that tells ``progress`` of the bytes written."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    lock = threading.Lock()

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") == _BYTES_BAR and kwargs.get("unit") == "B"
            self._bytes = self._told_bytes = 0
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if not self._counts:
                return
            with lock:
                self._bytes += int(n or 0)  # negative where a server made it start over
                if self._bytes > self._told_bytes:
                    progress.advance(self._bytes - self._told_bytes)
                    self._told_bytes = self._bytes

    return Bar
