"""Files that lie: each is refused by its own error, naming the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepack.checkpoint import Checkpoint
from moepack.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ModelNotFoundError,
    UnsupportedEncodingError,
)
from moepack.source_headers import TensorHeader, parse_header
from tests.conftest import TinyFolder
from tests.support.safetensors_files import read_file, with_header, write_file


@pytest.fixture
def model(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """A model's folder to break: one file."""
    return Path(shutil.copytree(tiny_folder("mixtral", "plain"), tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards, with an index."""
    tensors = read_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, part in files.items():
        write_file(model / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    write_index(model, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return model


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index


def refused(
    folder: Path, match: str, error: type[CheckpointError] = DamagedCheckpointError
) -> None:
    with pytest.raises(error, match=match) as caught:
        Checkpoint.open(folder)
    assert caught.type is error
    assert "\n" not in str(caught.value)


# --- a folder ----------------------------------------------------------------------------------


def test_shards_give_the_bits_of_one_file(sharded: Path, tiny_folder: TinyFolder) -> None:
    one, two = Checkpoint.open(tiny_folder("mixtral", "plain")), Checkpoint.open(sharded)
    assert one.spec.digest == two.spec.digest
    assert two.shards == ("a.safetensors", "b.safetensors")
    for info in one.spec.trunk:
        np.testing.assert_array_equal(one.trunk_tensor(info.name), two.trunk_tensor(info.name))
    for name, tensor in one.expert(2, 5).items():
        np.testing.assert_array_equal(tensor, two.expert(2, 5)[name])


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "no/such/folder", "~/no", "a b", ""])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no such folder|no config\.json"):
        Checkpoint.open(name)


def test_a_folder_without_a_config_is_no_model(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "no config.json", ModelNotFoundError)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, "no weights")


def test_pickled_weights_are_not_unpickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "pickled.*convert", UnsupportedEncodingError)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\xff", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "null"]
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_none(model: Path, file: str, text: str) -> None:
    (model / file).write_bytes(text.encode("latin-1"))
    refused(model, file)


@pytest.mark.parametrize("tokens", ['"x"', "1.5", "[true]", "{}"])
def test_ends_of_text_that_are_no_tokens(model: Path, tokens: str) -> None:
    (model / "generation_config.json").write_text(f'{{"eos_token_id": {tokens}}}')
    refused(model, r"generation_config\.json: eos_token_id = .*expected integers")


# --- the index ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "a.safetensors\0",
        ".safetensors",
        "a.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_that_leaves_the_folder(sharded: Path, file: object) -> None:
    index = read_index(sharded)
    index["weight_map"]["model.norm.weight"] = file
    write_index(sharded, index)
    refused(sharded, "index.json.*model.norm.weight")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, []])
def test_an_index_that_is_none(sharded: Path, index: object) -> None:
    write_index(sharded, index)
    refused(sharded, "index.json")


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    refused(sharded, "no b.safetensors")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = read_index(sharded)
    name = next(name for name, file in index["weight_map"].items() if file == "a.safetensors")
    index["weight_map"][name] = "b.safetensors"
    write_index(sharded, index)
    refused(sharded, f"{name} is not in b.safetensors")


def test_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    index = read_index(sharded)
    del index["weight_map"]["model.norm.weight"]
    write_index(sharded, index)
    refused(sharded, "model.norm.weight in b.safetensors")


# --- a shard -----------------------------------------------------------------------------------


def entry(
    begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shard(entries: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    return with_header(json.dumps(entries).encode(), data, length)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (shard({}, b"", length=2**63), f"a header of {2**63} bytes"),
        (shard({}, b"", length=200_000_000), "a header of 200000000 bytes"),
        (shard({}, b"", length=100), "expected a header of 100 bytes"),
        (with_header(b"not json"), "not JSON"),
        (with_header(b'{"a": '), "not JSON"),
        (with_header(b"\xff\xff"), "not JSON"),
        (with_header(b'{"a": 1, "a": 2}'), "used twice"),
        (with_header(b"[" * 50_000), "not JSON"),
        (with_header(b"[]"), "a JSON list"),
        (shard({"t": []}), "tensor t is"),
        (shard({"t": {"dtype": "F32", "shape": [2]}}), "tensor t is"),
        (shard({"t": {**entry(), "more": 1}}), "tensor t is"),
        (shard({"t": entry(shape=[2.0])}), "tensor t is"),
        (shard({"t": entry(shape=[True, 2])}), "tensor t is"),
        (shard({"t": entry(dtype=32)}), "tensor t is"),
        (shard({"t": {**entry(), "data_offsets": [0, 8, 16]}}), "tensor t is"),
        (shard({"t": entry(shape=[-1, -2])}), "no negative sizes"),
        (shard({"t": entry(begin=-8, end=0)}), "no negative sizes"),
        (shard({"t": entry(begin=8, end=0)}), "no negative sizes"),
        (shard({"t": entry(shape=[3])}), "tensor t of 8 bytes; expected 12"),
        (shard({"t": entry(shape=[2**40, 2**40])}), "tensor t of 8 bytes"),
        (shard({"t": entry(0, 8), "u": entry(4, 12)}), "overlaps"),
        (shard({"t": entry(0, 8), "u": entry(0, 8)}), "overlaps"),
        (shard({"t": entry(8, 16)}), "leaves a hole"),
        (shard({"t": entry(0, 8)}), "followed by bytes of no tensor"),
        (shard({"t": entry(0, 8), "u": entry(8, 16)}, bytes(15)), "truncated"),
        (shard({"t": entry(0, 8), "u": entry(8, 2**60)}), "tensor u of"),
    ],
)
def test_a_shard_that_lies(model: Path, content: bytes, match: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    refused(model, f"model.safetensors: .*{match}")


def test_a_dtype_that_nobody_knows(model: Path) -> None:
    (model / "model.safetensors").write_bytes(shard({"t": entry(dtype="F3")}))
    refused(model, "tensor t is stored in F3", UnsupportedEncodingError)


def test_a_truncated_shard_is_seen_before_it_is_read(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(model, "truncated")


def test_a_shard_that_shrinks_while_it_is_used(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(DamagedCheckpointError, match="ends too early"):
        checkpoint.expert(2, 7)


def test_an_unreadable_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    refused(model, "no readable file")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["F32", "BF16", "U8", "F4"]),
            st.lists(st.integers(-1, 5), max_size=3),
            st.integers(-2, 40),
            st.integers(-2, 40),
        ),
        max_size=4,
    ),
    st.binary(max_size=40),
)
def test_what_is_accepted_covers_the_data_exactly(
    tensors: list[tuple[str, list[int], int, int]], data: bytes
) -> None:
    entries = {
        str(i): {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for i, (dtype, shape, begin, end) in enumerate(tensors)
    }
    header = json.dumps(entries).encode()
    start = 8 + len(header)
    try:
        parsed = parse_header(header, "f", start + len(data), "f")
    except DamagedCheckpointError:
        return
    covered = sorted(
        position for tensor in parsed.values() for position in range(*places(tensor, start))
    )
    assert covered == list(range(len(data)))


def places(tensor: TensorHeader, start: int) -> tuple[int, int]:
    return tensor.offset_bytes - start, tensor.offset_bytes - start + tensor.size_bytes


# --- what a checkpoint gives --------------------------------------------------------------------


def test_one_expert_of_a_fused_tensor_reads_its_own_bytes_only(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_folder("gpt_oss", "plain"))
    read: list[int] = []
    from moepack import source_files

    original = source_files.read_range

    def counting(path: Path, offset_bytes: int, size_bytes: int) -> bytearray:
        read.append(size_bytes)
        return original(path, offset_bytes, size_bytes)

    monkeypatch.setattr(source_files, "read_range", counting)
    checkpoint.expert(1, 6)
    assert sum(read) == checkpoint.spec.expert_bytes(1)


def test_weights_are_told_apart_and_a_copy_is_not(model: Path, tiny_folder: TinyFolder) -> None:
    original = Checkpoint.open(tiny_folder("mixtral", "plain")).weights_digest
    assert Checkpoint.open(model).weights_digest == original
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for change in (name, "model.layers.1.self_attn.q_proj.weight"):
        tensors = read_file(tiny_folder("mixtral", "plain") / "model.safetensors")
        tensors[change] += 1e-3
        write_file(model / "model.safetensors", tensors)
        assert Checkpoint.open(model).weights_digest != original


def test_every_expert_of_a_fused_tensor_counts(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    source = tiny_folder("gpt_oss", "plain")
    tensors = read_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"][5] += 1e-3
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    changed, original = Checkpoint.open(tmp_path), Checkpoint.open(source)
    assert changed.spec.digest == original.spec.digest
    assert changed.weights_digest != original.weights_digest


def test_auxiliary_files_are_those_that_exist(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "notes.txt").write_text("none of ours")
    names = [path.name for path in Checkpoint.open(model).auxiliary_files]
    assert names == ["tokenizer.json", "chat_template.jinja", "generation_config.json"]


def test_the_generation_config_is_read_beside_the_config(model: Path) -> None:
    assert Checkpoint.open(model).generation_config["eos_token_id"] == 2
    (model / "generation_config.json").unlink()
    assert Checkpoint.open(model).generation_config == {}
