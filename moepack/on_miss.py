"""What becomes of a missing expert: fetched, replaced by its low copy, or left out.

The rule is that of :class:`moepack.plan.OnMiss`, for the runtime and the replay alike. It knows a
token's weights and nothing of the caches: whoever asks applies it to what is missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moepack.plan import OnMiss

#: What :func:`fates` says.
EXACT, LOWERED, LEFT_OUT = 0, 1, 2


def fates(weights: npt.ArrayLike, rule: OnMiss) -> npt.NDArray[np.int8]:
    """What each of a token's experts would get, if it were missing.

    Parameters
    ----------
    weights : [..., K]
        The router's, 0 or more; those of one token in any order. Of equals the first goes first.

    Returns
    -------
    int8 [..., K]
        :data:`EXACT`, :data:`LOWERED` or :data:`LEFT_OUT`.
    """
    given = np.asarray(weights, dtype=np.float64)
    order = np.argsort(-given, axis=-1, kind="stable")
    sums = np.cumsum(np.take_along_axis(given, order, axis=-1), axis=-1)
    # Of the sums themselves, so that no share exceeds 1.
    before = np.zeros_like(sums)
    np.divide(sums[..., :-1], sums[..., -1:], out=before[..., 1:], where=sums[..., -1:] > 0)
    ranked = (before > rule.exact_up_to).astype(np.int8) + (before > rule.low_up_to)
    found = np.empty_like(ranked)
    np.put_along_axis(found, order, ranked, axis=-1)
    return found
