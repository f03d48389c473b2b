"""A folder that breaks a rule is refused by the rule's own error, before a weight is read."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepack.errors import (
    DamagedSegmentError,
    DeclaredSizeError,
    MoepackError,
    PackError,
    PackFormatError,
    PackVersionError,
    SegmentBoundsError,
    SegmentOverlapError,
    TruncatedShardError,
    UnsafePathError,
)
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.records import decode_object
from moepack.segments import SegmentId
from tests.pack.hostile import Change, change_header, change_manifest, write_header

TOP = "experts/layer-001.top.safetensors"


def refuses(folder: Path, error: type[MoepackError], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        PackedModel.open(folder)
    assert caught.type is error
    assert "\n" not in str(caught.value)


def test_the_changes_below_are_what_is_refused(packed: Path) -> None:
    change_manifest(packed, len)
    change_header(packed, TOP, len)
    assert len(PackedModel.open(packed).entries) == 9


# The manifest as a file


def test_no_folder_and_no_manifest(packed: Path) -> None:
    refuses(packed / "nowhere", PackFormatError, "made by moepack pack")
    (packed / "manifest.json").unlink()
    refuses(packed, PackFormatError, "No such file")


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"{}\n", b"[" * 100_000, b"\xff\xfe\n", b'{"format":"zip","version":1,\n']
)
def test_another_file_called_manifest(packed: Path, text: bytes) -> None:
    (packed / "manifest.json").write_bytes(text)
    refuses(packed, PackFormatError, "does not start with the line of a moepack manifest")


@pytest.mark.parametrize(("version", "cure"), [(4, "update moepack"), (0, "pack again")])
def test_another_version_is_seen_before_anything_else(
    packed: Path, version: int, cure: str
) -> None:
    change_manifest(packed, lambda document: document.clear(), version=version)
    refuses(packed, PackVersionError, f"version {version}, this moepack reads 1, 2 and 3; {cure}")


def test_a_manifest_with_one_changed_byte(packed: Path) -> None:
    path = packed / "manifest.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refuses(packed, DamagedSegmentError, "do not match its digest")


def test_a_manifest_too_large_to_be_one(packed: Path) -> None:
    os.truncate(packed / "manifest.json", 1 << 30)
    refuses(packed, DeclaredSizeError, "expected at most 268435456")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("groups"), "groups: missing, expected"),
        (lambda d: d.update(extra=1), "extra: "),
        (lambda d: d["shards"][0].update(size_bytes="1"), "shards.0.size_bytes"),
        (lambda d: d["groups"][0].update(part="middle"), "groups.0.part"),
    ],
)
def test_a_manifest_of_other_fields(packed: Path, change: Change, message: str) -> None:
    change_manifest(packed, change)
    refuses(packed, PackFormatError, message)


# The manifest against itself


def segment(document: dict[str, Any], group: int = 0, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["groups"][group]["segments"][index]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["spec"].update(hidden_size=64), "the layout is for another model"),
        (lambda d: d["spec"].update(hidden_size=-1), "a hidden size of -1"),
        (lambda d: d["spec"].update(dtype="F7"), "the dtype 'F7'"),
        (
            lambda d: d["layout"]["layers"][0].update(split=32),
            "the layout does not match its digest",
        ),
        (lambda d: d["groups"].pop(0), "layer 1, top lacks 3 experts"),
        (lambda d: d["groups"][0]["segments"].pop(), "layer 1, top lacks 1 experts"),
        (lambda d: segment(d).update(expert=1), "layer 1, top (base) lists an expert twice"),
        (lambda d: segment(d).update(expert=7), "layer 1, top (base) lists an unknown expert"),
        (lambda d: d["groups"][0].update(layer=0), "layer 0, top (base) is not part of the layout"),
        (lambda d: d["groups"][0].update(encoding="F32"), "not cut as the layout says"),
        (lambda d: d["groups"][0]["shape"].update(neurons=17), "not cut as the layout says"),
        (
            lambda d: d["groups"][1].update(shard=d["groups"][0]["shard"]),
            "holds layer 1, bottom (base) and something else",
        ),
        (
            lambda d: d["groups"][0].update(shard="trunk.safetensors"),
            "trunk.safetensors holds layer 1, top (base) and something else",
        ),
        (lambda d: d["trunk"].pop(), "does not list the model's trunk tensors"),
        (lambda d: d["shards"].append(d["shards"][0]), "a file is listed twice"),
        (lambda d: d["shards"].pop(), "holds segments and is not listed as a shard"),
        (lambda d: segment(d).update(sha256="x" * 64), "is not a SHA-256"),
    ],
)
def test_an_index_that_does_not_describe_the_model(
    packed: Path, change: Change, message: str
) -> None:
    change_manifest(packed, change)
    refuses(packed, PackFormatError, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["spec"]["trunk"][0].update(shape=[1 << 40, 1 << 40]),
        lambda d: d["spec"]["layers"][1]["moe"].update(num_experts=1 << 60),
        lambda d: d["spec"]["layers"][1]["moe"].update(intermediate_size=1 << 60),
        lambda d: d["spec"].update(hidden_size=1 << 62),
        lambda d: d["shards"][1].update(size_bytes=1 << 62),
        lambda d: d["auxiliary"][0].update(size_bytes=1 << 62),
    ],
)
def test_sizes_that_no_model_has(packed: Path, change: Change) -> None:
    change_manifest(packed, change)
    refuses(packed, DeclaredSizeError, "expected at most 64.00 TiB in all")


# Paths


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors",
        "experts/../../outside.safetensors",
        "/etc/passwd",
        "experts//layer-001.top.safetensors",
        "./experts/layer-001.top.safetensors",
        "experts\\layer-001.top.safetensors",
        "experts/layer\x00",
        "experts/layer\n",
        "..",
        ".",
        "",
    ],
)
@pytest.mark.parametrize("kind", ["shards", "auxiliary"])
def test_a_path_that_is_not_plainly_inside(packed: Path, path: str, kind: str) -> None:
    change_manifest(packed, lambda document: document[kind][0].update(path=path))
    refuses(packed, UnsafePathError, f"names the file {path!r}, expected a plain path inside")


def test_a_link_out_of_the_folder(packed: Path) -> None:
    outside = packed.parent / "outside"
    (packed / TOP).rename(outside)
    (packed / TOP).symlink_to(outside)
    refuses(packed, UnsafePathError, "outside, expected a file inside the folder")


def test_a_folder_that_is_a_link_out_of_the_folder(packed: Path) -> None:
    (packed / "experts").rename(packed.parent / "elsewhere")
    (packed / "experts").symlink_to(packed.parent / "elsewhere")
    refuses(packed, UnsafePathError, "expected a file inside the folder")


def test_a_link_to_itself(packed: Path) -> None:
    (packed / TOP).unlink()
    (packed / TOP).symlink_to(packed / TOP)
    with pytest.raises(PackError):
        PackedModel.open(packed)


def test_a_pipe_instead_of_a_shard_does_not_hang(packed: Path) -> None:
    (packed / TOP).unlink()
    os.mkfifo(packed / TOP)
    refuses(packed, PackFormatError, "not a regular file")


# Sizes and places


def test_a_missing_shard(packed: Path) -> None:
    (packed / TOP).unlink()
    refuses(packed, PackFormatError, f"{TOP}: missing")


def test_a_shortened_shard_names_the_first_segment_that_is_lost(packed: Path) -> None:
    os.truncate(packed / TOP, 3 * 4096 - 1)
    refuses(
        packed,
        TruncatedShardError,
        f"{TOP}: 12287 bytes, the index says 16384 (lost from layer 1, expert 1, top (base) on)",
    )


def test_a_lengthened_shard(packed: Path) -> None:
    os.truncate(packed / TOP, 5 * 4096)
    refuses(packed, TruncatedShardError, "20480 bytes, the index says 16384; pack again")


@pytest.mark.parametrize(
    ("offset_bytes", "error", "message"),
    [
        (4097, SegmentBoundsError, "expected a multiple of 4096"),
        (0, SegmentBoundsError, "expected it within 4096..16384"),
        (-4096, SegmentBoundsError, "expected it within 4096..16384"),
        (16384, SegmentBoundsError, "expected it within 4096..16384"),
        (1 << 62, SegmentBoundsError, "expected it within 4096..16384"),
        (8192, SegmentOverlapError, "but layer 1, expert 0, top (base) ends at 12288"),
        (12288, SegmentOverlapError, "is at 12288..16384, but"),
    ],
)
def test_a_segment_somewhere_else(
    packed: Path, offset_bytes: int, error: type[MoepackError], message: str
) -> None:
    change_manifest(packed, lambda document: segment(document).update(offset_bytes=offset_bytes))
    refuses(packed, error, message)


def test_a_trunk_tensor_somewhere_else(packed: Path) -> None:
    change_manifest(packed, lambda document: document["trunk"][0].update(offset_bytes=8192))
    refuses(packed, SegmentOverlapError, "trunk tensor")


def test_two_segments_that_have_changed_places_in_the_index_alone(packed: Path) -> None:
    def swap(document: dict[str, Any]) -> None:
        first, second = segment(document, 0, 0), segment(document, 0, 1)
        first["offset_bytes"], second["offset_bytes"] = (
            second["offset_bytes"],
            first["offset_bytes"],
        )

    change_manifest(packed, swap)
    refuses(packed, PackFormatError, "the header lists")


# Headers


@pytest.mark.parametrize("declared", [100_000_001, 1 << 63])
def test_a_header_longer_than_the_format_allows(packed: Path, declared: int) -> None:
    write_header(packed, TOP, declared.to_bytes(8, "little"))
    refuses(packed, DeclaredSizeError, "declares a header of")


def test_a_header_longer_than_the_file(packed: Path) -> None:
    write_header(packed, TOP, (1 << 20).to_bytes(8, "little"))
    refuses(packed, TruncatedShardError, "ends inside its header of 1048576 bytes")


def test_a_header_of_another_length_than_the_index_says(packed: Path) -> None:
    write_header(packed, TOP, (8192 - 8).to_bytes(8, "little"))
    refuses(packed, PackFormatError, "its data starts at 8192, the index says 4096")


def test_a_header_with_one_changed_byte(packed: Path) -> None:
    with (packed / TOP).open("r+b") as file:
        file.seek(4090)
        file.write(b"\t")
    refuses(packed, PackFormatError, "its header does not match its digest")


KEY = "layers.1.experts.0.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[KEY].update(shape=[32, 16]), "the header lists"),
        (lambda d: d[KEY].update(dtype="F16"), "the header lists"),
        (lambda d: d[KEY].update(data_offsets=[0, 1022]), "expected it to start at"),
        (lambda d: d[KEY].update(data_offsets=[0]), "is not dtype, shape and data_offsets"),
        (lambda d: d[KEY].update(shape=[True, 32]), "is not dtype, shape and data_offsets"),
        (lambda d: d.update({"x": d.pop(KEY)}), "the header lists nothing"),
        (lambda d: d.update({"x": d.pop("__pad__.0")}), "holds the tensor x"),
        (lambda d: d["__pad__.0"].update(dtype="I8"), "holds the tensor __pad__.0"),
        (lambda d: d.pop("__pad__.2"), "describes 11328 bytes of data, it holds 12288"),
    ],
)
def test_a_header_that_disagrees_with_the_index(packed: Path, change: Change, message: str) -> None:
    change_header(packed, TOP, change)
    refuses(packed, PackFormatError, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "expected a map of tensors"),
        (b"{", "not a safetensors header"),
        (b'{"a":1,"a":2}', "a name is used twice"),
        (b"[" * 4000, "not a safetensors header"),
        (b"\xff", "not a safetensors header"),
    ],
)
def test_a_header_that_is_none(packed: Path, text: bytes, message: str) -> None:
    write_header(packed, TOP, (4088).to_bytes(8, "little") + text.ljust(4088))
    refuses(packed, PackFormatError, message)


# Anything at all


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_signed_manifest_makes_anything_but_a_named_error(
    packed: Path, data: st.DataObject
) -> None:
    original = (packed / "manifest.json").read_bytes()
    document = json.loads(original)
    for name in ("format", "version", "digest"):
        del document[name]
    holder, key = data.draw(st.sampled_from(list(places(document))))
    values: list[Any] = [0, -1, 1 << 63, 1e300, "", "../x", None, True, [], {}, [[]], "F32"]
    holder[key] = data.draw(st.sampled_from(values))
    agree(document)
    try:
        change_manifest(packed, lambda read: read.update(document))
        with suppress(PackError):
            PackedModel.open(packed)
    finally:
        (packed / "manifest.json").write_bytes(original)


def agree(document: dict[str, Any]) -> None:
    """Make the digests of spec and layout fit again, so that the lie gets past them."""
    with suppress(PackError, TypeError):
        spec = decode_object(ModelSpec, document["spec"], what="spec", error=PackError)
        document["layout"]["model_digest"] = spec.digest
        layout = decode_object(Layout, document["layout"], what="layout", error=PackError)
        document["layout_digest"] = layout.digest


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every value of a document, as its holder and its key."""
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = list(range(len(node)))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((node, key))
        found.extend(places(node[key]))
    return found


def test_a_segment_that_is_not_there_is_named(packed: Path) -> None:
    with pytest.raises(PackError, match=re.escape("no segment layer 2, expert 0, bottom (base)")):
        PackedModel.open(packed).entry(SegmentId(2, 0, "bottom"))


def test_a_later_precision_fits_into_the_same_format(packed: Path) -> None:
    """A reader that knows the base variant alone opens a folder that holds another one too."""
    first = packed / "experts/layer-001.top.safetensors"
    second = packed / "experts/layer-001.top.int4.safetensors"
    second.write_bytes(first.read_bytes())

    def add(document: dict[str, Any]) -> None:
        shard = dict(document["shards"][1], path="experts/layer-001.top.int4.safetensors")
        document["shards"].append(shard)
        group = dict(document["groups"][0], variant="int4", encoding="INT4-G64")
        document["groups"].append(dict(group, shard=shard["path"]))

    change_manifest(packed, add)
    model = PackedModel.open(packed)
    entry = model.entry(SegmentId(1, 0, "top", "int4"))
    assert entry.encoding == "INT4-G64"
    assert model.path(entry) == second.resolve()
    assert model.entry(SegmentId(1, 0, "top")).encoding == "BF16"
