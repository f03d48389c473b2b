"""Whether a device has the kernels for one token's experts, and they compute what they should.

Triton comes with torch's wheels for CUDA, and needs a C compiler for its launcher. Where it is
missing, or computes anything else than torch, this is logged, once, and torch computes.
"""

from __future__ import annotations

import functools
import logging
import subprocess

import torch

from moepack.model_spec import MoeSpec, RouterSpec
from moepack.segments import SegmentShape, segment_shape
from moepack_runtime.ffn import FfnWeights, QuantisedFfn, gated_ffn
from moepack_runtime.fused import Segment, TokenRows
from moepack_runtime.int4_fragments import in_memory
from moepack_runtime.pieces import segment_weights
from moepack_runtime.places import form_of
from moepack_runtime.weights import TORCH_DTYPE

_SLOWER = "one token's experts are computed launch by launch, which is slower"

# Torch rounds in between, the kernels do not.
_TOLERANCE = 2**-5

_log = logging.getLogger(__name__)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels can be had for a device, and compute there what they should.

    Where not, it is logged once.
    """
    try:
        wrong = [name for name in ("BF16", "INT8", "INT4_G32") if not _is_right(name, device)]
    except torch.OutOfMemoryError:
        raise
    except (
        ImportError,
        AttributeError,
        OSError,
        RuntimeError,
        TypeError,
        subprocess.SubprocessError,
    ) as failure:
        reason = str(failure).splitlines() or [type(failure).__name__]
        _log.warning("%s: Triton gives no kernels for %s (%s)", _SLOWER, device, reason[0])
        _log.debug("where that came from:", exc_info=True)
        return False
    if wrong:
        _log.warning("%s: Triton's kernels compute wrong %s on %s", _SLOWER, wrong, device)
    return not wrong


def _is_right(name: str, device: torch.device) -> bool:
    """Whether two experts in an encoding give what they give by torch, and their sum."""
    hidden, neurons = 96, 64
    moe = MoeSpec(2, 2, neurons, RouterSpec())
    shape = segment_shape(moe, hidden, name, neurons, "top")
    assert shape is not None, "experts that are not cut"
    shape = in_memory(shape, "BF16", device)
    if form_of(shape) is None:
        return True  # torch's own kernel does not read them either
    draw = torch.Generator().manual_seed(1)
    segments = [Segment(row, _drawn(shape, draw, device)) for row in (1, 0)]
    both = torch.randn(2, hidden, generator=draw).to(device, torch.bfloat16)
    x, residual = both[:1], both[1:]
    weights = torch.rand(2, generator=draw).to(device)
    expected = [gated_ffn(x, weights, moe.activation_spec) for _, weights in reversed(segments)]
    rows = TokenRows(x, 2, moe.activation_spec)
    rows.compute(segments)
    wanted = residual + (torch.cat(expected).float() * weights[:, None]).sum(0)
    found = residual.clone()
    rows.add_to(found, None, weights)
    pairs = zip((*rows.values.unsqueeze(1), found), (*expected, wanted), strict=True)
    return all(
        bool(((mine.double() - torchs.double()).abs() <= _TOLERANCE * torchs.abs().max()).all())
        for mine, torchs in pairs
    )


def _drawn(
    shape: SegmentShape, draw: torch.Generator, device: torch.device
) -> FfnWeights | QuantisedFfn:
    """A segment of random numbers."""
    memory = torch.zeros(shape.stored_bytes, dtype=torch.uint8)
    for tensor in shape.tensors:
        room = memory[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        if tensor.dtype in {"I8", "U8"}:
            room.random_(0, 256, generator=draw)
        else:
            room.view(TORCH_DTYPE[tensor.dtype]).uniform_(-0.1, 0.1, generator=draw)
    return segment_weights(memory.to(device), shape)
