"""A processor that is not always as fast: what is measured is told for one speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from moepack.yardstick import MixedYardstick, PaceKeeper, SteadyPace


class Readings:
    """A yardstick that reads what it is told to."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self._seconds = iter(seconds)

    def read_s(self) -> float:
        return next(self._seconds)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """What torch computes with, meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_what_was_measured_is_compared_with_readings_before_and_behind_it() -> None:
    pace = SteadyPace(Readings([2.0, 2.0, 2.0, 4.0, 4.0]))
    pace.begin()
    assert [pace.slowness() for _ in range(3)] == [1.0, 1.5, 2.0]
    assert pace.first_s == 2.0
    assert pace.mean_slowness == 1.5


def test_what_went_by_between_two_measurements_does_not_count() -> None:
    pace = SteadyPace(Readings([1.0, 3.0, 3.0]))
    pace.begin()
    assert pace.slowness() == 3.0


def test_without_a_yardstick_nothing_is_changed() -> None:
    pace = SteadyPace(None)
    pace.begin()
    assert (pace.slowness(), pace.mean_slowness, pace.first_s) == (1.0, 1.0, 0.0)


def test_prompts_and_tokens_have_a_pace_each() -> None:
    # Before the prompt, at the first token, and at the fourth and eighth.
    keeper = PaceKeeper(Readings([1.0, 3.0, 6.0, 9.0]))
    assert list(keeper.beside(range(10))) == list(range(10))
    assert keeper.pace() == pytest.approx((2.0, 6.0))


def test_more_work_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = MixedYardstick()
    once_s = min(yardstick.read_s() for _ in range(20))
    monkeypatch.setattr("moepack.yardstick._STEPS", 40_000)
    assert min(yardstick.read_s() for _ in range(5)) > 2 * once_s


def test_it_computes_on_one_thread_and_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    yardstick = MixedYardstick()
    threads = []
    product = F.linear

    def counted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return product(rows, weight)

    monkeypatch.setattr(F, "linear", counted)
    yardstick.read_s()
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2


def test_a_reading_that_fails_leaves_the_threads_as_they_were(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    yardstick = MixedYardstick()
    monkeypatch.setattr(F, "linear", None)
    with pytest.raises(TypeError):
        yardstick.read_s()
    assert torch.get_num_threads() == 2
