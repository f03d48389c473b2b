"""``manifest.json``: what a packed folder holds, where, and its digests.

The file is JSON with a fixed first line, so that its version can be read before anything else and
its own damage be seen::

    {"format":"moepack","version":1,"digest":"<SHA-256 of every byte after this line>",

It holds no times and no paths of the machine: equal layouts of one model give equal bytes. The
whole format, with its MUST and MAY, is in ``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moepack import records
from moepack.encodings import ENCODINGS
from moepack.errors import (
    DamagedSegmentError,
    DeclaredSizeError,
    PackFormatError,
    PackVersionError,
)
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.records import record
from moepack.segments import Part, SegmentId, SegmentShape
from moepack.trunk import stored_trunk

#: Version 2 is version 1 with quantised experts, version 3 one of these with a rounded trunk. What
#: needs none of it is written as version 1: the same bytes as ever, and readable by every moepack.
VERSIONS = (1, 2, 3)

MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
TRUNK_FILE = "trunk.safetensors"

#: About forty times the manifest of a model of 60 layers with 384 experts.
MAX_MANIFEST_BYTES = 256 << 20

_MAX_FIRST_LINE_BYTES = 1024


def shard_file(layer: int, part: Part, variant: str = "base") -> str:
    """Where the segments of one layer, part and variant are, relative to the packed folder."""
    suffix = "" if variant == "base" else f".{variant}"
    return f"experts/layer-{layer:03d}.{part}{suffix}.safetensors"


def version_for(encodings: Iterable[str], trunk: str = "") -> int:
    """The lowest format version that has all these encodings of experts, and this of the trunk."""
    if trunk:
        return 3
    known = (ENCODINGS.get(name) for name in encodings)
    return 2 if any(item is not None and item.quantised for item in known) else 1


@record
class ShardEntry:
    """One safetensors file. ``header_bytes`` is where its data starts, length field included."""

    path: str
    size_bytes: int
    header_bytes: int
    header_sha256: str


@record
class TrunkEntry:
    """Bytes of one stored tensor of the trunk; its dtype and shape follow from spec and layout.

    ``offset_bytes`` counts from the start of the file. Both digests cover the tensor's bytes.
    """

    name: str
    offset_bytes: int
    crc32: int
    sha256: str


@record
class SegmentRecord:
    """Bytes of one expert's segment.

    ``offset_bytes`` counts from the start of the file. Both digests cover the ``size_bytes`` of
    the group's shape, not the padding after them.
    """

    expert: int
    offset_bytes: int
    crc32: int
    sha256: str


@record
class SegmentGroup:
    """Segments of one layer that share part, variant, encoding, shard and geometry."""

    layer: int
    part: Part
    variant: str
    encoding: str
    shard: str
    shape: SegmentShape
    segments: tuple[SegmentRecord, ...]


@record
class AuxiliaryEntry:
    """A file that is carried along: the tokenizer, the chat template, generation defaults."""

    path: str
    size_bytes: int
    sha256: str


@record
class SegmentEntry:
    """Where one segment is, and how to know its bytes.

    Attributes
    ----------
    path : str
        The shard, relative to the folder.
    offset_bytes : int
        From the start of the shard: a multiple of 4 KiB, as is ``shape.stored_bytes``, so that one
        aligned read brings the segment and its padding.
    crc32, sha256
        Of the first ``shape.size_bytes`` of it: the tensors, without the padding.
    """

    id: SegmentId
    encoding: str
    path: str
    offset_bytes: int
    shape: SegmentShape
    crc32: int
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.shape.size_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes to read: the tensors and the padding."""
        return self.shape.stored_bytes


@record
class TrunkTensor:
    """Where one trunk tensor is. ``offset_bytes``, from the start of the shard, is aligned."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    crc32: int
    sha256: str


@record
class Manifest:
    """Everything about a packed folder but the bytes themselves.

    Attributes
    ----------
    spec : ModelSpec
        With an empty ``name``: what somebody called the model is in the plan.
    weights_digest : str
        Identity of the checkpoint that was packed.
    shards : tuple of ShardEntry
        The trunk first, then by layer, top before bottom.
    trunk : tuple of TrunkEntry
        In the order of :func:`moepack.trunk.stored_trunk`.
    groups : tuple of SegmentGroup
        By layer, top before bottom; of a mixed layer one for each encoding.
    """

    spec: ModelSpec
    weights_digest: str
    layout: Layout
    layout_digest: str
    shards: tuple[ShardEntry, ...]
    trunk: tuple[TrunkEntry, ...]
    groups: tuple[SegmentGroup, ...]
    auxiliary: tuple[AuxiliaryEntry, ...]

    @property
    def version(self) -> int:
        """The format version that it is of."""
        return version_for(self.layout.encodings, self.layout.trunk)

    def entries(self) -> Iterator[SegmentEntry]:
        """Every segment, by group."""
        for group in self.groups:
            for item in group.segments:
                yield SegmentEntry(
                    SegmentId(group.layer, item.expert, group.part, group.variant),
                    group.encoding,
                    group.shard,
                    item.offset_bytes,
                    group.shape,
                    item.crc32,
                    item.sha256,
                )

    def trunk_tensors(self) -> tuple[TrunkTensor, ...]:
        """Every stored tensor of the trunk, in the order of the shard."""
        return tuple(
            TrunkTensor(
                info.name,
                info.dtype,
                info.shape,
                item.offset_bytes,
                info.size_bytes,
                item.crc32,
                item.sha256,
            )
            for info, item in zip(
                stored_trunk(self.spec, self.layout.trunk), self.trunk, strict=True
            )
        )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``: one line for each shard, tensor and segment."""
    fields = records.to_plain(manifest).items()
    body = ",\n".join(f"{json.dumps(name)}:{_text(value)}" for name, value in fields) + "}\n"
    content = body.encode()
    first = {
        "format": "moepack",
        "version": manifest.version,
        "digest": hashlib.sha256(content).hexdigest(),
    }
    line = json.dumps(first, separators=(",", ":")).removesuffix("}") + ",\n"
    return line.encode() + content


def _text(value: Any) -> str:
    if isinstance(value, dict):
        items = (f"{json.dumps(name)}:{_text(item)}" for name, item in value.items())
        return "{" + ",".join(items) + "}"
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(_text, value)) + "]"
    return json.dumps(value, separators=(",", ":"))


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.json``: version first, then its digest, then its fields.

    Raises
    ------
    PackFormatError
        When there is no manifest, or it is not one.
    PackVersionError
        When it is of another version.
    DamagedSegmentError
        When its bytes do not match its digest.
    DeclaredSizeError
        When it is too large to be one.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_MANIFEST_BYTES:
            raise DeclaredSizeError(
                f"{path}: {size_bytes} bytes, expected at most {MAX_MANIFEST_BYTES}; pack again"
            )
        data = path.read_bytes()
    except OSError as failure:
        raise PackFormatError(
            f"{path}: {failure.strerror}; expected a folder made by moepack pack"
        ) from None
    first, _, content = data.partition(b"\n")
    version, digest = _check_version(first, path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise DamagedSegmentError(f"{path}: its bytes do not match its digest; pack again")
    found = records.decode(Manifest, b"{" + content, what=str(path), error=PackFormatError)
    if found.version != version:
        raise PackFormatError(
            f"{path}: format version {version}, its layout is one of version {found.version}; "
            "pack again"
        )
    return found


def is_manifest(path: Path) -> bool:
    """Whether a file is a moepack manifest, of any version and in any state."""
    try:
        with path.open("rb") as file:
            return _first_line(file.readline(_MAX_FIRST_LINE_BYTES)) is not None
    except OSError:
        return False


def _first_line(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line.rstrip().removesuffix(b",") + b"}")
    except (ValueError, RecursionError):
        return None
    known = isinstance(fields, dict) and fields.get("format") == "moepack"
    return fields if known and type(fields.get("version")) is int else None


def _check_version(line: bytes, path: Path) -> tuple[int, str]:
    """The version and the digest that the first line states."""
    fields = _first_line(line[:_MAX_FIRST_LINE_BYTES])
    if fields is None:
        raise PackFormatError(
            f"{path}: does not start with the line of a moepack manifest; "
            "expected a folder made by moepack pack, with its manifest unchanged"
        )
    version = fields["version"]
    if version not in VERSIONS:
        cure = "update moepack" if version > VERSIONS[-1] else "pack again"
        known = f"{', '.join(map(str, VERSIONS[:-1]))} and {VERSIONS[-1]}"
        raise PackVersionError(
            f"{path}: format version {version}, this moepack reads {known}; {cure}"
        )
    digest = fields.get("digest")
    if not isinstance(digest, str) or len(fields) != 3:
        raise PackFormatError(f"{path}: expected format, version and digest in its first line")
    return version, digest
