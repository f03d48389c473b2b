"""Products of activations with weights, by the fastest of torch's kernels for the shape.

The choice is a function of shape, dtype and device alone, so equal shapes give equal bits. On a
CPU a product with one row reads its weights once and does nothing else; oneDNN, which torch takes
for it, reorders them first. Torch's own kernel took 0.5 to 0.7 of its time for every bfloat16
weight from [64, 2048] to [50304, 2048], with one thread and with two, and gave results equally near
to float64. Weights in float16 and float32 take equally long either way, two rows and more are
faster by oneDNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from moepack.segments import align_up


class _Library(Protocol):
    enabled: bool


_ONEDNN = cast(_Library, torch.backends.mkldnn)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + b``.

    Parameters
    ----------
    x
        [tokens, in].
    weight
        [out, in], its rows contiguous; never copied.
    bias
        [out].

    Returns
    -------
    Tensor
        [tokens, out] in the dtype of ``x``: summed in float32, rounded once.
    """
    if is_one_row(x):
        with without_onednn:
            return F.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def several(
    x: torch.Tensor, maps: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> list[torch.Tensor]:
    """:func:`linear` of one ``x`` by each (weight, bias), to the same bits."""
    if is_one_row(x):
        with without_onednn:
            return [F.linear(x, weight, bias) for weight, bias in maps]
    return [F.linear(x, weight, bias) for weight, bias in maps]


def is_one_row(x: torch.Tensor) -> bool:
    """Whether products of ``x`` [tokens, in] belong inside :data:`without_onednn`."""
    return x.dtype is torch.bfloat16 and x.shape[0] == 1 and x.is_cpu


def is_weight_first(x: torch.Tensor) -> bool:
    """Whether the products of an FFN are faster as ``W X^T``, for ``x`` of [tokens, hidden].

    oneDNN takes tokens that are columns 64 at a time, and weights need no reordering then. That
    takes .8 to .9 of the time of an expert of [2048, 2048] and [2048, 1024] with 32, 48 and 64
    tokens, .93 with 112 and 128, 1.1 with 80; wider inputs gain nothing (1.06 at 4096).
    """
    tokens, hidden = x.shape
    return (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and 32 <= tokens <= 256
        and tokens % 64 in _WHOLE_COLUMNS
        and hidden <= _WIDEST_FIRST
    )


# What is left over of 64 tokens, where it wastes little of them.
_WHOLE_COLUMNS = (0, 32, 48)
_WIDEST_FIRST = 2048


def is_dear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether products with a weight take so long that rows of padding cost more than kernels."""
    return x.dtype is torch.bfloat16 and x.is_cpu and weight.numel() >= _DEAR_WEIGHTS


def dear_rows(tokens: int) -> int:
    """As how many rows some tokens are multiplied with the weights of a dear expert.

    On two threads one of [2048, 2048] and [2048, 1024] takes 0.4 ms with 1 token, 0.8 with 2, 0.85
    with 4, 1.0 with 8, 1.2 with 16; with 72, 88 and 104 a tenth less than with 8 more.
    Of many tokens a row is a small part: the numbers are no more than the multiples of 16 in a
    block of 512, and so is the memory for their kernels.
    """
    return next((rows for rows in _DEAR_ROWS if rows >= tokens), align_up(tokens, 32))


_DEAR_WEIGHTS = 1 << 20
_DEAR_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 72, 80, 88, 96, 104, *range(112, 257, 16))


class _WithoutOneDnn:
    """Torch's own kernels instead of oneDNN's. Not to be entered twice.

    The switch is the process's, as its number of threads is: what other threads multiply
    meanwhile takes torch's kernels as well.
    """

    __slots__ = ("_was_on",)

    def __init__(self) -> None:
        self._was_on = True

    def __enter__(self) -> None:
        self._was_on = _ONEDNN.enabled
        _ONEDNN.enabled = False

    def __exit__(self, *_: object) -> None:
        _ONEDNN.enabled = self._was_on


#: For several products in a row: ``with without_onednn: ...``, where :func:`is_one_row`.
without_onednn = _WithoutOneDnn()
