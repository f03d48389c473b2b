"""Products with quantised weights are those of the dequantised matrix, whatever computes them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moepack_runtime import quantised
from moepack_runtime.ffn import QuantisedFfn, gated_ffn, rows_for
from moepack_runtime.int4_tiles import AVX2_TILE_ROWS, memory_tile_rows, rebuild, tiles_of
from moepack_runtime.quantised import Int4Matrix, Int8Matrix, QuantisedMatrix, Room, product
from moepack_runtime.weights import TORCH_DTYPE

from moepack.encodings import encoding, pack_tiles
from moepack.model_spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    RopeSpec,
    RouterSpec,
)
from moepack.working_memory import ROW_MULTIPLE, dequantised_bytes, workspace_bytes
from tests.support.memory import peak_bytes

DTYPES = {
    torch.float64: 1e-6,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A matrix, and what its codes mean in float64."""

    matrix: QuantisedMatrix
    exact: torch.Tensor
    #: As a segment holds them.
    parts: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, name: str, outputs: int, inputs: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        if name == "INT8":
            codes = random.integers(-127, 128, (outputs, inputs), np.int8)
            scale = torch.from_numpy(random.uniform(0, 1e-2, outputs)).bfloat16()
            self.exact = torch.from_numpy(codes).double() * scale.double()[:, None]
            self.parts = torch.from_numpy(codes), scale
            self.matrix = Int8Matrix(*self.parts)
            return
        group = encoding(name).group
        assert group is not None
        codes = random.integers(0, 16, (inputs, outputs), np.uint8)
        scales = torch.from_numpy(random.uniform(-1e-2, 1e-2, (inputs // group, outputs, 2)))
        scales = scales.bfloat16()
        scale, offset = scales.double().repeat_interleave(group, 0).unbind(-1)
        self.exact = ((torch.from_numpy(codes).double() - 8) * scale + offset).T
        packed = pack_tiles(codes)
        self.parts = torch.from_numpy(packed.copy()).view(outputs, inputs // 2), scales
        if memory_tile_rows(CPU) == AVX2_TILE_ROWS:
            rebuild(packed, outputs)
        stored = torch.from_numpy(packed).view(outputs, inputs // 2)
        self.matrix = Int4Matrix(stored, scales)

    def on(self, device: str) -> Case:
        """The same matrix on another device, where its tiles are those of the format."""
        moved = copy.copy(self)
        moved.exact = self.exact.to(device)
        codes, scales = (part.to(device) for part in self.parts)
        kind = Int8Matrix if isinstance(self.matrix, Int8Matrix) else Int4Matrix
        moved.matrix = kind(codes, scales)
        return moved

    def check(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        found = product(x, self.matrix, bias)
        assert found.dtype is x.dtype
        exact = x.double() @ self.exact.T
        bound = x.double().abs() @ self.exact.abs().T
        if bias is not None:
            exact, bound = exact + bias.double(), bound + bias.double().abs()
        assert bool(((found.double() - exact).abs() <= DTYPES[x.dtype] * bound + 1e-9).all())


NAMES = ["INT8", "INT4_G32", "INT4_G64"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(st.integers(1, 70), st.integers(1, 100), st.integers(1, 5), st.booleans())
def test_every_shape_and_dtype_gives_the_product_of_the_dequantised_matrix(
    name: str, dtype: torch.dtype, tokens: int, outputs: int, groups: int, has_bias: bool
) -> None:
    stored = encoding(name)
    inputs = groups * (stored.group or 20)
    if stored.kind == "int4":
        outputs *= 2
    case = Case(name, outputs, inputs, seed=outputs)
    bias = drawn(outputs, seed=2).to(dtype) if has_bias else None
    case.check(drawn(tokens, inputs).to(dtype), bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(64, 128), (16, 64), (80, 192), (144, 64), (2048, 512)]
)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 200])
def test_matrices_of_experts_give_it_by_kernel_and_in_parts(
    name: str, outputs: int, inputs: int, tokens: int
) -> None:
    case = Case(name, outputs, inputs)
    x = drawn(tokens, inputs).bfloat16()
    case.check(x)
    case.matrix.kernel_tokens = 0
    case.check(x, drawn(outputs).bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_device_gives_it_too(name: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(name, 1120, 1024).on("cuda")
    case.check(drawn(tokens, 1024).to("cuda", dtype), drawn(1120).to("cuda", dtype))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_are_taken_for_few_tokens_in_bfloat16_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name, 64, 64)
    if case.matrix.kernel_tokens == 0:
        pytest.skip("this torch has no kernel")
    taken = []
    kind = type(case.matrix)
    real = kind.by_kernel

    def counted(self: QuantisedMatrix, x: torch.Tensor) -> torch.Tensor:
        taken.append((len(x), x.dtype))
        return real(self, x)

    monkeypatch.setattr(kind, "by_kernel", counted)
    for dtype in DTYPES:
        for tokens in (1, case.matrix.kernel_tokens, case.matrix.kernel_tokens + 1):
            case.check(drawn(tokens, 64).to(dtype))
    assert taken == [(1, torch.bfloat16), (case.matrix.kernel_tokens, torch.bfloat16)]


def test_shapes_that_a_kernel_does_not_take_are_dequantised() -> None:
    assert Case("INT8", 64, 24).matrix.kernel_tokens == 0
    assert Case("INT4_G32", 24, 64).matrix.kernel_tokens == 0
    whole = torch.zeros(65 * 64, dtype=torch.int8)
    askew = whole[1 : 64 * 64 + 1].view(64, 64)
    assert Int8Matrix(askew, torch.zeros(64).bfloat16()).kernel_tokens == 0


@pytest.mark.parametrize("name", NAMES)
def test_tokens_may_lie_anywhere(name: str) -> None:
    case = Case(name, 64, 64)
    memory = drawn(9, 80).bfloat16()
    case.check(memory[1:4, 3:67])
    case.check(memory.flatten()[7 : 7 + 64].view(1, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_bits_depend_neither_on_threads_nor_on_where_the_weights_lie(
    name: str, tokens: int
) -> None:
    case = Case(name, 192, 1024)
    x = drawn(tokens, 1024).bfloat16()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += [product(x, Case(name, 192, 1024).matrix) for _ in range(3)]
    assert all(torch.equal(other, product(x, case.matrix)) for other in found)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_zero_give_zero_and_not_a_nan(name: str) -> None:
    matrix: QuantisedMatrix
    if name == "INT8":
        matrix = Int8Matrix(torch.zeros(64, 64, dtype=torch.int8), torch.zeros(64).bfloat16())
    else:
        groups = 64 // (encoding(name).group or 1)
        codes = torch.full((64, 32), 0x88, dtype=torch.uint8)
        matrix = Int4Matrix(codes, torch.zeros(groups, 64, 2).bfloat16())
    for tokens in (1, 100):
        assert torch.equal(product(drawn(tokens, 64).bfloat16(), matrix), torch.zeros(tokens, 64))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (256, 256), (1100, 1024), (96, 14336)])
@torch.inference_mode()
def test_dequantising_takes_what_is_planned(
    name: str, dtype: str, outputs: int, inputs: int
) -> None:
    matrix = Case(name, outputs, inputs).matrix
    x = drawn(1, inputs).to(TORCH_DTYPE[dtype])

    def dequantise() -> None:
        for _ in matrix.parts(Room(outputs, inputs, x)):
            pass

    assert peak_bytes(dequantise) <= dequantised_bytes(encoding(name), outputs, inputs, dtype)


@pytest.mark.parametrize("outputs", [2, 30, 32, 34, 64, 66, 80, 96, 112, 126, 128, 320])
def test_tiles_are_rebuilt_where_they_lie(outputs: int) -> None:
    codes = np.random.default_rng(outputs).integers(0, 16, (24, outputs), np.uint8)
    packed = pack_tiles(codes)
    np.testing.assert_array_equal(packed, tiles_of(codes, 64))
    rebuild(packed, outputs)
    np.testing.assert_array_equal(packed, tiles_of(codes, AVX2_TILE_ROWS))


@pytest.mark.parametrize("outputs", [64, 80, 96, 112, 320])
def test_matrices_in_rebuilt_tiles_are_dequantised_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    monkeypatch.setattr(quantised, "memory_tile_rows", lambda _: AVX2_TILE_ROWS)
    codes = np.random.default_rng(outputs).integers(0, 16, (64, outputs), np.uint8)
    scales = torch.rand(2, outputs, 2).bfloat16()
    stored = torch.from_numpy(tiles_of(codes, AVX2_TILE_ROWS)).view(outputs, 32)
    rebuilt = Int4Matrix(stored, scales)
    rebuilt.kernel_tokens = 0
    scale, offset = scales.float().repeat_interleave(32, 0).unbind(-1)
    weights = (torch.from_numpy(codes).float() - 8) * scale + offset
    torch.testing.assert_close(product(torch.eye(64), rebuilt), weights, atol=0, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("block", [1, 128])
@torch.inference_mode()
def test_an_expert_stays_within_the_planned_workspace(name: str, dtype: str, block: int) -> None:
    hidden, width = 256, 1024
    moe = MoeSpec(16, 4, width, RouterSpec())
    spec = ModelSpec(
        name="any",
        family="any",
        architecture="any",
        dtype=dtype,
        vocab_size=8,
        hidden_size=hidden,
        context_length=128,
        norm="rms",
        norm_eps=1e-6,
        tied_embeddings=True,
        rope=RopeSpec(1e4),
        layers=(LayerSpec(AttentionSpec(1, 1, 8, 8, 8, 0.1), moe, None),),
        trunk=(),
    )
    expert = QuantisedFfn(Case(name, 2 * width, hidden).matrix, Case(name, hidden, width).matrix)
    x = drawn(block, hidden).to(TORCH_DTYPE[dtype])
    taken = peak_bytes(lambda: gated_ffn(x, expert, moe.activation_spec))
    assert taken <= workspace_bytes(spec, 128, block, encodings={"BF16", name})
    for matrix in (expert.gate_up, expert.down):
        matrix.kernel_tokens = 0
    taken = peak_bytes(lambda: gated_ffn(x, expert, moe.activation_spec))
    assert taken <= workspace_bytes(spec, 128, block, encodings={"BF16", name})


@pytest.mark.parametrize("name", NAMES)
def test_few_tokens_are_multiplied_as_they_are_and_many_in_known_multiples(name: str) -> None:
    expert = QuantisedFfn(Case(name, 128, 64).matrix, Case(name, 64, 64).matrix)
    most = min(expert.gate_up.kernel_tokens, expert.down.kernel_tokens)
    for tokens in (1, 3, most, most + 1):
        wide = rows_for(tokens, drawn(1, 64), expert)
        assert wide == -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE
        kernels = tokens if 0 < tokens <= most else wide
        assert rows_for(tokens, drawn(1, 64).bfloat16(), expert) == kernels


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_an_int8_kernel_that_is_of_no_use_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def instead(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if broken == "missing":
            raise NotImplementedError("no such operation")
        return torch.zeros(len(x), len(scale), dtype=x.dtype)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", instead)
    quantised._has_int8.cache_clear()
    try:
        case = Case("INT8", 64, 64)
        assert case.matrix.kernel_tokens == 0
        assert "8-bit weights are dequantised" in caplog.text
        case.check(drawn(3, 64).bfloat16())
    finally:
        quantised._has_int8.cache_clear()
