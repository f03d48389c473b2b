"""The experts that tokens of a trace activate, as they are consumed, and what was guessed of them.

Shapes: ``T`` tokens, ``L`` layers with experts, ``K`` places for activated experts, ``R`` ranks of
predicted ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.lane_clock import Columns, Flags
from moepack.routing_tables import RoutingTables
from moepack.trace import NO_PREDICTION


class Activations(NamedTuple):
    """The experts of one part of a trace in the order in which they are consumed.

    Attributes
    ----------
    tokens : int [T]
        Of the whole trace.
    order : int [T, L, K]
        Place of each in the trace's own order; the padding of smaller layers comes last.
    valid : bool [T, L, K]
        No padding.
    guess : int [T, L, K]
        Rank at which each was predicted; the number of ranks where it was not.
    right : bool [T, L, R]
        The expert predicted at each of the R ranks is activated.
    ids, predicted : int [T, L, K], [T, L, R]
        The experts themselves; 0 where there is none.
    """

    tokens: npt.NDArray[np.intp]
    order: Columns
    valid: Flags
    guess: Columns
    right: Flags
    ids: Columns
    predicted: Columns


def activations(tables: RoutingTables, tokens: npt.NDArray[np.intp]) -> Activations:
    """Put the experts of some tokens in the order of consumption, and match the predictions."""
    ids = tables.trace.ids[tokens].astype(np.intp)
    predicted = tables.trace.predicted[tokens].astype(np.intp)
    order = np.argsort(np.where(tables.valid, ids, NO_PREDICTION), axis=2, kind="stable")
    ids = np.take_along_axis(ids, order, axis=2)
    valid = np.take_along_axis(np.broadcast_to(tables.valid, ids.shape), order, axis=2)
    same = (ids[:, :, :, None] == predicted[:, :, None, :]) & valid[:, :, :, None]
    guess = np.where(same.any(axis=3), same.argmax(axis=3), predicted.shape[2])
    return Activations(
        tokens,
        order,
        valid,
        guess,
        same.any(axis=2),
        np.where(valid, ids, 0),
        np.where(predicted != NO_PREDICTION, predicted, 0),
    )


def perfect(found: Activations) -> Activations:
    """The same with every expert predicted, in the order of consumption."""
    guess = np.broadcast_to(np.arange(found.order.shape[2]), found.order.shape)
    return found._replace(guess=guess, right=found.valid, predicted=found.ids)
