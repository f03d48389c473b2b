"""What a step needs of the fast tier beside weights: the cache, hidden states, temporaries.

Bytes that the runtime allocates and the planner reserves, as :mod:`moepack.budget` adds them up.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from moepack.encodings import TILE_ROWS, Encoding, encoding
from moepack.model_spec import DTYPE_BYTES, AttentionSpec, ModelSpec
from moepack.segments import align_up
from moepack.trunk import rounded_matrices

#: Rows of an expert's product over many tokens come in multiples of this. Every number of rows
#: that the matrix library has not seen costs it a new kernel: without this, the first prompt takes
#: several times as long on small experts.
ROW_MULTIPLE = 16

# The tile of scores that torch's fused attention gives to a thread on a processor: so many rows
# for blocks of so many tokens or more, and so many columns at most.
_TILE_ROWS = ((768, 256), (192, 64), (0, 32))
_TILE_COLUMNS = 512

# What a device's allocator rounds up to.
_DEVICE_ALIGNMENT = 512

# What one token's attention converts to float32 at a time, if one head does not take more.
_CONVERTED_BYTES = 4 << 20

# Weights of a quantised matrix that are dequantised at a time, in whole tiles of rows. Half as many
# take as long, in twice as many steps: threads that wait for one another wait as often.
_DEQUANTISED_WEIGHTS = 1 << 20


def kv_capacity_tokens(attention: AttentionSpec, context_tokens: int, block_tokens: int) -> int:
    """Tokens that one layer's cache holds: the context, or its window plus one block.

    A layer with attention sinks holds one more, the sink: a token of zeros.
    """
    held = context_tokens
    if attention.window is not None:
        held = min(context_tokens, attention.window + block_tokens)
    return held + (1 if attention.sinks else 0)


def kv_bytes(spec: ModelSpec, context_tokens: int, block_tokens: int) -> int:
    """Bytes of the KV cache over all layers, in the model's dtype."""
    element_bytes = DTYPE_BYTES[spec.dtype]
    return sum(
        kv_capacity_tokens(layer.attention, context_tokens, block_tokens)
        * layer.attention.cache_width
        * element_bytes
        for layer in spec.layers
    )


def hidden_bytes(spec: ModelSpec, context_tokens: int) -> int:
    """Bytes of the hidden states that a layer-major prefill of the longest prompt keeps.

    The residual stream and the normed input of the experts in the model's dtype, the float32 sum
    over experts, and the routing twice (ids as int64, weights as float32; by token, and sorted by
    expert). And what a device's recorded steps keep of one token: the same once, its rotations, and
    what hides the rows of the cache that are none of its own.
    """
    width, element_bytes = spec.hidden_size, DTYPE_BYTES[spec.dtype]
    top_k = max((spec.moe(i).top_k for i in spec.moe_layers), default=0)
    per_token = width * (2 * element_bytes + 4) + top_k * 24
    rotated = {(kind.head_dim, kind.rotary_dim) for kind in (la.attention for la in spec.layers)}
    kept = [context_tokens * element_bytes, 2 * context_tokens * element_bytes]
    kept += [width * element_bytes, width * element_bytes, 8]
    kept += [
        size
        for count in {spec.moe(i).top_k for i in spec.moe_layers}
        for size in (8 * count, 4 * count)
    ]
    kept += [head_dim * 4 for head_dim, _ in rotated for _ in range(4)]  # one token's twice
    return context_tokens * per_token + sum(align_up(size, _DEVICE_ALIGNMENT) for size in kept)


def dequantised_rows(inputs: int) -> int:
    """How many rows of a quantised matrix with so many inputs are dequantised at a time."""
    return max(TILE_ROWS, _DEQUANTISED_WEIGHTS // inputs // TILE_ROWS * TILE_ROWS)


def dequantised_bytes(stored: Encoding, outputs: int, inputs: int, dtype: str) -> int:
    """Bytes that dequantising a matrix [outputs, inputs] takes.

    Of a part of it, codes as they are packed, weights in float32 and once more in the dtype, or
    codes again; and its scales in float32.
    """
    rows = min(outputs, dequantised_rows(inputs))
    beside = 1 if dtype == "F32" else DTYPE_BYTES[dtype]
    scales = 2 * rows * (1 if stored.group is None else inputs // stored.group)
    return rows * inputs * (1 + 4 + beside) + 4 * scales


def _most_dequantised_bytes(spec: ModelSpec, encodings: Collection[str]) -> int:
    """The same for whichever matrix of the model's experts takes most."""
    quantised = [item for item in map(encoding, encodings) if item.quantised]
    if not quantised:
        return 0
    hidden = spec.hidden_size
    widths = {spec.moe(layer).intermediate_size for layer in spec.moe_layers}
    return max(
        dequantised_bytes(item, outputs, inputs, spec.dtype)
        for item in quantised
        for width in widths
        for outputs, inputs in ((2 * width, hidden), (hidden, width))
    )


def workspace_bytes(
    spec: ModelSpec,
    context_tokens: int,
    block_tokens: int,
    *,
    threads: int = 1,
    encodings: Collection[str] = (),
    trunk: str = "",
) -> int:
    """Upper bound of the temporaries of one step: the larger of attention, FFN and head.

    Attention: queries, keys, values and the output of one block, each once in the model's dtype
    and once in float32, and the mask over the context (one row a head where the layer has sinks);
    MLA also expands its latent over the context, and each thread holds a tile of scores. FFN:
    gate, up and their product for one block through the widest FFN, twice, and what dequantising
    takes for experts in any of ``encodings``. Head: the logits of one token and their sorted copy.
    Each with what dequantising takes for its matrices of the trunk. One token alone takes less, but
    for heads that share no keys.
    """
    element_bytes = DTYPE_BYTES[spec.dtype]
    block = min(block_tokens, context_tokens)
    attention = 0
    ffn = 0
    for layer in spec.layers:
        kind = layer.attention
        keys = kv_capacity_tokens(kind, context_tokens, block_tokens)
        heads = kind.num_heads * (kind.head_dim + kind.value_dim) * 2
        mask_rows = kind.num_heads if kind.sinks else 1
        need = (
            block * heads * (element_bytes + 4) + mask_rows * block * (keys + 1) * 2 * element_bytes
        )
        if kind.mla is not None:
            # The expanded latent; then keys, and values padded to the width of the keys.
            expanded = kind.mla.nope_dim + kind.value_dim + 2 * max(kind.head_dim, kind.value_dim)
            need += keys * kind.num_heads * expanded * element_bytes
        need += threads * _tile_bytes(kind, block, min(_TILE_COLUMNS, keys + 1))
        attention = max(attention, need, _alone_bytes(kind, keys))
        widths = [layer.dense_intermediate_size or 0]
        if layer.moe is not None:
            widths += [layer.moe.intermediate_size, layer.moe.shared_intermediate_size]
        rows = align_up(block, ROW_MULTIPLE)
        ffn = max(ffn, rows * (3 * max(widths) + 2 * spec.hidden_size) * (element_bytes + 4))
    in_trunk = _dequantised_in_trunk(spec, trunk, block)
    attention += in_trunk.attention
    ffn += max(_most_dequantised_bytes(spec, encodings), in_trunk.ffn)
    head = 3 * spec.vocab_size * 4 + in_trunk.head
    return max(attention, ffn, head)


class _InTrunk(NamedTuple):
    """What dequantising takes at the most for the trunk's matrices, by what they are for."""

    attention: int = 0
    ffn: int = 0
    head: int = 0


def _dequantised_in_trunk(spec: ModelSpec, trunk: str, block: int) -> _InTrunk:
    """With the product of a part of a matrix, for a block; of the head, for one token."""
    most = _InTrunk()
    for matrix in rounded_matrices(spec, trunk):
        outputs, inputs = matrix.shape
        size_bytes = dequantised_bytes(encoding(trunk), outputs, inputs, spec.dtype)
        part_bytes = min(outputs, dequantised_rows(inputs)) * DTYPE_BYTES[spec.dtype]
        if ".attn." in matrix.name:
            attention = max(most.attention, size_bytes + block * part_bytes)
            most = most._replace(attention=attention)
        elif matrix.name.startswith("layers."):
            most = most._replace(ffn=max(most.ffn, size_bytes + block * part_bytes))
        elif matrix.name.startswith("head.") or spec.tied_embeddings:
            most = most._replace(head=max(most.head, size_bytes + part_bytes))
    return most


def _tile_bytes(attention: AttentionSpec, block: int, columns: int) -> int:
    """Scores in float32 and once more in 16 bits, the output in float32, maxima and sums."""
    rows = next(rows for tokens, rows in _TILE_ROWS if block >= tokens)
    return rows * (columns * 6 + (attention.value_dim + 2) * 4)


def heads_at_a_time(rows: int, width: int) -> int:
    """Of how many heads one token's attention holds the keys, or the values, in float32.

    Parameters
    ----------
    rows, width
        Of a head's keys, or values, in the cache.
    """
    return max(1, _CONVERTED_BYTES // (rows * width * 4))


def _alone_bytes(attention: AttentionSpec, keys: int) -> int:
    """One token whose heads share no keys: some heads' rows in float32, and their scores twice."""
    if attention.mla is not None or attention.num_heads > attention.num_kv_heads:
        return 0
    width = max(attention.head_dim, attention.value_dim)
    head_bytes = keys * width * 4
    converted = min(attention.num_heads * head_bytes, max(_CONVERTED_BYTES, head_bytes))
    return converted + 2 * converted // width + attention.num_heads * width * 16
