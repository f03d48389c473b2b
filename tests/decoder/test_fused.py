"""The kernels for one token's experts: what they are handed, and what they give on a device."""

from __future__ import annotations

import logging

import pytest
import torch
from moepack_runtime import fused_check
from moepack_runtime.ffn import FfnWeights, QuantisedFfn, gated_ffn
from moepack_runtime.fused import SEGMENTS, Segment, TokenRows, by_form, packed, step
from moepack_runtime.int4_fragments import in_memory
from moepack_runtime.pieces import segment_weights
from moepack_runtime.places import Place, form_of
from moepack_runtime.quantised import Int8Matrix
from moepack_runtime.weights import TORCH_DTYPE

from moepack.model_spec import ActivationSpec, MoeSpec, RouterSpec
from moepack.segments import SegmentShape, segment_shape

HIDDEN, NEURONS = 320, 96
SILU = ActivationSpec("silu")
GELU = ActivationSpec("gelu")
GPT_OSS = ActivationSpec("clamped_swiglu", alpha=1.7, limit=0.8)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def shape_of(name: str, *, bias: bool = False, neurons: int = NEURONS) -> SegmentShape:
    moe = MoeSpec(2, 2, neurons, RouterSpec(), expert_bias=bias)
    found = segment_shape(moe, HIDDEN, name, neurons, "top", "BF16")
    assert found is not None
    return found


def placed(address: int, shape: SegmentShape) -> FfnWeights:
    form = form_of(shape)
    assert form is not None
    nothing = torch.empty(0)
    return FfnWeights(nothing, nothing, nothing, place=Place(address, form))


def test_segments_of_one_form_go_together_and_keep_their_rows() -> None:
    narrow, wide = shape_of("BF16", neurons=32), shape_of("BF16")
    nothing = torch.empty(0)
    strange = FfnWeights(nothing, nothing, nothing)
    shapes = (narrow, wide, None, narrow)
    segments = [
        Segment(row, strange if shape is None else placed(4096 * row, shape))
        for row, shape in enumerate(shapes)
    ]
    found = {form: [segment.row for segment in alike] for form, alike in by_form(segments)}
    assert found == {form_of(narrow): [0, 3], form_of(wide): [1], None: [2]}


def test_a_launch_has_as_many_addresses_as_it_takes() -> None:
    shape = shape_of("BF16")
    addresses, rows = packed([Segment(row, placed(4096 * row, shape)) for row in (5, 2, 7)])
    assert addresses[:3] == [20480, 8192, 28672]
    assert rows[:3] == [5, 2, 7]
    assert len(addresses) == len(rows) == SEGMENTS
    assert set(addresses[3:]) == {20480}, "memory that may be read"


@pytest.mark.parametrize("name", ["BF16", "F32", "INT8"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_form_tells_where_the_tensors_lie(name: str, bias: bool) -> None:
    """Where the engine's own views of the segment begin."""
    shape = shape_of(name, bias=bias)
    form = form_of(shape)
    assert form is not None
    assert form is form_of(shape_of(name, bias=bias)), "one object for what is alike"
    assert (form.hidden, form.neurons) == (HIDDEN, NEURONS)
    memory = torch.zeros(shape.stored_bytes, dtype=torch.uint8)
    weights = segment_weights(memory, shape)
    if isinstance(weights, FfnWeights):
        assert memory.data_ptr() + form.gate_up.codes == weights.gate.data_ptr()
        assert memory.data_ptr() + form.down.codes == weights.down.data_ptr()
        assert form.gate_up.scales == form.down.scales == -1
    else:
        for place, matrix in ((form.gate_up, weights.gate_up), (form.down, weights.down)):
            assert isinstance(matrix, Int8Matrix)
            assert memory.data_ptr() + place.codes == matrix._codes.data_ptr()
            assert memory.data_ptr() + place.scales == matrix._scale.data_ptr()
    of_biases = (weights.gate_up_bias, weights.down_bias)
    for offset, view in zip((form.gate_up.bias, form.down.bias), of_biases, strict=True):
        if view is None:
            assert offset == -1
        else:
            assert memory.data_ptr() + offset == view.data_ptr()


def test_what_no_kernel_reads_has_no_form() -> None:
    assert form_of(shape_of("INT4_G32")) is None, "tiles, not fragments"
    moe = MoeSpec(2, 2, 24, RouterSpec())
    odd = segment_shape(moe, HIDDEN, "BF16", 24, "top")
    assert odd is not None
    assert form_of(odd) is None


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(2048, 1024), (768, 256), (1024, 1024), (2880, 1024), (96, 128), (64, 64), (16, 32)],
)
def test_steps_divide_their_inputs_or_are_few(inputs: int, expected: int) -> None:
    assert step(inputs) == expected


def test_missing_kernels_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str, device: torch.device) -> bool:
        raise ImportError("No module named 'triton'\nand more")

    monkeypatch.setattr(fused_check, "_is_right", fail)
    fused_check.has_kernels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(fused_check.has_kernels(torch.device("meta")) for _ in range(3))
    fused_check.has_kernels.cache_clear()
    (record,) = caplog.records
    assert "launch by launch, which is slower" in record.message
    assert "(No module named 'triton')" in record.message


class Drawn:
    """Some segments of random numbers on a device."""

    def __init__(self, shape: SegmentShape, dtype: torch.dtype, count: int) -> None:
        draw = torch.Generator().manual_seed(7)
        device = torch.device("cuda", 0)
        shape = in_memory(shape, "BF16", device)
        self.x = torch.randn(1, HIDDEN, generator=draw).to(device, dtype)
        self.segments: list[FfnWeights | QuantisedFfn] = []
        for _ in range(count):
            memory = torch.zeros(shape.stored_bytes, dtype=torch.uint8)
            for tensor in shape.tensors:
                room = memory[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
                if tensor.dtype in {"I8", "U8"}:
                    room.random_(0, 256, generator=draw)
                else:
                    of_codes = 1e-2 if ".scale" in tensor.name else 0.2
                    room.view(TORCH_DTYPE[tensor.dtype]).normal_(0, of_codes, generator=draw)
            weights = segment_weights(memory.to(device), shape)
            assert weights.place is not None, "the kernels take them"
            self.segments.append(weights)

    def rows(
        self, order: list[int], portions: list[int], activation: ActivationSpec
    ) -> torch.Tensor:
        rows = TokenRows(self.x, len(self.segments), activation)
        rows.values.fill_(torch.nan)
        for first, last in zip(portions, [*portions[1:], None], strict=True):
            rows.compute([Segment(row, self.segments[row]) for row in order[first:last]])
        return rows.values


CASES = [
    ("BF16", torch.bfloat16, SILU, False),
    ("BF16", torch.bfloat16, GPT_OSS, True),
    ("F32", torch.float32, GELU, False),
    ("F32", torch.float32, SILU, True),
    ("INT8", torch.bfloat16, SILU, False),
    ("INT8", torch.bfloat16, GPT_OSS, True),
    ("INT4_G32", torch.bfloat16, SILU, False),
    ("INT4_G32", torch.bfloat16, GPT_OSS, True),
]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize(("name", "dtype", "activation", "bias"), CASES)
@torch.inference_mode()
def test_rows_are_torchs_in_whatever_company(
    name: str, dtype: torch.dtype, activation: ActivationSpec, bias: bool
) -> None:
    """More segments than a launch takes; the bits are those that each gives alone."""
    assert fused_check.has_kernels(torch.device("cuda", 0))
    count = SEGMENTS + 2
    drawn = Drawn(shape_of(name, bias=bias), dtype, count)
    whole = drawn.rows(list(range(count)), [0], activation)
    for row, weights in zip(whole, drawn.segments, strict=True):
        expected = gated_ffn(drawn.x, weights, activation)[0].double()
        bound = (2**-5 if dtype is torch.bfloat16 else 1e-5) * expected.abs().max().item()
        torch.testing.assert_close(row.double(), expected, atol=bound, rtol=0)
    alone = drawn.rows(list(range(count)), list(range(count)), activation)
    assert torch.equal(whole, alone)
    turned = drawn.rows(list(range(count))[::-1], [0, 3, 4], activation)
    assert torch.equal(whole, turned)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_shared", [False, True])
@torch.inference_mode()
def test_rows_are_added_in_float32_and_rounded_once(dtype: torch.dtype, has_shared: bool) -> None:
    device = torch.device("cuda", 0)
    draw = torch.Generator().manual_seed(3)
    residual, shared = (torch.randn(1, 700, generator=draw).to(device, dtype) for _ in range(2))
    weights = torch.rand(3, generator=draw).to(device)
    rows = TokenRows(residual, 6, SILU)
    rows.values.copy_(torch.randn(6, 700, generator=draw))
    exact = (rows.values.double() * weights.double().repeat_interleave(2)[:, None]).sum(0)
    exact = exact + shared.double() if has_shared else exact[None]
    before = residual.clone()
    rows.add_to(residual, shared if has_shared else None, weights)
    # One rounding to the dtype may fall to the other side; nine of numbers below 16 to float32.
    bound = 2.0**-7 if dtype is torch.bfloat16 else 9 * 2.0**-21
    torch.testing.assert_close(residual, before + exact.to(dtype), atol=bound, rtol=bound)
