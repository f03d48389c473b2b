"""Attention over the cache and the present block, through torch's scaled_dot_product_attention.

Here are grouped queries (with norms of queries and keys, windows and sinks); multi-head latent
attention is in :mod:`moepack_runtime.latent_attention`. Which kernel runs depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from typing_extensions import override

from moepack.model_spec import AttentionSpec
from moepack.working_memory import heads_at_a_time
from moepack_runtime.kv_cache import LayerCache
from moepack_runtime.norms import NormFunction, rms_norm
from moepack_runtime.rope import RotaryEmbedding, Rotation
from moepack_runtime.weights import Weights, beside


class Here(NamedTuple):
    """Where one token is, in memory that a recorded step reads whenever it is replayed.

    Attributes
    ----------
    position : Tensor
        int64 [1].
    mask : Tensor
        [1, rows], in the model's dtype: 0 for the rows of the cache that the token sees, else -inf.
    rotations : mapping of RotaryEmbedding to Rotation
        Of the position.
    """

    position: torch.Tensor
    mask: torch.Tensor
    rotations: Mapping[RotaryEmbedding, Rotation]


class Attention(Protocol):
    """Normed hidden states [tokens, hidden] to the attention's output [tokens, hidden]."""

    @property
    def is_recordable(self) -> bool:
        """Whether there is :meth:`at`."""

    def __call__(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Attend from the tokens at ``start`` and after; their rows join the cache."""

    def at(self, x: torch.Tensor, here: Here) -> torch.Tensor:
        """The same of one token, wherever ``here`` will be: what is launched does not depend on it.

        The rows beyond the token's are read as well, and masked.
        """


def causal_mask(
    tokens: int, rows: int, start: int, seen_from: int, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """What to add to the scores: 0 where a token may look, else -inf.

    Parameters
    ----------
    tokens, rows
        Tokens from position ``start`` on look at rows from position ``seen_from`` on.

    Returns
    -------
    Tensor
        [tokens, rows] in the dtype of ``like``.
    """
    behind = start - seen_from  # rows before the first token
    mask = torch.full((tokens, rows), -torch.inf, dtype=like.dtype, device=like.device)
    mask = mask.triu_(behind + 1)
    if window is not None and tokens + behind > window:
        mask += torch.full_like(mask, -torch.inf).tril_(behind - window)
    return mask


class GroupedQueryAttention(Attention):
    """Attention whose query heads share keys and values in groups.

    ``x`` [tokens, hidden] -> queries [tokens, heads, head_dim], keys and values
    [tokens, kv_heads, head_dim] -> [tokens, hidden].
    """

    def __init__(
        self,
        spec: AttentionSpec,
        weights: Weights,
        *,
        rope: RotaryEmbedding,
        cache: LayerCache,
        norm_eps: float,
    ) -> None:
        self._spec = spec
        self._qkv = beside([weights.linear(name) for name in "qkv"])
        self._o = weights.linear("o")
        self._norms: tuple[NormFunction, NormFunction] | None = None
        if spec.qk_norm != "none":
            self._norms = (
                rms_norm(weights["q_norm.weight"], norm_eps),
                rms_norm(weights["k_norm.weight"], norm_eps),
            )
        self._rope = rope
        self._cache = cache
        self._groups = spec.num_heads // spec.num_kv_heads
        self._sinks = weights.get("sinks")

    @property
    @override
    def is_recordable(self) -> bool:
        return self._cache.is_plain

    @override
    def __call__(self, x: torch.Tensor, start: int) -> torch.Tensor:
        tokens = x.shape[0]
        queries, keys, values = self._project(x, self._rope.rotation(start, tokens))
        seen_from, (seen_keys, seen_values) = self._cache.append(start, keys, values)
        attend = self._attend_one if tokens == 1 else self._attend_block
        return self._o(attend(queries, seen_keys, seen_values, start, seen_from))

    @override
    def at(self, x: torch.Tensor, here: Here) -> torch.Tensor:
        queries, keys, values = self._project(x, here.rotations[self._rope])
        keys, values = self._cache.place(here.position, keys, values)
        rows = here.mask.shape[1]
        output = self._attend_grouped(queries, keys[:, :, :rows], values[:, :, :rows], here.mask)
        return self._o(output)

    def _project(
        self, x: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec, tokens = self._spec, x.shape[0]
        queries, keys, values = self._qkv(x)
        if spec.qk_norm == "full":
            queries, keys = self._normed(queries, keys)
        if spec.clip is not None:
            for projected in (queries, keys, values):
                projected.clamp_(-spec.clip, spec.clip)
        queries = queries.view(tokens, spec.num_heads, spec.head_dim)
        keys = keys.view(tokens, spec.num_kv_heads, spec.head_dim)
        values = values.view(tokens, spec.num_kv_heads, spec.value_dim)
        if spec.qk_norm == "head":
            queries, keys = self._normed(queries, keys)
        if spec.rotary_dim:
            queries = self._rope.rotate(queries, rotation)
            keys = self._rope.rotate(keys, rotation)
        return queries, keys, values

    def _normed(
        self, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._norms is not None
        query_norm, key_norm = self._norms
        return query_norm(queries), key_norm(keys)

    def _attend_one(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: int
    ) -> torch.Tensor:
        """One token sees every row, so a group's heads are the rows of one small product.

        Up to ten times as fast as ``enable_gqa``, which reads the keys once for every head.
        """
        spec = self._spec
        if self._is_alone(queries):
            output = attend_alone(queries, keys, values, spec.scale)
            return output.view(1, spec.num_heads * spec.value_dim)
        mask = None
        if self._sinks is not None:
            mask = queries.new_zeros(1, spec.num_kv_heads, self._groups, keys.shape[2])
            mask[0, :, :, 0] = self._sinks.view(spec.num_kv_heads, self._groups)
        return self._attend_grouped(queries, keys, values, mask)

    def _attend_grouped(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        spec = self._spec
        output = F.scaled_dot_product_attention(
            queries.view(1, spec.num_kv_heads, self._groups, spec.head_dim),
            keys,
            values,
            attn_mask=mask,
            scale=spec.scale,
        )
        return output.reshape(1, spec.num_heads * spec.value_dim)

    def _is_alone(self, queries: torch.Tensor) -> bool:
        """Whether torch would multiply single rows of 16 bits, which it is slow at on a CPU."""
        is_half = queries.dtype in {torch.bfloat16, torch.float16}
        return self._groups == 1 and self._sinks is None and is_half and queries.is_cpu

    def _attend_block(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        seen_from: int,
    ) -> torch.Tensor:
        spec, tokens = self._spec, queries.shape[0]
        is_plain = start == 0 and self._sinks is None
        is_plain = is_plain and (spec.window is None or tokens <= spec.window)
        mask = None if is_plain else self._block_mask(queries, keys.shape[2], start, seen_from)
        output = attend_in_groups(
            queries.transpose(0, 1), keys, values, mask, is_causal=is_plain, scale=spec.scale
        )  # [heads, tokens, value_dim]
        return output.transpose(0, 1).reshape(tokens, spec.num_heads * spec.value_dim)

    def _block_mask(
        self, queries: torch.Tensor, rows: int, start: int, seen_from: int
    ) -> torch.Tensor:
        """[tokens, rows], or [kv_heads, groups, tokens, rows] where the first row is the sink.

        With three dimensions torch would leave its fused kernel and hold every score.
        """
        tokens, window = queries.shape[0], self._spec.window
        if self._sinks is None:
            return causal_mask(tokens, rows, start, seen_from, window, queries)
        heads = (self._spec.num_kv_heads, self._groups)
        mask = queries.new_empty(*heads, tokens, rows)
        mask[:, :, :, 0] = self._sinks.view(*heads, 1)
        mask[:, :, :, 1:] = causal_mask(tokens, rows - 1, start, seen_from, window, queries)
        return mask


def attend_alone(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One token whose heads share no keys, in float32 and rounded once.

    Two to three times as fast as torch's fused kernel on 500 rows of 16 heads of 128, four times on
    4000; a few heads at a time, so that what is converted stays in the processor's cache.

    Parameters
    ----------
    queries, keys, values
        [1, heads, width], [1, heads, rows, width] and [1, heads, rows, value_width].

    Returns
    -------
    Tensor
        [heads, 1, value_width].
    """
    heads, rows = keys.shape[1:3]
    count = heads_at_a_time(rows, max(keys.shape[3], values.shape[3]))
    scaled = queries.transpose(0, 1).float().mul_(scale)  # [heads, 1, width]
    output = torch.empty(heads, 1, values.shape[3])
    for first in range(0, heads, count):
        some = slice(first, first + count)
        scores = torch.bmm(scaled[some], keys[0, some].float().transpose(1, 2))
        torch.bmm(scores.softmax(-1), values[0, some].float(), out=output[some])
    return output.to(queries.dtype)


def attend_in_groups(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    """Queries [heads, tokens, width] against keys and values [1, kv_heads, rows, width].

    The key heads are the batch, and the heads of a group see theirs through a view. With
    ``enable_gqa`` and a mask no fused kernel of CUDA is left (flash attention takes no mask,
    memory-efficient attention no groups), and torch would hold every score in float32. On CPU the
    two ways take the same time and memory, and give the same bits.

    Parameters
    ----------
    mask
        [tokens, rows], or [kv_heads, groups, tokens, rows]: no token sees a later one's row, and
        theirs are the last.
    is_causal
        That without a mask: the rows are the tokens' own.

    Returns
    -------
    Tensor
        [heads, tokens, width of the values].
    """
    tokens, rows = queries.shape[1], keys.shape[2]
    if tokens < _HALVED_TOKENS or not queries.is_cpu:
        return _attend_at_once(queries, keys, values, mask, is_causal, scale)
    half = tokens // 2
    seen = rows - tokens + half  # by the first half
    if mask is None:
        first, second = None, causal_mask(tokens - half, rows, half, 0, None, queries)
    else:
        first, second = mask[..., :half, :seen], mask[..., half:, :]
    output = queries.new_empty(tokens, queries.shape[0], values.shape[3]).transpose(0, 1)
    output[:, :half] = _attend_at_once(
        queries[:, :half], keys[:, :, :seen], values[:, :, :seen], first, is_causal, scale
    )
    output[:, half:] = _attend_at_once(queries[:, half:], keys, values, second, False, scale)
    return output


#: From so many tokens on the halves of a block attend by themselves on a processor, whose kernel
#: computes the scores of 512 keys whether they are seen or not. Each half has the 192 tokens that
#: give its tiles 64 rows.
_HALVED_TOKENS = 384


def _attend_at_once(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> torch.Tensor:
    kv_heads = keys.shape[1]
    groups = queries.shape[0] // kv_heads
    return F.scaled_dot_product_attention(
        queries.reshape(kv_heads, groups, *queries.shape[1:]),  # a view
        keys.transpose(0, 1).expand(-1, groups, -1, -1),
        values.transpose(0, 1).expand(-1, groups, -1, -1),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
    ).flatten(0, 1)
