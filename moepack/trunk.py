"""How the trunk is stored: as the checkpoint has it, or its large matrices in 8 bits.

A layout whose ``trunk`` is ``INT8`` stores each *large* matrix ``X.weight`` [out, in] as codes
``X.weight`` (I8) and ``X.scale`` (BF16 [out]), by the formula and the rounding of the experts' INT8
(:mod:`moepack.encodings`). Large is what is multiplied with the hidden states of every token, and
takes fewer aligned bytes so: queries, keys, values and outputs of attention, dense and shared FFNs,
head and embedding.

Everything else stays exact. Routers, and the gates of shared experts, decide and are small; norms,
biases and sinks are vectors; MLA's ``kv_b`` is multiplied head by head, with queries or with
outputs, for which there is no product by codes.

Pure arithmetic on sizes: no torch, no rounding.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from moepack.encodings import ENCODINGS, EncodedTensor
from moepack.errors import UnknownEncodingError
from moepack.model_spec import ModelSpec, TensorInfo
from moepack.segments import align_up

#: What a layout's trunk may be stored in; empty: as the checkpoint has it.
TRUNK_ENCODINGS = ("", "INT8")

#: The one that rounds.
ROUNDED = TRUNK_ENCODINGS[1]

_LARGE = re.compile(
    r"(embed|head|layers\.\d+\.(attn\.(q|k|v|o|q_a|q_b|kv_a)|(mlp|shared)\.(gate|up|down)))\.weight"
)

_WEIGHT = ".weight"


def trunk_name(encoding: str) -> str:
    """An encoding of a trunk as people say it: ``exact``, ``int8``."""
    return encoding.lower() or "exact"


class TrunkPart(NamedTuple):
    """One of the model's trunk tensors, and the tensors that it is stored as.

    Attributes
    ----------
    source : TensorInfo
        As the checkpoint has it.
    tensors : tuple of EncodedTensor
        Under their full names: itself, or codes and scale.
    """

    source: TensorInfo
    tensors: tuple[EncodedTensor, ...]

    @property
    def is_rounded(self) -> bool:
        """Whether it is stored as codes."""
        return len(self.tensors) > 1


def require_trunk(encoding: str) -> None:
    """Refuse a trunk's encoding that there is not.

    Raises
    ------
    UnknownEncodingError
        Listing those that there are.
    """
    if encoding not in TRUNK_ENCODINGS:
        raise UnknownEncodingError(
            f"a trunk in {trunk_name(encoding)}, expected one in "
            f"{' or '.join(map(trunk_name, TRUNK_ENCODINGS))}; choose one of these or update "
            "moepack"
        )


def trunk_parts(spec: ModelSpec, encoding: str) -> tuple[TrunkPart, ...]:
    """Every trunk tensor of a model, in the order of ``spec.trunk``, as a layout stores it.

    Parameters
    ----------
    encoding
        One of :data:`TRUNK_ENCODINGS`, here and below.

    Raises
    ------
    UnknownEncodingError
        When there is no such encoding, here and below.
    """
    require_trunk(encoding)
    return tuple(TrunkPart(info, _stored(info, encoding)) for info in spec.trunk)


def stored_trunk(spec: ModelSpec, encoding: str) -> tuple[EncodedTensor, ...]:
    """The tensors of the trunk's shard, in their order."""
    return tuple(tensor for part in trunk_parts(spec, encoding) for tensor in part.tensors)


def rounded_matrices(spec: ModelSpec, encoding: str) -> tuple[TensorInfo, ...]:
    """The matrices of a trunk that are stored as codes."""
    if not encoding:
        return ()
    return tuple(part.source for part in trunk_parts(spec, encoding) if part.is_rounded)


def is_rounded(info: TensorInfo, encoding: str) -> bool:
    """Whether a tensor of a trunk is stored as codes."""
    return len(_stored(info, encoding)) > 1


@functools.lru_cache(maxsize=4096)  # a planner asks for every budget that it tries
def _stored(info: TensorInfo, encoding: str) -> tuple[EncodedTensor, ...]:
    exact = (EncodedTensor(info.name, info.dtype, info.shape),)
    if not encoding or not _LARGE.fullmatch(info.name) or len(info.shape) != 2:
        return exact
    matrix = info.name.removesuffix(_WEIGHT)
    rounded = tuple(item.of(matrix) for item in ENCODINGS[encoding].tensors(*info.shape))
    aligned_bytes = sum(align_up(item.size_bytes) for item in rounded)
    return rounded if aligned_bytes < align_up(info.size_bytes) else exact
