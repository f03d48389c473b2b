"""The experts of one token, all at once.

The contract of :func:`experts_one_token`, and of whatever takes its place. On a device that is
:mod:`moepack_runtime.fused`, which a layer takes without this in between: it adds the rows up, too.

- *In*: one token's normed hidden state, and segments wherever they lie (slots or frames): views,
  of which no two need be neighbours or of equal width. They are read where they are: nothing that
  gathers weights into one tensor (indexing a stack of slots, stacking) may stand behind it.
- *Out*: one row a segment, in the order of the segments, each what
  :func:`moepack_runtime.ffn.gated_ffn` gives for it: unweighted, rounded once to the dtype of the
  token, its bits depending on the token and on that segment alone. So a caller may hand over what
  is ready in any portions, and add the rows in the order of summation when all are there.
- *Meanwhile*: nothing waits for the device; on CUDA everything is issued to the current stream.

torch's own grouped products want all weights in one tensor with one stride, which the slots of
one layer have and a mixture of slots and frames has not, and select by copying.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from moepack.model_spec import ActivationSpec
from moepack_runtime.ffn import FfnWeights, QuantisedFfn, activate, gated_ffn
from moepack_runtime.fused import Segment, TokenRows
from moepack_runtime.fused_check import has_kernels


def experts_one_token(
    x: torch.Tensor, segments: Sequence[FfnWeights | QuantisedFfn], activation: ActivationSpec
) -> torch.Tensor:
    """Partial sums of one token's segments.

    Parameters
    ----------
    x
        [1, hidden].
    segments
        At least one.

    Returns
    -------
    Tensor
        [segments, hidden] in the dtype of ``x``.
    """
    if x.is_cuda:
        if has_kernels(x.device):
            rows = TokenRows(x, len(segments), activation)
            rows.compute([Segment(row, weights) for row, weights in enumerate(segments)])
            return rows.values
        plain = [segment for segment in segments if isinstance(segment, FfnWeights)]
        alike = len({segment.gate.shape for segment in plain}) == 1
        if len(plain) == len(segments) and alike and all(s.gate_up is not None for s in plain):
            return issued_by_step(x, plain, activation)
    return one_by_one(x, segments, activation)


def one_by_one(
    x: torch.Tensor, segments: Sequence[FfnWeights | QuantisedFfn], activation: ActivationSpec
) -> torch.Tensor:
    """Each segment through its two products: the meaning of the contract, and the way of a CPU."""
    return torch.cat([gated_ffn(x, segment, activation) for segment in segments])


def issued_by_step(
    x: torch.Tensor, segments: Sequence[FfnWeights], activation: ActivationSpec
) -> torch.Tensor:
    """All first products into rows of one tensor, one activation, all second products.

    For segments of one width: an activation costs a device its launches once, not once a segment.
    """
    both = [F.linear(x, _gate_up(segment), segment.gate_up_bias) for segment in segments]
    gate, up = torch.cat(both).chunk(2, -1)  # [segments, neurons]
    active = activate(gate, up, activation)
    rows = zip(active.unsqueeze(1), segments, strict=True)
    return torch.cat([F.linear(row, segment.down, segment.down_bias) for row, segment in rows])


def _gate_up(segment: FfnWeights) -> torch.Tensor:
    assert segment.gate_up is not None, "a segment whose gate and up are no neighbours"
    return segment.gate_up
