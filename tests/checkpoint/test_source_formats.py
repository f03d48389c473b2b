"""Checkpoints in FP8 and MXFP4: what they are told to be, read as, and refused for."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moepack import source_files
from moepack.checkpoint import Checkpoint
from moepack.errors import (
    CheckpointError,
    DamagedCheckpointError,
    LeftoverTensorError,
    MissingTensorError,
    TensorMismatchError,
    UnsupportedEncodingError,
)
from moepack.source_formats import stored_tensors
from moepack.source_headers import TensorHeader
from tests.support.quantised_sources import (
    QUANTISED,
    change_config,
    change_tensors,
    dequantised_model,
    quantised_model,
)

FP8 = "qwen3_moe-fp8"
MXFP4 = "gpt_oss-mxfp4"
CONFIGS = Path(__file__).parent / "hub_configs"

every_model = pytest.mark.parametrize("key", [made.key for made in QUANTISED])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a quantised model of float32, made on first use."""
    folders: dict[str, Path] = {}

    def folder(key: str) -> Path:
        if key not in folders:
            folders[key] = quantised_model(key, tmp_path_factory.mktemp(key))
        return folders[key]

    return folder


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same to be broken."""
    return lambda key: Path(shutil.copytree(made(key), tmp_path / key))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every_model
def test_every_tensor_is_what_transformers_makes_of_it(
    tmp_path: Path, key: str, dtype: str
) -> None:
    folder = quantised_model(key, tmp_path / "source", dtype)
    found = Checkpoint.open(folder)
    wanted = Checkpoint.open(dequantised_model(folder, tmp_path / "plain"))
    spec = found.spec
    assert spec.digest == wanted.spec.digest
    assert spec.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    for info in spec.trunk:
        tensor = found.trunk_tensor(info.name)
        np.testing.assert_array_equal(tensor, wanted.trunk_tensor(info.name), err_msg=info.name)
    for layer in spec.moe_layers:
        for expert in range(spec.moe(layer).num_experts):
            tensors = found.expert(layer, expert)
            for name, expected in wanted.expert(layer, expert).items():
                assert tensors[name].flags.c_contiguous
                assert tensors[name].dtype == expected.dtype
                np.testing.assert_array_equal(tensors[name], expected)
    assert found.weights_digest != wanted.weights_digest


@every_model
def test_what_the_files_hold_is_told_from_the_headers(
    made: Callable[[str], Path], tmp_path: Path, key: str
) -> None:
    found = Checkpoint.open(made(key))
    tensors = load_file(made(key) / "model.safetensors")
    assert found.source_size.encoding == key.partition("-")[2].upper()
    assert found.source_size.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    plain = Checkpoint.open(dequantised_model(made(key), tmp_path))
    assert plain.source_size.encoding == "F32"
    assert plain.source_size.size_bytes == plain.spec.weights_bytes == found.spec.weights_bytes


def test_codes_and_scales_may_lie_in_different_shards(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    one = Checkpoint.open(made(FP8))
    tensors = load_file(made(FP8) / "model.safetensors")
    shutil.copy(made(FP8) / "config.json", tmp_path)
    shards = {
        "codes.safetensors": {k: v for k, v in tensors.items() if not k.endswith("_scale_inv")},
        "scales.safetensors": {k: v for k, v in tensors.items() if k.endswith("_scale_inv")},
    }
    for file, part in shards.items():
        save_file(part, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    two = Checkpoint.open(tmp_path)
    assert two.spec.digest == one.spec.digest
    for name, bits in one.expert(1, 3).items():
        np.testing.assert_array_equal(two.expert(1, 3)[name], bits)


@pytest.mark.parametrize(
    ("key", "name", "place"),
    [
        (FP8, "model.layers.0.mlp.up_proj.weight_scale_inv", (1, 0)),
        (FP8, "model.layers.1.mlp.experts.5.down_proj.weight_scale_inv", (1, 0)),
        (MXFP4, "model.layers.1.mlp.experts.down_proj_scales", (5, 30, 1)),
        (MXFP4, "model.layers.2.mlp.experts.gate_up_proj_blocks", (7, 96, 0, 4)),
    ],
)
def test_codes_and_scales_tell_weights_apart(
    copy: Callable[[str], Path], key: str, name: str, place: tuple[int, ...]
) -> None:
    folder = copy(key)
    original = Checkpoint.open(folder)
    digest = original.weights_digest
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[place] += 1
    change_tensors(folder, {name: tensor})
    changed = Checkpoint.open(folder)
    assert changed.spec.digest == original.spec.digest
    assert changed.weights_digest != digest


def test_of_many_experts_only_the_one_is_read(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(made(MXFP4))
    read = []
    original = source_files.read_range

    def counting(path: Path, offset_bytes: int, size_bytes: int) -> bytearray:
        read.append(size_bytes)
        return original(path, offset_bytes, size_bytes)

    monkeypatch.setattr(source_files, "read_range", counting)
    checkpoint.expert(1, 6)
    weights = 3 * 96 * 64
    assert sum(read) == weights // 2 + weights // 32 + 4 * (2 * 96 + 64)


@pytest.mark.parametrize("key", [FP8, MXFP4])
def test_the_dtype_is_that_of_the_config_and_else_bfloat16(
    copy: Callable[[str], Path], key: str
) -> None:
    folder = copy(key)
    tensors = load_file(folder / "model.safetensors")
    floats = {n: t.bfloat16() for n, t in tensors.items() if t.dtype == torch.float32}
    change_tensors(folder, {n: t for n, t in floats.items() if "scale_inv" not in n})
    for dtype in (None, "bfloat16"):
        change_config(folder, dtype=None, torch_dtype=dtype)
        assert Checkpoint.open(folder).spec.dtype == "BF16"
    change_config(folder, dtype="float64")
    with pytest.raises(UnsupportedEncodingError, match="'float64'; expected one of bfloat16"):
        Checkpoint.open(folder)


def refused(folder: Path, error: type[CheckpointError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        Checkpoint.open(folder)
    assert caught.type is error


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "mxfp8", None, ["fp8"]])
def test_methods_that_are_not_read_are_refused_by_name(
    copy: Callable[[str], Path], method: object
) -> None:
    folder = copy(FP8)
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    name = "QUANTIZATION_CONFIG" if method is None else "FP8" if method == ["fp8"] else str(method)
    refused(folder, UnsupportedEncodingError, f"(?i){name}.*expected one of fp8, mxfp4")
    change_config(folder, quantization_config=None, compression_config={"format": "naive"})
    refused(folder, UnsupportedEncodingError, "COMPRESSION_CONFIG")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight_block_size": None}, UnsupportedEncodingError, "without a weight_block_size"),
        ({"weight_block_size": [128]}, DamagedCheckpointError, "height and a width"),
        ({"weight_block_size": [128, 0]}, DamagedCheckpointError, "height and a width"),
        ({"weight_block_size": [128, 2**70]}, DamagedCheckpointError, "height and a width"),
        ({"weight_block_size": "128"}, DamagedCheckpointError, "integers"),
        ({"weight_block_size": [64, 128]}, TensorMismatchError, "of shape"),
        ({"fmt": "e5m2"}, UnsupportedEncodingError, "fmt = 'e5m2'"),
        ({"expert_dtype": "fp4"}, UnsupportedEncodingError, "expert_dtype = 'fp4'"),
    ],
)
def test_varieties_of_fp8_that_are_not_read_are_named(
    copy: Callable[[str], Path],
    change: dict[str, Any],
    error: type[CheckpointError],
    match: str,
) -> None:
    folder = copy(FP8)
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, quantization_config=config["quantization_config"] | change)
    refused(folder, error, match)


ATTENTION = "model.layers.2.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("key", "name", "tensor", "error", "match"),
    [
        (FP8, f"{EXPERT}_scale_inv", None, MissingTensorError, "expected it beside"),
        (FP8, f"{ATTENTION}_scale_inv", torch.ones(2, 1), TensorMismatchError, r"\[2, 2\]"),
        (FP8, f"{EXPERT}_scale_inv", torch.ones(2), TensorMismatchError, r"\[2, 1\]"),
        (FP8, f"{EXPERT}_scale_inv", torch.ones(2, 1).int(), TensorMismatchError, "is I32"),
        (FP8, EXPERT, torch.ones(256, 128), LeftoverTensorError, "_scale_inv"),
        (FP8, EXPERT, None, MissingTensorError, "down_proj.weight"),
        (FP8, EXPERT, torch.ones(256).to(torch.float8_e4m3fn), TensorMismatchError, "a matrix"),
        (MXFP4, f"{FUSED}_scales", None, MissingTensorError, "expected it beside"),
        (MXFP4, f"{FUSED}_blocks", None, MissingTensorError, "expected it beside"),
        (MXFP4, f"{FUSED}_scales", torch.ones(8, 192, 3).byte(), TensorMismatchError, "192, 2"),
        (MXFP4, f"{FUSED}_scales", torch.ones(8, 192, 2), TensorMismatchError, "is F32"),
        (MXFP4, f"{FUSED}_blocks", torch.ones(8, 192, 16).byte(), TensorMismatchError, "groups"),
        (MXFP4, f"{FUSED}_blocks", torch.ones(8, 192, 2, 8).byte(), TensorMismatchError, "16"),
        (MXFP4, f"{FUSED}_bias", torch.ones(8, 192).half(), UnsupportedEncodingError, "is F16"),
    ],
)
def test_codes_and_scales_that_do_not_belong_together_are_named(
    copy: Callable[[str], Path],
    key: str,
    name: str,
    tensor: torch.Tensor | None,
    error: type[CheckpointError],
    match: str,
) -> None:
    folder = copy(key)
    change_tensors(folder, {name: tensor})
    refused(folder, error, match)
    layer = name.removesuffix("_scale_inv").removesuffix("_scales").removesuffix("_blocks")
    refused(folder, error, layer)


@pytest.mark.parametrize(
    ("key", "name", "place", "value", "match"),
    [
        (FP8, f"{EXPERT}_scale_inv", (1, 0), float("nan"), r"a scale of nan at \[1, 0\]"),
        (FP8, f"{ATTENTION}_scale_inv", (0, 1), float("inf"), r"a scale of inf at \[0, 1\]"),
        (FP8, EXPERT, (200, 99), float("nan"), "no numbers"),
        (MXFP4, f"{FUSED}_scales", (5, 190, 1), 255, "no numbers"),
    ],
)
def test_values_that_are_no_numbers_are_named_when_they_are_read(
    copy: Callable[[str], Path],
    key: str,
    name: str,
    place: tuple[int, ...],
    value: float,
    match: str,
) -> None:
    folder = copy(key)
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[place] = value
    change_tensors(folder, {name: tensor})
    checkpoint = Checkpoint.open(folder)
    in_trunk = name.startswith(ATTENTION)
    read = partial(checkpoint.trunk_tensor, "layers.2.attn.q.weight")
    with pytest.raises(DamagedCheckpointError, match=match) as caught:
        read() if in_trunk else checkpoint.expert(1, 5)
    assert name.removesuffix("_scale_inv").removesuffix("_scales") in str(caught.value)
    checkpoint.expert(1, 4)


def test_quantised_tensors_need_a_config_that_says_how(copy: Callable[[str], Path]) -> None:
    for key, stored in ((FP8, "F8_E4M3"), (MXFP4, "MXFP4")):
        folder = copy(key)
        change_config(folder, quantization_config=None)
        refused(folder, UnsupportedEncodingError, f"stored in {stored}.*quantization_config")


def test_a_fused_tensor_in_fp8_has_scales_for_every_expert(tmp_path: Path) -> None:
    """As transformers names them, which publishers might keep."""
    codes = torch.randn(3, 200, 130).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, 2)
    save_file({"x": codes, "x_scale_inv": scales}, tmp_path / "model.safetensors")
    headers = source_files.read_header(tmp_path / "model.safetensors", "model.safetensors", "m")
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = stored_tensors({"quantization_config": method}, headers, "m")
    assert list(tensors) == ["x"]
    assert (tensors["x"].dtype, tensors["x"].shape) == ("BF16", (3, 200, 130))
    spread = scales[2].repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :130]
    expected = (codes[2].float() * spread).bfloat16().view(torch.int16).numpy()
    found = tensors["x"].entry(2).read(tmp_path)
    np.testing.assert_array_equal(found.view(np.int16), expected)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_reading_takes_the_result_its_codes_and_little_more(tmp_path: Path, method: str) -> None:
    codes = torch.zeros(2, 1440, 90, 16, dtype=torch.uint8)
    scales = torch.full((2, 1440, 90), 127, dtype=torch.uint8)
    if method == "fp8":
        codes = torch.zeros(2, 1024, 2048).to(torch.float8_e4m3fn)
        scales = torch.ones(2, 8, 16)
    names = {"fp8": ("x", "x_scale_inv"), "mxfp4": ("x_blocks", "x_scales")}[method]
    save_file(dict(zip(names, (codes, scales), strict=True)), tmp_path / "m.safetensors")
    headers = source_files.read_header(tmp_path / "m.safetensors", "m.safetensors", "m")
    config = {"quant_method": method, "weight_block_size": [128, 128]}
    entry = stored_tensors({"quantization_config": config}, headers, "m")["x"].entry(1)
    entry.read(tmp_path)  # tables that are kept
    tracemalloc.start()
    result = entry.read(tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes <= result.nbytes + entry.size_bytes + (3 << 19)


@pytest.mark.parametrize(
    ("key", "width"), [(FP8, "moe_intermediate_size"), (MXFP4, "intermediate_size")]
)
def test_an_expert_takes_itself_what_is_fused_and_the_codes_of_one_tensor(
    tmp_path: Path, key: str, width: str
) -> None:
    sizes = {width: 2048, "hidden_size": 512, "num_hidden_layers": 2}
    few = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    checkpoint = Checkpoint.open(quantised_model(key, tmp_path, "bfloat16", **sizes, **few))
    checkpoint.expert(1, 0)  # tables that are kept
    tracemalloc.start()
    tensors = checkpoint.expert(1, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expert_bytes = sum(bits.nbytes for bits in tensors.values())
    matrix_bytes = 2 * 2048 * 512
    assert expert_bytes >= 3 * matrix_bytes
    # GPT-OSS keeps gate and up in one; its codes are a quarter of the result, FP8's half.
    fused_bytes, codes_bytes = {FP8: (0, 1.01 / 2), MXFP4: (2, 1.1 / 4 * 2)}[key]
    assert peak_bytes <= expert_bytes + matrix_bytes * (fused_bytes + codes_bytes) + (3 << 19)


class Published:
    """A model of whose files only the headers are known."""

    def __init__(self, config: dict[str, Any], headers: dict[str, TensorHeader]) -> None:
        self.name = "published"
        self.files = ("config.json", "model.safetensors")
        self._config = config
        self._headers = headers

    def read(self, file: str) -> bytes:
        assert file == "config.json"
        return json.dumps(self._config).encode()

    def read_header(self, file: str) -> dict[str, TensorHeader]:
        assert file == "model.safetensors"
        return self._headers

    def weights_digest(self, shards: tuple[str, ...]) -> str:
        return shards[0]


def header(dtype: str, *shape: int) -> TensorHeader:
    size_bytes = int(np.prod(shape)) * {"BF16": 2, "F32": 4}.get(dtype, 1)
    return TensorHeader(dtype, shape, "model.safetensors", 0, size_bytes)


def published(name: str) -> Published:
    """The config of a release, and headers as they are there, out of transformers' modules."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    keys = {**config}
    model_type = keys.pop("model_type").replace("kimi_k2", "deepseek_v3")
    keys.pop("quantization_config")
    parsed = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(keys)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    headers = {}
    for tensor, shape in ((name, tuple(t.shape)) for name, t in model.state_dict().items()):
        if config["quantization_config"]["quant_method"] == "mxfp4":
            if tensor.endswith(("gate_up_proj", "down_proj")):
                groups = (shape[0], shape[2], shape[1] // 32)
                headers[f"{tensor}_blocks"] = header("U8", *groups, 16)
                headers[f"{tensor}_scales"] = header("U8", *groups)
                continue
        elif "_proj" in tensor and not tensor.endswith("bias"):
            tiles = (-(-shape[-2] // 128), -(-shape[-1] // 128))
            headers[tensor] = header("F8_E4M3", *shape)
            headers[f"{tensor}_scale_inv"] = header("F32", *shape[:-2], *tiles)
            continue
        headers[tensor] = header("BF16", *shape)
    return Published(config, headers)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        # The model card of GPT-OSS: a checkpoint of 12.8 GiB.
        ("gpt-oss-20b", 12.8 * 1.073741824),
        # A byte a parameter, two for embedding and head, scales of 4 bytes for 16,384.
        ("deepseek-v3", 671.0 + 2 * 129_280 * 7168 / 1e9 + 0.16),
        ("kimi-k2", 1026.4 + 2 * 163_840 * 7168 / 1e9 + 0.25),
    ],
)
def test_releases_are_accounted_for_from_their_headers(name: str, gigabytes: float) -> None:
    source = published(name)
    checkpoint = Checkpoint(source, None)
    assert checkpoint.source_size.size_bytes / 1e9 == pytest.approx(gigabytes, rel=0.003)
    spec = checkpoint.spec
    assert spec.dtype == "BF16"
    assert spec.weights_bytes == 2 * spec.total_parameters
    assert {info.dtype for info in spec.trunk} == {"BF16"}


def test_layers_for_multi_token_prediction_are_not_counted() -> None:
    source = published("deepseek-v3")
    size_bytes = Checkpoint(source, None).source_size.size_bytes
    extra = "model.layers.61.self_attn.o_proj.weight"
    source._headers[extra] = header("F8_E4M3", 7168, 16384)
    source._headers[f"{extra}_scale_inv"] = header("F32", 56, 128)
    checkpoint = Checkpoint(source, None)
    assert checkpoint.spec.unused == (extra,)
    assert checkpoint.source_size.size_bytes == size_bytes
