"""Options as argparse wants them: what makes no measurement is refused before anything is run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import typer

from moepack.cli.options import link, size

#: Bytes per second and latency in seconds of a throttled link.
Throttle = tuple[float, float]


def at_least(least: int, why: str = "") -> Callable[[str], int]:
    """A whole number that is no smaller; ``why`` ends the message about one that is."""

    def count(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a whole number, {least} or more"
            ) from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number}: expected {least} or more{why}")
        return number

    return count


#: New tokens where the time between two of them is measured.
new_tokens = at_least(2, ", since times are taken between tokens")


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return number


def size_option(text: str) -> int:
    """A size, in bytes."""
    try:
        return size(text)
    except typer.BadParameter as failure:
        raise argparse.ArgumentTypeError(str(failure)) from None


def link_option(text: str) -> Throttle | None:
    """A throttled link, or ``none`` for the link as it is."""
    if text == "none":
        return None
    try:
        return link(text)
    except typer.BadParameter as failure:
        raise argparse.ArgumentTypeError(str(failure)) from None
