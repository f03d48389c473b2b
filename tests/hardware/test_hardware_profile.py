from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from moepack.errors import ProfileError
from moepack.hardware import HardwareProfile, find_hardware, load_hardware
from moepack.rates import (
    AttentionRate,
    LinkCurve,
    LinkPoint,
    MatmulCurve,
    MatmulPoint,
    MemoryRate,
)
from moepack.units import KIB, MIB

CPU = find_hardware("cpu-sata")
GPU = find_hardware("rtx-4090")


def link(*points: tuple[int, float]) -> LinkCurve:
    """A link with the given seconds for the given sizes."""
    return LinkCurve(
        readers=1,
        latency_s=1e-4,
        past_cache=True,
        how="test",
        points=tuple(LinkPoint(size, size / seconds, 3, 0.0) for size, seconds in points),
    )


@pytest.mark.parametrize("profile", [CPU, GPU])
def test_a_profile_comes_back_from_its_file_as_it_was(
    profile: HardwareProfile, tmp_path: Path
) -> None:
    path = tmp_path / "machine.yaml"
    profile.save(path)
    assert load_hardware(path) == profile
    measured = dataclasses.replace(profile, source="measured", sources={})
    measured.save(path)
    assert load_hardware(path) == measured
    assert "sources" not in path.read_text()
    assert path.read_text().startswith("# A machine as moepack sees it. Sizes in bytes")


def test_the_digest_is_of_the_numbers_and_not_of_the_time() -> None:
    later = dataclasses.replace(CPU, recorded_utc="2030-01-01T00:00:00+00:00")
    assert later != CPU
    assert later.digest == CPU.digest
    assert dataclasses.replace(CPU, cores=CPU.cores + 1).digest != CPU.digest


def test_the_link_is_exact_at_its_points_and_log_log_between() -> None:
    curve = link((4096, 1e-4), (64 * KIB, 2e-4), (MIB, 8e-4))
    assert curve.seconds(4096) == pytest.approx(1e-4)
    assert curve.seconds(64 * KIB) == pytest.approx(2e-4)
    assert curve.seconds(MIB) == pytest.approx(8e-4)
    assert curve.seconds(16 * KIB) == pytest.approx(math.sqrt(2) * 1e-4)  # halfway, in logarithms
    assert curve.seconds(256 * KIB) == pytest.approx(4e-4)


def test_beyond_its_points_a_link_costs_its_latency_and_its_bandwidth() -> None:
    curve = link((4096, 1e-4), (MIB, 8e-4))
    assert curve.seconds(1) == pytest.approx(1e-4)
    assert curve.seconds(3 * MIB) == pytest.approx(3 * 8e-4)
    assert link((4096, 2e-4)).seconds(2 * 4096) == pytest.approx(4e-4)


def test_the_link_feeds_the_fast_tier() -> None:
    assert CPU.link is CPU.disk
    assert CPU.fast_bytes == CPU.ram_bytes
    assert GPU.link is GPU.bus
    assert GPU.fast_bytes == GPU.vram_bytes
    assert GPU.link_seconds(MIB) < CPU.link_seconds(MIB)
    assert CPU.link_seconds(MIB) == CPU.disk.seconds(MIB)


def test_matmul_rates_are_interpolated_and_flat_outside() -> None:
    curve = MatmulCurve("BF16", 64, 64, (MatmulPoint(1, 1e9, 0.0), MatmulPoint(16, 16e9, 0.0)))
    assert curve.flop_per_s(1) == 1e9
    assert curve.flop_per_s(4) == pytest.approx(4e9)
    assert curve.flop_per_s(1000) == 16e9
    assert curve.flop_per_s(0.5) == 1e9


def test_a_dtype_that_was_not_measured_takes_the_curve_of_its_width() -> None:
    for dtype, other in {"BF16": "BF16", "F16": "BF16", "F32": "F32", "F64": "F32"}.items():
        assert [curve.dtype for curve in CPU.matmul_curves(dtype)] == [other]


def square(width: int, seconds: float, threads: int | None = None) -> MatmulCurve:
    """Products that take so long for one token, and sixteen times as long for sixteen."""
    rate = 2 * width * width / seconds
    points = (MatmulPoint(1, rate, 0.0), MatmulPoint(16, rate, 0.0))
    return MatmulCurve("BF16", width, width, points, threads)


def test_products_are_interpolated_between_the_shapes_that_were_measured() -> None:
    profile = dataclasses.replace(CPU, matmul=(square(2048, 16e-3), square(128, 1e-3)))
    seconds = profile.product_seconds
    assert seconds("BF16", 1, 128 * 128) == pytest.approx(1e-3)
    assert seconds("BF16", 1, 512 * 512) == pytest.approx(4e-3)  # halfway, in logarithms
    assert seconds("BF16", 16, 2048 * 2048) == pytest.approx(16 * 16e-3)
    assert seconds("BF16", 1, 64) == pytest.approx(1e-3), "all overhead"
    assert seconds("BF16", 1, 2 * 2048 * 2048) == pytest.approx(32e-3)


def test_a_single_shape_is_a_roofline() -> None:
    assert len(CPU.matmul_curves("BF16")) == 1
    small_s = CPU.product_seconds("BF16", 1, 1000)
    assert small_s == pytest.approx(CPU.launch_s + 2000 / CPU.memory.bytes_per_s, rel=0.1)
    rate = CPU.matmul_curves("BF16")[0].flop_per_s(512)
    large_s = CPU.product_seconds("BF16", 512, 10**8)
    assert large_s == pytest.approx(CPU.launch_s + 2 * 512 * 10**8 / rate)


def test_rates_are_those_of_the_number_of_threads() -> None:
    attention = tuple(AttentionRate("BF16", n * 1e9, 1e9, 1e9, 0.0, threads=n) for n in (1, 6))
    profile = dataclasses.replace(
        CPU, matmul=(square(128, 6e-3, 1), square(128, 1e-3, 6)), attention=attention
    )
    assert profile.thread_counts == (1, 6)
    assert [profile.matmul_curves("BF16", n)[0].threads for n in (None, 1, 6)] == [6, 1, 6]
    assert profile.attention_rate("BF16", 1).cache_bytes_per_s == 1e9
    assert profile.attention_rate("F32").cache_bytes_per_s == CPU.memory.bytes_per_s
    assert CPU.thread_counts == (CPU.cores,)
    assert CPU.attention_rate("BF16").cache_bytes_per_s == CPU.memory.bytes_per_s


def test_a_profile_with_rates_by_threads_comes_back_from_its_file(tmp_path: Path) -> None:
    attention = (AttentionRate("BF16", 1e9, 2e9, 1e9, 0.0, threads=1),)
    profile = dataclasses.replace(
        CPU, matmul=(square(128, 6e-3, 1),), attention=attention, launch_spread=0.2
    )
    profile.save(tmp_path / "machine.yaml")
    assert load_hardware(tmp_path / "machine.yaml") == profile


GARBAGE = [
    ("", "document"),
    ("just text", "document"),
    ("[1, 2]", "document"),
    ("a: [", "not YAML"),
    ("version: 1\nversion: *missing\n", "not YAML"),
    ("[" * 1200, "not YAML"),
]


@pytest.mark.parametrize(("text", "named"), GARBAGE)
def test_what_is_not_a_profile_at_all_is_a_named_error(
    text: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=named):
        load_hardware(path)


def test_bytes_that_are_no_text_are_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ProfileError, match="not YAML"):
        load_hardware(path)
    path.write_bytes(b"#" * (2 * MIB))
    with pytest.raises(ProfileError, match="larger than"):
        load_hardware(path)
    with pytest.raises(ProfileError, match="Is a directory"):
        load_hardware(tmp_path)


WRONG = [
    ("cores: 6", "cores: six", "cores: expected a whole number, got 'six'"),
    ("cores: 6", "cores: 0", "cores is 0, expected more than 0"),
    ("cores: 6", "cores: 6.5", "cores: expected a whole number, got 6.5"),
    ("cores: 6", "cores: 6\ncolour: red", "colour: unknown key (got 'red'); there are version,"),
    ("cores: 6", "coers: 6", "coers: unknown key (got 6); did you mean cores? (and 1 more)"),
    ("cores: 6", "cores: 6\ncores: 8", "line 13: the key cores stands twice"),
    ("cores: 6\n", "", "cores: missing, expected a whole number"),
    ("ram_bytes: 34359738368", "ram_bytes: 32G", "got '32G'; write 34359738368"),
    (
        "ram_bytes: 34359738368",
        "ram_bytes: 32e9",
        "whole number of bytes, got 32000000000.0; write",
    ),
    ("ram_bytes: 34359738368", "ram_bytes: 32", "ram_bytes is 32, expected 1.04858e+06 to"),
    ("{bytes_per_s: 38400000000.0", "{bytes_per_s: 38.4", "memory.bytes_per_s is 38.4, expected"),
    ("{bytes_per_s: 38400000000.0", "{bytes_per_s: 2 GB/s", "got '2 GB/s'; write 2147483648"),
    ("launch_s: 2.0e-06", "launch_s: 2us", "expected a number of seconds, got '2us'; write 2e-06"),
    ("launch_s: 2.0e-06", "launch_s: 2", "launch_s is 2, expected 1e-09 to 1; it looks like"),
    ("launch_s: 2.0e-06", "launch_s: .nan", "launch_s is nan, expected more than 0"),
    ("launch_s: 2.0e-06", "launch_s: .inf", "launch_s is inf"),
    ("device: cpu", "device: abacus", "device: expected cpu or cuda, got 'abacus'"),
    ("device: cpu", "device: cuda", "bus belong to a machine whose device is cuda"),
    ("vram_bytes: null", "vram_bytes: 5", "bus belong to a machine"),
    ("device_base_bytes: 0", "device_base_bytes: -1", "device_base_bytes is -1, expected 0 or"),
    ("past_cache: true", "past_cache: perhaps", "disk.past_cache: expected true or false, got"),
    ("{size_bytes: 4096,", "{size_bytes: -4096,", "disk.points.0: size_bytes is -4096, expected"),
    ("{size_bytes: 4096,", "{size_bytes: 65536,", "disk: size_bytes of the points: 16384 comes"),
    ("{size_bytes: 4096,", "{size: 4096,", "disk.points.0.size: unknown key (got 4096); there are"),
    ("{tokens: 4,", "{tokens: 64,", "matmul.0: tokens of the points: 8 comes after 64, expected"),
    ("dtype: BF16", "dtype: BF8", "matmul.0.dtype: expected BF16 or F16 or F32, got 'BF8'"),
    ("version: 1", "version: 2", "version 2, this moepack reads 1"),
    ("source: preset", "source: hearsay", "source: expected measured or preset, got 'hearsay'"),
    ("  cores: AMD", "  cores: [AMD]\n  x: AMD", "sources.cores: expected a valid string, got"),
    ("bus: null", "bus: pcie4", "bus: expected a map of readers, latency_s,"),
    ("disk:\n", "disk: []\nbuses:\n", "buses: unknown key"),
]


@pytest.mark.parametrize(("right", "wrong", "named"), WRONG)
def test_a_wrong_field_is_named(right: str, wrong: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    CPU.save(path)
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(ProfileError, match=re.escape(named)) as caught:
        load_hardware(path)
    assert str(caught.value).startswith(f"hardware profile {path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("right", "plain"),
    [
        ("launch_s: 2.0e-06", "launch_s: 2e-6"),
        ("bytes_per_s: 38400000000.0", "bytes_per_s: 384e8"),
        ("recorded_utc: '2026-11-22T00:00:00+00:00'", "recorded_utc: 2026-11-22T00:00:00+00:00"),
    ],
)
def test_numbers_and_dates_are_read_as_people_write_them(
    right: str, plain: str, tmp_path: Path
) -> None:
    path = tmp_path / "machine.yaml"
    CPU.save(path)
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, plain, 1))
    assert load_hardware(path) == CPU


def test_rates_and_spreads_have_to_be_numbers_that_can_be() -> None:
    with pytest.raises(ValueError, match="bytes_per_s is inf, expected more than 0"):
        MemoryRate(math.inf, 0.0)
    with pytest.raises(ValueError, match="a spread is -1"):
        MemoryRate(1.0, -1.0)
    with pytest.raises(ValueError, match="at least one, ascending"):
        link()
