"""The formats that the benchmark of encodings simulates, beside loops over single weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.encodings import Case, Lossy, fp8, int4_g64, mxfp4, weight_error
from tests.pack import plain_rounding as plain
from tests.pack.fake_models import SmoothSource, make_spec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def weights(rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((rows, columns)) * 0.03
    return np.ascontiguousarray(values.astype(np.float32))


def test_mxfp4_is_the_nearest_of_sixteen_values_times_a_power_of_two() -> None:
    given = weights(3, 64)
    for group, found in zip(given.reshape(-1, 32), mxfp4(given).reshape(-1, 32), strict=True):
        largest = max(map(abs, group.tolist()))
        scale = next(2.0**e for e in itertools.count(-40) if 2.0 ** (e + 3) > largest)
        for weight, value in zip(group.tolist(), found.tolist(), strict=True):
            errors = [abs(abs(weight) - code * scale) for code in E2M1]
            assert abs(value) / scale in E2M1
            assert abs(weight - value) == pytest.approx(min(errors), abs=1e-9)
    assert not mxfp4(np.zeros((2, 32), np.float32)).any()


def test_fp8_has_a_scale_for_each_block() -> None:
    given = weights(130, 160)
    given[:, 128:] *= 1000  # of other blocks
    found = fp8(given)
    for rows, columns in itertools.product(
        (slice(128), slice(128, 130)), (slice(128), slice(128, 160))
    ):
        block = found[rows, columns]
        scale = np.float32(np.abs(given[rows, columns]).max() / 448)
        exact = given[rows, columns]
        # Three bits behind the first, and below 2^-6 steps of 2^-9.
        assert (np.abs(block - exact) <= np.maximum(np.abs(exact) / 15, scale / 1000)).all()
        codes = torch.from_numpy(block / scale).to(torch.float8_e4m3fn).float().numpy()
        np.testing.assert_allclose(codes * scale, block, rtol=1e-6)
        assert np.abs(block).max() == pytest.approx(np.abs(given[rows, columns]).max())


def test_groups_of_64_are_of_64_where_the_inputs_allow() -> None:
    given = weights(2, 96)
    found = int4_g64(given)
    for row, values in zip(given, found, strict=True):
        for begin, end in ((0, 64), (64, 96)):
            group = [float(w) for w in row[begin:end]]
            mine = [float(v) for v in values[begin:end]]
            assert len({*mine}) <= 16
            ones = [1.0] * len(group)
            naive = plain.loss(group, ones, plain.naive_int4(group))
            assert plain.loss(group, ones, mine) <= naive


def test_the_error_of_weights_is_a_share_of_them() -> None:
    spec = make_spec(hidden=64, width=32)
    source = SmoothSource(spec)
    halved = Lossy(source, lambda matrix: matrix * np.float32(0.5))
    assert weight_error(spec, Case("", "", source, source, "BF16")) == 0
    assert weight_error(spec, Case("", "", source, halved, "BF16")) == pytest.approx(0.5)
    assert 0.05 < weight_error(spec, Case("", "", source, source, "INT4_G32")) < 0.1
    assert weight_error(spec, Case("", "", source, source, "INT8")) < 0.01
