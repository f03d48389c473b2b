"""Predicted beside measured.

A prediction is for a processor as fast as when it was profiled. Where a yardstick says how fast it
was while something was measured (:mod:`moepack.yardstick`), times are compared with what the
prediction comes to at that speed: a processor that is shared may be half as fast for seconds, and
then it is not the forecast that is wrong. The band is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moepack.forecast import Prediction
from moepack.yardstick import Pace, Slowness

#: The most of the fast tier that was taken: a contract, so no more than what was planned.
PEAK = "peak_fast_bytes"

#: What a run measures and a plan predicts, in the order in which it is shown.
METRICS = (
    "ttft_s",
    "tpot_s",
    "tokens_per_s",
    "hit_rate",
    "ready_rate",
    "link_bytes_per_token",
    PEAK,
)


@dataclass(frozen=True, slots=True)
class Drift:
    """One metric, predicted and measured.

    Attributes
    ----------
    predicted : float
        By the plan.
    ratio : float or None
        Measured over expected; None where zero was expected and something else was measured.
    expected : float
        ``predicted`` at the speed that the processor had meanwhile, where that is known.
    in_band : bool
        The ratio lies within [1 / band, band]; of the peak of memory within [1 / band, 1].
    """

    predicted: float
    measured: float
    ratio: float | None
    in_band: bool
    expected: float


def compare(
    prediction: Prediction, measured: Mapping[str, float | None], pace: Pace | None = None
) -> dict[str, Drift]:
    """Compare what was measured with what was predicted.

    Parameters
    ----------
    measured
        Values under the names of :data:`METRICS`. A missing or None value was not measured and is
        left out.
    pace
        How fast the processor was meanwhile; None: as when it was profiled.
    """
    drifts = {}
    now = _at_pace(prediction, pace)
    for metric in METRICS:
        value = measured.get(metric)
        if value is None:
            continue
        predicted, expected = (
            float(each.fast_bytes if metric == PEAK else getattr(each, metric))
            for each in (prediction, now)
        )
        if expected == value:
            ratio: float | None = 1.0
        else:
            ratio = value / expected if expected else None
        most = 1.0 if metric == PEAK else prediction.band
        within = ratio is not None and 1 / prediction.band <= ratio <= most
        drifts[metric] = Drift(predicted, value, ratio, within, expected)
    return drifts


def slowness(prediction: Prediction, pace: Pace | None) -> Slowness | None:
    """How many times as long the processor took as when it was profiled; None: not known."""
    if pace is None or not prediction.yardstick_s:
        return None
    return Slowness(*(seconds / prediction.yardstick_s for seconds in pace))


def _at_pace(prediction: Prediction, pace: Pace | None) -> Prediction:
    """What a prediction comes to at a speed: what is waited for the link stays."""
    slow = slowness(prediction, pace)
    if slow is None:
        return prediction

    tpot_s = stretched_s(prediction.tpot_s, prediction.tpot_wait_s, slow.token)
    return replace(
        prediction,
        ttft_s=stretched_s(prediction.ttft_s, prediction.ttft_wait_s, slow.prompt),
        tpot_s=tpot_s,
        tokens_per_s=1.0 / tpot_s if tpot_s else prediction.tokens_per_s,
    )


def stretched_s(whole_s: float, wait_s: float, slowness: float) -> float:
    """What takes ``whole_s``, and waits for the link in it, on a processor so much slower."""
    return wait_s + (whole_s - wait_s) * slowness
