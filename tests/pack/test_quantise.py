"""Whole experts in quantised encodings: through bytes and back, cut anywhere, refused by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.encodings import QUANTISED, encoding
from moepack.errors import GroupMismatchError, NonFiniteWeightError
from moepack.model_spec import MoeSpec, RouterSpec
from moepack.quantise import (
    Importance,
    dequantise_expert,
    dequantise_segment,
    quantise_expert,
)
from moepack.rounding import from_bf16, to_bf16
from moepack.segments import PARTS, Bits, SegmentShape, cut_expert, segment_shape
from tests.pack import plain_rounding as plain

Expert = dict[str, Bits]


def expert_of(
    hidden: int, width: int, *, dtype: str = "BF16", bias: bool = False, seed: int = 0
) -> Expert:
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "gate.weight": (width, hidden),
        "up.weight": (width, hidden),
        "down.weight": (hidden, width),
    }
    if bias:
        shapes |= {"gate.bias": (width,), "up.bias": (width,), "down.bias": (hidden,)}
    values = {name: random.standard_normal(shape) * 0.02 for name, shape in shapes.items()}
    match dtype:
        case "BF16":
            return {name: to_bf16(value.astype(np.float32)) for name, value in values.items()}
        case "F16":
            return {
                name: value.astype(np.float16).view(np.uint16) for name, value in values.items()
            }
        case "F32":
            return {
                name: value.astype(np.float32).view(np.uint32) for name, value in values.items()
            }
        case _:
            return {name: value.view(np.uint64) for name, value in values.items()}


def moe_of(width: int, *, bias: bool = False) -> MoeSpec:
    return MoeSpec(
        num_experts=4, top_k=2, intermediate_size=width, router=RouterSpec(), expert_bias=bias
    )


def shape_of(moe: MoeSpec, hidden: int, name: str, split: int, part: str) -> SegmentShape | None:
    return segment_shape(moe, hidden, name, split, "top" if part == "top" else "bottom", "BF16")


def stored_tensors(payload: bytes, shape: SegmentShape) -> dict[str, bytes]:
    return {
        tensor.name: payload[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        for tensor in shape.tensors
    }


def plain_values(
    payload: bytes, shape: SegmentShape, hidden: int, name: str
) -> dict[str, list[list[float]]]:
    """The matrices of a segment by the oracle."""
    found, neurons = stored_tensors(payload, shape), shape.neurons
    if name == "INT8":
        return {
            f"{matrix}.weight": plain.int8_from_bytes(
                found[f"{matrix}.weight"], found[f"{matrix}.scale"], outputs, inputs
            )
            for matrix, outputs, inputs in (
                ("gate", neurons, hidden),
                ("up", neurons, hidden),
                ("down", hidden, neurons),
            )
        }
    group = int(name[6:])
    both, down = (
        plain.int4_from_bytes(
            found[f"{matrix}.codes"] + found[f"{matrix}.scales"], outputs, inputs, group
        )
        for matrix, outputs, inputs in (
            ("gate_up", 2 * neurons, hidden),
            ("down", hidden, neurons),
        )
    )
    return {"gate.weight": both[:neurons], "up.weight": both[neurons:], "down.weight": down}


def exactly(values: list[list[float]]) -> npt.NDArray[np.float32]:
    """Rounded once: the formula's value is exact in Python's floats."""
    return np.array(values, np.float64).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(QUANTISED),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 9),
    st.data(),
)
def test_bytes_stand_for_the_same_numbers_by_the_format_and_by_us(
    name: str, columns: int, rows: int, bias: bool, seed: int, data: st.DataObject
) -> None:
    """And the parts of any split hold the uncut expert's."""
    item = encoding(name)
    hidden, width = columns * item.multiple, rows * item.multiple
    split = item.multiple * data.draw(st.integers(0, rows))
    expert = expert_of(hidden, width, bias=bias, seed=seed)
    quantised = quantise_expert(expert, item, "BF16", "it")
    whole = dequantise_expert(quantised, item)
    moe = moe_of(width, bias=bias)
    for part, neurons in (("top", slice(0, split)), ("bottom", slice(split, width))):
        shape = shape_of(moe, hidden, name, split, part)
        if shape is None:
            continue
        payload = cut_expert(quantised, shape, "top" if part == "top" else "bottom")
        values = plain_values(payload, shape, hidden, name)
        ours = dequantise_segment(np.frombuffer(payload, np.uint8), shape)
        for matrix, expected in values.items():
            np.testing.assert_array_equal(ours[matrix], exactly(expected))
            inside = (slice(None), neurons) if matrix == "down.weight" else (neurons,)
            np.testing.assert_array_equal(ours[matrix], whole[matrix][inside])
        stored = stored_tensors(payload, shape)
        if bias:
            assert stored["up.bias"] == expert["up.bias"][neurons].tobytes()
            assert ("down.bias" in stored) == (part == "bottom" or split == width)


@pytest.mark.parametrize("name", QUANTISED)
def test_the_codes_of_the_parts_are_the_codes_of_the_whole(name: str) -> None:
    """Of ``down`` as bytes: cut between groups of its inputs, tile by tile. Scales likewise."""
    hidden, width, split = 128, 192, 64
    item = encoding(name)
    quantised = quantise_expert(expert_of(hidden, width), item, "BF16", "it")
    moe = moe_of(width)
    whole = shape_of(moe, hidden, name, width, "top")
    assert whole is not None
    uncut = stored_tensors(cut_expert(quantised, whole, "top"), whole)
    cut: dict[str, dict[str, bytes]] = {}
    for part in PARTS:
        shape = shape_of(moe, hidden, name, split, part)
        assert shape is not None
        cut[part] = stored_tensors(cut_expert(quantised, shape, part), shape)
    if name == "INT8":
        for tensor in ("gate.weight", "up.weight", "gate.scale", "up.scale"):
            assert cut["top"][tensor] + cut["bottom"][tensor] == uncut[tensor]
        assert cut["top"]["down.scale"] == cut["bottom"]["down.scale"] == uncut["down.scale"]
        return
    assert cut["top"]["down.scales"] + cut["bottom"]["down.scales"] == uncut["down.scales"]
    joined = b"".join(
        cut[part]["down.codes"][tile * 32 * inputs : (tile + 1) * 32 * inputs]
        for tile in range(hidden // 64)
        for part, inputs in (("top", split), ("bottom", width - split))
    )
    assert joined == uncut["down.codes"]
    # Gate and up are tiles of rows of one matrix: 64 of each in the top, 128 below.
    codes, tile = uncut["gate_up.codes"], 32 * hidden
    tiles = [codes[start : start + tile] for start in range(0, len(codes), tile)]
    assert cut["top"]["gate_up.codes"] == tiles[0] + tiles[3]
    assert cut["bottom"]["gate_up.codes"] == b"".join(tiles[1:3] + tiles[4:6])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_every_source_dtype_is_read_as_what_it_is(name: str, dtype: str) -> None:
    item = encoding(name)
    found = dequantise_expert(
        quantise_expert(expert_of(64, 128, dtype=dtype), item, dtype, "it"), item
    )
    for matrix, bits in expert_of(64, 128, dtype="F32").items():
        weights = bits.view(np.float32)
        error = np.square(found[matrix] - weights).mean() / np.square(weights).mean()
        assert error < (1e-4 if name == "INT8" else 1e-2), matrix


@pytest.mark.parametrize("name", QUANTISED)
def test_threads_change_nothing(name: str) -> None:
    item, expert = encoding(name), expert_of(512, 320 if name == "INT4_G32" else 256)
    alone = quantise_expert(expert, item, "BF16", "it")
    with ThreadPoolExecutor(4) as pool:
        together = quantise_expert(expert, item, "BF16", "it", pool=pool)
    for tensor, bits in alone.items():
        np.testing.assert_array_equal(bits, together[tensor])


@pytest.mark.parametrize("name", QUANTISED)
def test_a_block_of_the_work_is_what_its_groups_are_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the matrix is divided among threads decides nothing."""
    item, expert = encoding(name), expert_of(256, 192)
    whole = quantise_expert(expert, item, "BF16", "it")
    monkeypatch.setattr("moepack.quantise._BLOCK", 4096)
    monkeypatch.setattr("moepack.quantise._BLOCK_ROWS", 48)
    for tensor, bits in quantise_expert(expert, item, "BF16", "it").items():
        np.testing.assert_array_equal(bits, whole[tensor])


SAME_CODES = """
import hashlib, sys
from moepack.encodings import QUANTISED, encoding
from moepack.quantise import quantise_expert
from tests.pack.test_quantise import expert_of
digest = hashlib.sha256()
for name in QUANTISED:
    for bits in quantise_expert(expert_of(256, 192), encoding(name), "BF16", "it").values():
        digest.update(bits.tobytes())
sys.stdout.write(digest.hexdigest())
"""


def test_machines_of_other_instruction_sets_round_alike() -> None:
    """numpy without the instructions that it would choose here."""
    umath = importlib.import_module("numpy._core._multiarray_umath")
    there = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    if not there:
        pytest.skip("numpy has but one set of instructions here")
    found = [
        subprocess.run(
            [sys.executable, "-c", SAME_CODES],
            cwd=Path(__file__).parents[2],
            env=dict(os.environ, NPY_DISABLE_CPU_FEATURES=" ".join(names)),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for names in ([], there)
    ]
    assert found[0] == found[1] != ""


@pytest.mark.parametrize("name", QUANTISED)
def test_an_expert_of_zeros_stays_one(name: str) -> None:
    item = encoding(name)
    zeros = {tensor: np.zeros_like(bits) for tensor, bits in expert_of(64, 128).items()}
    minus = {tensor: bits | np.uint16(0x8000) for tensor, bits in zeros.items()}
    for expert in (zeros, minus):
        for matrix in dequantise_expert(quantise_expert(expert, item, "BF16", "it"), item).values():
            assert not matrix.any()
            assert np.isfinite(matrix).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("matrix", ["gate.weight", "up.weight", "down.weight"])
@pytest.mark.parametrize(("bits", "what"), [(0x7FC0, "nan"), (0x7F80, "inf"), (0xFF80, "-inf")])
def test_a_weight_that_is_no_number_is_named(name: str, matrix: str, bits: int, what: str) -> None:
    expert = expert_of(128, 128)
    expert[matrix][77, 99] = bits
    message = f"layer 3, expert 17: {matrix}: {what} in row 77, column 99, expected finite"
    with pytest.raises(NonFiniteWeightError, match=message):
        quantise_expert(expert, encoding(name), "BF16", "layer 3, expert 17")


def test_a_double_beyond_every_float_is_named() -> None:
    expert = expert_of(32, 32, dtype="F64")
    expert["up.weight"].view(np.float64)[0, 0] = 1e300
    with pytest.raises(NonFiniteWeightError, match=r"up\.weight: inf in row 0, column 0"):
        quantise_expert(expert, encoding("INT8"), "F64", "it")


def test_sizes_that_the_group_does_not_divide_are_refused() -> None:
    with pytest.raises(
        GroupMismatchError, match=r"width of experts is 96.* choose INT8, INT4_G32 or"
    ):
        quantise_expert(expert_of(128, 96), encoding("INT4_G64"), "BF16", "it")


@pytest.mark.parametrize("name", QUANTISED)
def test_calibration_moves_the_error_to_inputs_that_count_less(name: str) -> None:
    hidden, width = 128, 64
    item, expert = encoding(name), expert_of(128, 64)
    hot = np.where(np.arange(hidden) % 16 == 0, 100.0, 1.0).astype(np.float32)
    neurons = np.where(np.arange(width) % 16 == 0, 100.0, 1.0).astype(np.float32)
    importance = Importance(hot, neurons)
    plainly = dequantise_expert(quantise_expert(expert, item, "BF16", "it"), item)
    weighed = dequantise_expert(
        quantise_expert(expert, item, "BF16", "it", importance=importance), item
    )
    for matrix, counts in (("gate.weight", hot), ("up.weight", hot), ("down.weight", neurons)):
        weights = from_bf16(expert[matrix].view(np.uint16))
        before, after = (
            float((np.square(found[matrix] - weights) * counts).sum())
            for found in (plainly, weighed)
        )
        assert after <= before
        if name != "INT8":
            assert after < 0.6 * before


def test_calibration_that_makes_no_sense_is_refused() -> None:
    expert, item = expert_of(64, 32), encoding("INT4_G32")
    ones = np.ones(64, np.float32), np.ones(32, np.float32)
    for wrong in (ones[::-1], (-ones[0], ones[1]), (ones[0] * np.float32("nan"), ones[1])):
        with pytest.raises(ValueError, match="importance"):
            quantise_expert(expert, item, "BF16", "it", importance=Importance(*wrong))
    nothing = Importance(0 * ones[0], 0 * ones[1])
    for tensor, bits in quantise_expert(expert, item, "BF16", "it", importance=nothing).items():
        np.testing.assert_array_equal(bits, quantise_expert(expert, item, "BF16", "it")[tensor])
