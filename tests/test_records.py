"""Records: what is written is what is read, and what is read is exactly what was declared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepack import records
from moepack.errors import PlanError, ProfileError
from moepack.records import record


@record
class Point:
    x: int
    y: float
    tag: str | None = None


@record
class Shape:
    name: str
    points: tuple[Point, ...]
    weights: dict[str, float]

    def __post_init__(self) -> None:
        if len(self.points) > 3:
            raise ValueError("more than three points")


# What YAML could take for something else: numbers, dates, nothing at all.
tricky = st.sampled_from(["1e5", "-2.e+6", ".5E3", "2026-11-22", "1_000", "0x1f", "~", "yes", "="])
points = st.builds(
    Point,
    x=st.integers(-(2**53), 2**53),
    y=st.floats(allow_nan=False, allow_infinity=False),
    tag=st.none() | st.text() | tricky,
)
shapes = st.builds(
    Shape,
    name=st.text(),
    points=st.lists(points, max_size=3).map(tuple),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
)


@given(shapes)
def test_a_record_survives_json(shape: Shape) -> None:
    text = records.encode(shape)
    assert records.decode(Shape, text, what="shape", error=PlanError) == shape


@given(shapes)
def test_a_record_survives_yaml(tmp_path_factory: pytest.TempPathFactory, shape: Shape) -> None:
    path = tmp_path_factory.mktemp("yaml") / "shape.yaml"
    path.write_bytes(records.to_yaml(shape, header="A shape."))
    again = records.load_yaml(Shape, path, what="shape", error=PlanError, remedy="draw it")
    assert again == shape


@given(shapes, shapes)
def test_digests_differ_exactly_where_records_do(one: Shape, other: Shape) -> None:
    same_text = records.encode(one) == records.encode(other)
    assert (records.digest(one) == records.digest(other)) == (
        same_text or records.to_data(one) == records.to_data(other)
    )


def test_the_digest_does_not_depend_on_the_order_of_a_map() -> None:
    one = Shape("s", (), {"a": 1.0, "b": 2.0})
    other = Shape("s", (), {"b": 2.0, "a": 1.0})
    assert records.digest(one) == records.digest(other)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Point(1, 2.0).x = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"x": "1"}, "points.0.x"),
        ({"x": 1.5}, "points.0.x"),
        ({"x": True}, "points.0.x"),
        ({"y": None}, "points.0.y"),
        ({"z": 1}, "points.0.z"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_holds(change: dict[str, Any], where: str) -> None:
    data = {"name": "s", "points": [{"x": 1, "y": 2.0, **change}], "weights": {}}
    with pytest.raises(PlanError) as caught:
        records.decode(Shape, json.dumps(data), what="shape s.json", error=PlanError)
    message = str(caught.value)
    assert message.startswith(f"shape s.json: {where}: ")
    assert repr(next(iter(change.values()))) in message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(PlanError, match="points: missing, expected a list"):
        records.decode(Shape, '{"name": "s", "weights": {}}', what="shape", error=PlanError)


def test_a_semantic_check_becomes_the_named_error() -> None:
    data = {"name": "s", "points": [{"x": 1, "y": 2.0}] * 4, "weights": {}}
    with pytest.raises(PlanError, match="more than three points"):
        records.decode_object(Shape, data, what="shape", error=PlanError)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'"text"', b"NaN"])
def test_garbage_is_an_error_in_one_line(text: bytes) -> None:
    with pytest.raises(PlanError) as caught:
        records.decode(Shape, text, what="shape", error=PlanError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1", "!!python/object:os.system x", "x: 2020-01-01", "\x00"]
)
def test_garbage_yaml_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "garbage.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"garbage\.yaml") as caught:
        records.load_yaml(Shape, path, what="shape", error=ProfileError, remedy="draw it")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file or directory; draw it"):
        records.load_yaml(
            Shape, tmp_path / "none.yaml", what="shape", error=ProfileError, remedy="draw it"
        )
