"""Second moments: factorised, damped, kept within bounds, and refused when they are others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack.calibration import CALIBRATION_FILE, Calibration, LayerFactors, load_calibration
from moepack.errors import ProfileError
from moepack.factor_file import (
    FACTORS_FILE,
    MOST_BYTES,
    FactorFile,
    Kept,
    Places,
    Sizes,
    choose,
    layer_bytes,
)
from moepack.feedback import MOST_INPUTS, Moments
from moepack.second_moments import DAMPING, factor_bytes, factor_from_bytes, factorised
from tests.pack.test_calibration import calibration_of, model
from tests.pack.test_feedback import exactly_made, inputs_of, second_moments


@pytest.mark.parametrize("width", [32, 64])
def test_a_factor_is_the_damped_moments(width: int) -> None:
    inputs = inputs_of(1000, 64, 3)
    blocks = np.stack(
        [
            inputs[:, first : first + width].T @ inputs[:, first : first + width]
            for first in range(0, 64, width)
        ]
    )
    found = second_moments(factorised(blocks, 1000))
    expected = np.zeros((64, 64))
    for number, block in enumerate(blocks):
        inside = slice(number * width, (number + 1) * width)
        expected[inside, inside] = block
    expected /= np.diag(expected).mean()
    expected += DAMPING * (1 + width / 1000) * np.eye(64)
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_inputs_are_damped_more(tokens: int) -> None:
    inputs = inputs_of(tokens, 64, 2)
    found = second_moments(factorised((inputs.T @ inputs)[None], tokens))
    assert np.linalg.eigvalsh(found).min() > 0.9 * DAMPING * 64 / tokens


def test_inputs_that_are_all_zero_count_the_same() -> None:
    found = factorised(np.zeros((1, 8, 8)), 10)
    assert (found.weights == found.weights[0]).all()
    assert not found.coefficients.any()


def test_an_input_that_is_always_zero_has_no_part() -> None:
    inputs = inputs_of(500, 16, 1)
    inputs[:, 5] = 0
    found = second_moments(factorised((inputs.T @ inputs)[None], 500))
    assert not np.delete(found[5], 5).any()
    assert found[5, 5] > 0


def test_moments_that_rounding_has_spoilt_are_damped_until_they_are_some() -> None:
    inputs = np.ones((3, 8))
    inputs[:, 0] = 1e9
    spoilt = (inputs.T @ inputs)[None]
    spoilt[0, 1, 1] = -1e15
    assert (factorised(spoilt, 3).weights > 0).all()


@settings(max_examples=30)
@given(st.sampled_from([(64, 64), (64, 32), (96, 96), (4, 4), (4, 1)]), st.integers(0, 99))
def test_a_factor_is_read_as_it_was_written(sizes: tuple[int, int], seed: int) -> None:
    size, width = sizes
    factor = exactly_made(size, seed, width)
    content = factor.to_bytes()
    assert len(content) == factor_bytes(size, width)
    again = factor_from_bytes(content, size)
    assert again.width == width
    for one, other in zip(again, factor, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_no_factor_is_refused() -> None:
    factor = exactly_made(8, 1, 8)
    with pytest.raises(ValueError, match="no factor of 8 inputs"):
        factor_from_bytes(factor.to_bytes() + b"0", 8)
    with pytest.raises(ValueError, match="not above 0"):
        factor_from_bytes(factor._replace(weights=-factor.weights).to_bytes(), 8)
    with pytest.raises(ValueError, match="powers of two"):
        factor_from_bytes(factor._replace(exponents=factor.exponents + np.int8(99)).to_bytes(), 8)


@pytest.mark.parametrize(
    ("layers", "sizes", "expected"),
    [
        (8, Sizes(32, 128, 96), Kept(True, 128, 96)),  # the shipped model
        (16, Sizes(64, 2048, 1024), Kept(False, 2048, 1024)),  # OLMoE-1B-7B
        (48, Sizes(128, 2048, 768), Kept(False, 2048, 384)),  # Qwen3-30B-A3B
        (94, Sizes(128, 4096, 1536), Kept(False, 4096, 0)),  # Qwen3-235B-A22B
        (32, Sizes(8, 4096, 14336), Kept(False, 4096, 256)),  # Mixtral-8x7B
        (58, Sizes(256, 7168, 2048), Kept(False, 3584, 0)),  # DeepSeek-V3
    ],
)
def test_what_is_kept_of_real_models(layers: int, sizes: Sizes, expected: Kept) -> None:
    found = choose([sizes] * layers)
    assert found == [expected] * layers


@settings(max_examples=100)
@given(
    st.lists(
        st.builds(Sizes, st.integers(1, 512), st.integers(1, 600), st.integers(1, 600)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 1 << 33),
)
def test_what_is_kept_takes_no_more_than_it_may(layers: list[Sizes], most_bytes: int) -> None:
    layers = [Sizes(each.experts, 32 * each.hidden, 32 * each.neurons) for each in layers]
    found = choose(layers, most_bytes)
    assert sum(map(layer_bytes, layers, found)) <= most_bytes
    for sizes, kept in zip(layers, found, strict=True):
        for inputs, width in zip(sizes[1:], (kept.hidden, kept.neurons), strict=True):
            assert 0 <= width <= min(inputs, MOST_INPUTS)
            assert width in (0, inputs) or (inputs % width == 0 and width % 64 == 0)


@contextmanager
def with_factors(kept: Kept, seed: int = 0) -> Iterator[Calibration]:
    """A calibration of the small model that has second moments."""
    spec = model()
    moments = calibration_of(spec)
    sizes = Sizes(3, spec.hidden_size, spec.moe(1).intermediate_size)
    places = Places(dict.fromkeys(spec.moe_layers, (sizes, kept)))
    lists = {}
    with FactorFile.temporary() as file:
        for layer in spec.moe_layers:
            digests: tuple[list[bytes], list[bytes]] = [], []
            for expert in range(sizes.experts):
                for which, place in enumerate(
                    (places.hidden(layer, expert), places.neurons(layer, expert))
                ):
                    if place is None or (which == 0 and expert and not kept.by_expert):
                        continue
                    number = 100 * layer + 10 * expert + which + 1000 * seed
                    factor = exactly_made(place.inputs, number, place.width)
                    digests[which].append(file.write(place, factor))
            lists[layer] = LayerFactors.of(kept, *digests)
        firsts = {layer: moments.moments(layer) for layer in moments.layers}
        yield Calibration.of(firsts, lists, file)


KEPT = [Kept(True, 64, 128), Kept(False, 64, 64), Kept(False, 64, 0), Kept(False, 0, 128)]


@pytest.mark.parametrize("kept", KEPT)
def test_second_moments_are_read_as_they_were_written(tmp_path: Path, kept: Kept) -> None:
    with with_factors(kept) as made:
        made.save(tmp_path)
    assert (tmp_path / FACTORS_FILE).stat().st_size == made.second_bytes
    with load_calibration(tmp_path) as found:
        importances = {
            (layer, expert): found.importance(layer, expert)
            for layer in made.layers
            for expert in (2, 0, 1)
        }
    assert found.digest == made.digest
    assert found.kept == dict.fromkeys(made.layers, kept)
    for (layer, expert), importance in importances.items():
        number = 100 * layer + 10 * expert
        for which, (moments, width, inputs) in enumerate(
            (
                (importance.of_hidden, kept.hidden, 64),
                (importance.of_neurons, kept.neurons, 128),
            )
        ):
            if not width:
                assert moments is None
                continue
            own = number if which or kept.by_expert else 100 * layer
            expected = Moments.of(exactly_made(inputs, own + which, width))
            assert moments is not None
            np.testing.assert_array_equal(moments.coefficients, expected.coefficients)
            np.testing.assert_array_equal(moments.weights, expected.weights)


def test_a_calibration_names_its_second_moments() -> None:
    plain = calibration_of(model())
    found = [plain.digest]
    for kept, seed in [*((kept, 0) for kept in KEPT), (KEPT[0], 1)]:
        with with_factors(kept, seed) as made:
            found.append(made.digest)
    assert len(set(found)) == len(found)
    assert plain.importance(1, 1).of_hidden is None, "of before there were any"


def test_second_moments_that_are_others_are_refused(tmp_path: Path) -> None:
    with with_factors(KEPT[1]) as made:
        made.save(tmp_path)
    path = tmp_path / FACTORS_FILE
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)

    def refused(match: str) -> None:
        with load_calibration(tmp_path) as found, pytest.raises(ProfileError, match=match):
            found.importance(1, 0)

    refused(r"are not those of the calibration; .*profile --bits")
    path.write_bytes(b"")
    refused("are not those")
    path.unlink()
    refused(r"No such file.*profile --bits")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kept", np.array([0, 64, 100])),
        ("kept", np.array([0, -64, 64])),
        ("kept", np.array([0, 64, 32])),
        ("kept", np.array([0, 64])),
        ("kept", np.array([0.0, 64, 64])),
        ("hidden", np.zeros((2, 32), np.uint8)),
        ("neurons", np.zeros((3, 31), np.uint8)),
        ("neurons", np.zeros((3, 32), np.int16)),
    ],
)
def test_a_list_of_second_moments_that_is_none_is_named(
    tmp_path: Path, name: str, value: np.ndarray
) -> None:
    with with_factors(KEPT[1]) as made:
        made.save(tmp_path)
    with np.load(tmp_path / CALIBRATION_FILE) as found:
        arrays = dict(found)
    arrays[f"1.factors.{name}"] = value
    np.savez(tmp_path / CALIBRATION_FILE, **arrays)
    with pytest.raises(ProfileError, match=r"(factors|second moments).*profile --bits"):
        load_calibration(tmp_path)


def test_what_second_moments_may_take_is_stated() -> None:
    sizes = Sizes(64, 2048, 1024)
    kept = choose([sizes] * 16)
    assert 16 * layer_bytes(sizes, kept[0]) == 1_145_176_064 < MOST_BYTES
    assert replace(kept[0], neurons=0) == Kept(False, 2048, 0)
