"""Predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moepack.forecast import Prediction

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
    ratio : float or None
        Measured over predicted; None where zero was predicted and something else was measured.
    in_band : bool
        The ratio lies within [1 / band, band]; of the peak of memory within [1 / band, 1].
    """

    predicted: float
    measured: float
    ratio: float | None
    in_band: bool


def compare(prediction: Prediction, measured: Mapping[str, float | None]) -> dict[str, Drift]:
    """Compare what was measured with what was predicted.

    Parameters
    ----------
    measured
        Values under the names of :data:`METRICS`. A missing or None value was not measured and is
        left out.
    """
    drifts = {}
    for metric in METRICS:
        value = measured.get(metric)
        if value is None:
            continue
        predicted = float(prediction.fast_bytes if metric == PEAK else getattr(prediction, metric))
        if predicted == value:
            ratio: float | None = 1.0
        else:
            ratio = value / predicted if predicted else None
        most = 1.0 if metric == PEAK else prediction.band
        within = ratio is not None and 1 / prediction.band <= ratio <= most
        drifts[metric] = Drift(predicted, value, ratio, within)
    return drifts
