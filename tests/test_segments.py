"""The geometry of segments, against brute force and against slicing by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack.encodings import encoding
from moepack.errors import GroupMismatchError
from moepack.model_spec import MoeSpec, RouterSpec
from moepack.segments import (
    PARTS,
    SegmentShape,
    cut_expert,
    cuts,
    granularity,
    neuron_bytes,
    segment_shape,
)

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def moe_of(width: int, *, bias: bool = False) -> MoeSpec:
    return MoeSpec(
        num_experts=8, top_k=2, intermediate_size=width, router=RouterSpec(), expert_bias=bias
    )


widths = st.integers(1, 2048)
hidden_sizes = st.integers(1, 4096)
dtypes = st.sampled_from(sorted(DTYPE_BYTES))
int4 = st.sampled_from(["INT4_G32", "INT4_G64"])


@given(widths, hidden_sizes, dtypes, st.booleans())
def test_a_neuron_is_two_rows_a_column_and_its_two_biases(
    width: int, hidden: int, dtype: str, bias: bool
) -> None:
    expected = (hidden + hidden + hidden + (1 + 1 if bias else 0)) * DTYPE_BYTES[dtype]
    assert neuron_bytes(moe_of(width, bias=bias), hidden, dtype) == expected


@given(st.integers(1, 16), st.integers(1, 16), int4)
def test_an_int4_neuron_takes_its_share_of_what_the_whole_expert_takes(
    width: int, hidden: int, name: str
) -> None:
    """Without biases everything grows with the neurons, scales of ``down`` by the group."""
    group = int(name[6:])
    moe, hidden = moe_of(group * width), group * hidden
    shape = segment_shape(moe, hidden, name, group * width, "top")
    assert shape is not None
    weights = 3 * hidden * group * width
    assert shape.size_bytes == weights // 2 + weights // group * 4
    assert neuron_bytes(moe, hidden, name) * group * width == shape.size_bytes


@given(st.integers(1, 64), st.integers(1, 128), st.booleans())
def test_an_int8_expert_takes_a_byte_a_weight_and_a_scale_a_row(
    width: int, hidden: int, bias: bool
) -> None:
    moe, hidden = moe_of(4 * width, bias=bias), 4 * hidden
    parts = [segment_shape(moe, hidden, "INT8", 2 * width // 4 * 4, p, "F32") for p in PARTS]
    size_bytes = sum(shape.size_bytes for shape in parts if shape is not None)
    biases = 4 * (8 * width + hidden) if bias else 0
    present = sum(shape is not None for shape in parts)  # each part has the scales of down
    assert size_bytes == 12 * width * hidden + 2 * (8 * width + present * hidden) + biases
    for shape in parts:
        for tensor in () if shape is None else shape.tensors:
            assert tensor.offset_bytes % {"I8": 1, "BF16": 2, "F32": 4}[tensor.dtype] == 0


def check_granularity(width: int, hidden: int, name: str, group: int, bias: bool) -> None:
    moe = moe_of(width, bias=bias)
    step = granularity(moe, hidden, name)
    assert step >= 16
    assert step % group == 0
    neuron = neuron_bytes(moe, hidden, name)
    aligned = [n for n in range(16, width + 1) if n % group == 0 and n * neuron % 4096 == 0]
    smallest = min(n for n in range(16, 16 + group) if n % group == 0)
    # Interior cuts are the multiples of the step strictly inside the width.
    enough = [n for n in aligned[:1] if len(range(n, width, n)) >= 4]
    assert step == (enough[0] if enough else smallest)


@given(widths, hidden_sizes, dtypes, st.booleans())
def test_granularity_is_the_smallest_aligned_step_or_sixteen(
    width: int, hidden: int, dtype: str, bias: bool
) -> None:
    check_granularity(width, hidden, dtype, 1, bias)


@given(st.integers(1, 64), st.integers(1, 128), int4, st.booleans())
def test_granularity_of_a_quantised_expert_is_a_multiple_of_its_group(
    width: int, hidden: int, name: str, bias: bool
) -> None:
    group = int(name[6:])
    check_granularity(group * width, group * hidden, name, group, bias)


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "step"),
    [
        (2048, 768, "BF16", 16),  # Qwen3-30B-A3B: 16 neurons are 192 KiB
        (4096, 14336, "BF16", 16),  # Mixtral-8x7B
        (128, 96, "BF16", 16),  # 16 neurons are 12 KiB
        (2880, 2880, "BF16", 32),  # 17,280 bytes a neuron
        (100, 96, "BF16", 16),  # 1024 neurons would be needed: padding instead
        (2048, 768, "INT4_G32", 32),  # 32 neurons are 120 KiB
        (2048, 768, "INT4_G64", 64),
        (2048, 768, "INT8", 16),  # scales leave no multiple of a page: padding instead
    ],
)
def test_granularity_of_real_shapes(hidden: int, width: int, dtype: str, step: int) -> None:
    assert granularity(moe_of(width), hidden, dtype) == step


def check_cuts(width: int, hidden: int, name: str) -> None:
    step = granularity(moe_of(width), hidden, name)
    expected = sorted({*(n for n in range(width) if n % step == 0), width})
    assert list(cuts(moe_of(width), hidden, name)) == expected


@given(widths, hidden_sizes, dtypes)
def test_cuts_are_the_steps_from_nothing_to_the_whole(width: int, hidden: int, dtype: str) -> None:
    check_cuts(width, hidden, dtype)


@given(st.integers(1, 64), st.integers(1, 128), int4)
def test_cuts_of_quantised_experts_are_steps_too(width: int, hidden: int, name: str) -> None:
    group = encoding(name).multiple
    check_cuts(group * width, group * hidden, name)


@pytest.mark.parametrize(("hidden", "width"), [(128, 96), (96, 128), (16, 16)])
def test_what_the_group_does_not_divide_is_refused(hidden: int, width: int) -> None:
    with pytest.raises(GroupMismatchError, match="a multiple of 64; choose"):
        cuts(moe_of(width), hidden, "INT4_G64")
    with pytest.raises(GroupMismatchError, match="a multiple of 64; choose"):
        segment_shape(moe_of(width), hidden, "INT4_G64", width, "top")


def test_a_cut_through_a_group_is_refused() -> None:
    with pytest.raises(GroupMismatchError, match="cut after 16 neurons, expected a multiple of 32"):
        segment_shape(moe_of(96), 128, "INT4_G32", 16, "top")


@given(widths, hidden_sizes, dtypes, st.booleans(), st.data())
def test_the_parts_of_an_expert_hold_all_of_it_once(
    width: int, hidden: int, dtype: str, bias: bool, data: st.DataObject
) -> None:
    moe = moe_of(width, bias=bias)
    split = data.draw(st.integers(0, width))
    shapes = [segment_shape(moe, hidden, dtype, split, part) for part in PARTS]
    assert [shape is None for shape in shapes] == [split == 0, split == width]
    present = [shape for shape in shapes if shape is not None]
    whole_elements = 3 * width * hidden + (2 * width + hidden if bias else 0)
    assert sum(shape.size_bytes for shape in present) == whole_elements * DTYPE_BYTES[dtype]
    assert sum(shape.neurons for shape in present) == width
    for shape in present:
        check_layout_of(shape)


def check_layout_of(shape: SegmentShape) -> None:
    """Tensors follow each other without holes, and padding ends on the alignment."""
    position = 0
    for tensor in shape.tensors:
        assert tensor.offset_bytes == position
        position += tensor.size_bytes
    assert shape.size_bytes == position
    assert shape.stored_bytes % 4096 == 0
    assert 0 <= shape.stored_bytes - shape.size_bytes < 4096


@given(st.integers(1, 24), st.integers(1, 12), st.booleans(), st.data())
def test_cutting_takes_the_rows_columns_and_biases_of_each_side(
    width: int, hidden: int, bias: bool, data: st.DataObject
) -> None:
    split = data.draw(st.integers(0, width))
    random = np.random.default_rng(width * 1000 + hidden)

    def bits(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
        return random.integers(0, 1 << 16, shape, dtype=np.uint16)

    gate, up, down = bits(width, hidden), bits(width, hidden), bits(hidden, width)
    weights = {"gate.weight": gate, "up.weight": up, "down.weight": down}
    gate_bias, up_bias, down_bias = bits(width), bits(width), bits(hidden)
    if bias:
        weights |= {"gate.bias": gate_bias, "up.bias": up_bias, "down.bias": down_bias}
    moe = moe_of(width, bias=bias)
    for part, neurons in (("top", range(split)), ("bottom", range(split, width))):
        shape = segment_shape(moe, hidden, "BF16", split, "top" if part == "top" else "bottom")
        if shape is None:
            continue
        expected = [gate[n, h] for n in neurons for h in range(hidden)]
        expected += [up[n, h] for n in neurons for h in range(hidden)]
        expected += [down[h, n] for h in range(hidden) for n in neurons]
        if bias:
            expected += [gate_bias[n] for n in neurons] + [up_bias[n] for n in neurons]
            if part == "bottom" or split == width:
                expected += list(down_bias)
        found = cut_expert(weights, shape, "top" if part == "top" else "bottom")
        assert found == np.array(expected, dtype=np.uint16).tobytes()


@given(widths, st.integers(1, 4096))
def test_a_split_outside_the_width_is_refused(width: int, beyond: int) -> None:
    for split in (-beyond, width + beyond):
        with pytest.raises(ValueError, match="outside"):
            segment_shape(moe_of(width), 64, "BF16", split, "top")


def test_weights_of_another_width_are_refused() -> None:
    shape = segment_shape(moe_of(32), 8, "BF16", 16, "top")
    assert shape is not None
    narrow = {
        "gate.weight": np.zeros((32, 8), np.uint8),
        "up.weight": np.zeros((32, 8), np.uint8),
        "down.weight": np.zeros((8, 32), np.uint8),
    }
    with pytest.raises(ValueError, match=r"gate\.weight"):
        cut_expert(narrow, shape, "top")
