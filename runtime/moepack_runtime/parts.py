"""A block's elementwise steps in float32, a part of its rows at a time.

In float32 a block of 512 tokens takes 4 MB for each 2048 elements of its width. Steps over all of
it read and write memory every time, and memory that is fresh every time, which the system has to
find and to clear first: a norm takes 5 ms then instead of one. A part stays in a processor's cache,
and so does the memory it is converted in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

#: Elements of a part: with two copies in float32 1 MB, the cache of one core.
_ELEMENTS = 1 << 17


class Part(NamedTuple):
    """Some rows of a block.

    Attributes
    ----------
    rows : slice
        Where they are in the block.
    exact : Tensor
        The rows in float32, to be overwritten.
    beside : Tensor
        Memory of the same shape.
    """

    rows: slice
    exact: torch.Tensor
    beside: torch.Tensor


def is_in_parts(x: torch.Tensor) -> bool:
    """Whether ``x`` [tokens, ...] is worth cutting: a block of 16-bit rows, on a processor."""
    return x.is_cpu and x.dtype is not torch.float32 and x.numel() >= 2 * _ELEMENTS


def parts(x: torch.Tensor) -> Iterator[Part]:
    """The rows of ``x`` [tokens, ...], part by part, each valid until the next is asked for."""
    tokens = x.shape[0]
    count = max(1, _ELEMENTS // (x.numel() // tokens))
    exact, beside = torch.empty((2, count, *x.shape[1:]), dtype=torch.float32)
    for begin in range(0, tokens, count):
        rows = slice(begin, begin + count)
        some = x[rows]
        taken = exact[: len(some)]
        yield Part(rows, taken.copy_(some), beside[: len(some)])
