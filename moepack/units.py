"""Sizes, times and rates, between people and numbers.

Sizes are binary: ``24G`` is 24 * 2**30 bytes, whatever the spelling (``24G``, ``24GiB``,
``24 gib``). This is the only module that parses or prints them.
"""

from __future__ import annotations

import math
import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

#: Sizes are below this: what a file's offset can be.
LIMIT_BYTES = 1 << 63

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?(/s)?\s*", re.IGNORECASE)
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|µs|ms|s)\s*", re.IGNORECASE)
_FACTOR = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24G``, ``512MiB`` or ``64K``.

    Raises
    ------
    ValueError
        When the text is not a size, or one that no machine has.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[3]:
        raise ValueError(f"not a size: {text!r}; expected a number with K, M, G or T, as in 24G")
    size_bytes = float(match[1]) * _FACTOR[match[2].lower()]
    if size_bytes >= LIMIT_BYTES:
        raise ValueError(f"no machine has {text.strip()}; expected less than 8388608T, as in 24G")
    return round(size_bytes)


def parse_rate(text: str) -> float:
    """Bytes per second of a rate such as ``2G``, ``2GiB/s`` or ``800M/s``.

    Raises
    ------
    ValueError
        When the text is not a rate, or the rate is zero, or one that no link has.
    """
    match = _SIZE.fullmatch(text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"not a rate: {text!r}; expected a positive size per second, as in 2G/s")
    rate_bytes_per_s = float(match[1]) * _FACTOR[match[2].lower()]
    if rate_bytes_per_s >= LIMIT_BYTES:
        raise ValueError(f"no link has {text.strip()}; expected less than 8388608T/s, as in 2G/s")
    return rate_bytes_per_s


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``50us``, ``1.5ms`` or ``2s``.

    Raises
    ------
    ValueError
        When the text is not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a duration: {text!r}; expected ns, us, ms or s, as in 50us")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_size(size_bytes: float) -> str:
    """A size for people: ``512 B``, ``4.00 KiB``, ``1.50 GiB``."""
    for factor, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def short_size(size_bytes: float) -> str:
    """A size as it is typed, three significant digits: ``24G``, ``1.5G``, ``768M``."""
    for factor, unit in ((TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")):
        if round(size_bytes / factor, 3) >= 1:
            number = size_bytes / factor
            return f"{number:.0f}{unit}" if number >= 100 else f"{number:.3g}{unit}"
    return f"{size_bytes:.0f}"


def format_rate(rate_bytes_per_s: float) -> str:
    """A rate for people: ``1.42 GiB/s``."""
    return f"{format_size(rate_bytes_per_s)}/s"


def format_duration(duration_s: float) -> str:
    """A duration for people, three significant digits: ``820 us``, ``1.72 ms``, ``12.3 s``."""
    if not math.isfinite(duration_s):
        return "never"
    if duration_s >= 90:
        minutes, seconds = divmod(round(duration_s), 60)
        return f"{minutes} min {seconds} s"
    rounded_s = float(f"{duration_s:.3g}")  # 999.6 us is 1 ms, not 1e+03 us
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if rounded_s >= scale:
            return f"{rounded_s / scale:.3g} {unit}"
    return f"{duration_s * 1e9:.3g} ns"
