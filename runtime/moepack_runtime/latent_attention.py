"""Multi-head latent attention, whose cache holds what keys and values are made from."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from typing_extensions import override

from moepack.model_spec import AttentionSpec, MlaSpec
from moepack_runtime.attention import Attention, Here, attend_in_groups, causal_mask
from moepack_runtime.kv_cache import LayerCache
from moepack_runtime.norms import rms_norm
from moepack_runtime.rope import RotaryEmbedding, Rotation
from moepack_runtime.weights import ExactLinear, Weights

#: DeepSeek's norms of its latents do not take their eps from the configuration.
_LATENT_EPS = 1e-6


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The cache holds a token's latent, from which ``kv_b`` makes the keys and values of all heads,
    and its rotated key, which all heads share. Two ways to the same result:

    - *expanded*: keys and values of every row are made anew for the block;
    - *absorbed*: ``kv_b`` is applied to the queries and to the outputs instead, so that attention
      happens among latents, the cache being key and value at once.

    Expanding costs arithmetic per row, absorbing per row and token: short blocks absorb.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        mla: MlaSpec,
        weights: Weights,
        *,
        rope: RotaryEmbedding,
        cache: LayerCache,
    ) -> None:
        self._spec = spec
        self._mla = mla
        self._query = _query_projection(mla, weights)
        self._kv_a = weights.linear("kv_a")
        self._kv_norm = rms_norm(weights["kv_a_norm.weight"], _LATENT_EPS)
        # Never in codes: its heads are multiplied with one by one.
        self._kv_b = ExactLinear(weights["kv_b.weight"], weights.get("kv_b.bias"))
        per_head = self._kv_b.weight.view(
            spec.num_heads, mla.nope_dim + spec.value_dim, mla.kv_rank
        )
        self._key_up, self._value_up = torch.split(per_head, [mla.nope_dim, spec.value_dim], 1)
        self._o = weights.linear("o")
        self._rope = rope
        self._cache = cache
        # Values are padded to the width of the keys: torch's fused kernels want them equal.
        self._value_padding = max(0, spec.head_dim - spec.value_dim)

    def _absorbs(self, tokens: int) -> bool:
        """Whether absorbing takes fewer multiplications per row and head than expanding."""
        mla, spec = self._mla, self._spec
        absorbed = tokens * 2 * (mla.kv_rank + mla.rope_dim)
        expanded = tokens * 2 * spec.head_dim + mla.kv_rank * (mla.nope_dim + spec.value_dim)
        return absorbed < expanded

    @property
    @override
    def is_recordable(self) -> bool:
        return self._cache.is_plain and self._absorbs(1)

    @override
    def __call__(self, x: torch.Tensor, start: int) -> torch.Tensor:
        tokens = x.shape[0]
        query, rotary_query, row = self._project(x, self._rope.rotation(start, tokens))
        _, (rows,) = self._cache.append(start, row)  # [1, 1, rows, kv_rank + rope_dim]
        attend = self._attend_absorbed if self._absorbs(tokens) else self._attend_expanded
        return self._o(attend(query, rotary_query, rows, start))

    @override
    def at(self, x: torch.Tensor, here: Here) -> torch.Tensor:
        query, rotary_query, row = self._project(x, here.rotations[self._rope])
        (rows,) = self._cache.place(here.position, row)
        seen = rows[:, :, : here.mask.shape[1]]
        return self._o(self._attend_absorbed(query, rotary_query, seen, 0, here.mask))

    def _project(
        self, x: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries in two halves, and the rows for the cache, [tokens, 1, kv_rank + rope_dim]."""
        spec, mla, tokens = self._spec, self._mla, x.shape[0]
        queries = self._query(x).view(tokens, spec.num_heads, spec.head_dim)
        query, rotary_query = torch.split(queries, [mla.nope_dim, mla.rope_dim], -1)
        latent, rotary_key = torch.split(self._kv_a(x), [mla.kv_rank, mla.rope_dim], -1)
        rotary_query = self._rope.rotate(rotary_query, rotation)
        rotary_key = self._rope.rotate(rotary_key.unsqueeze(1), rotation)
        return query, rotary_query, torch.cat((self._kv_norm(latent).unsqueeze(1), rotary_key), -1)

    def _attend_absorbed(
        self,
        query: torch.Tensor,
        rotary_query: torch.Tensor,
        rows: torch.Tensor,
        start: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        spec, mla, tokens = self._spec, self._mla, query.shape[0]
        among_latents = torch.bmm(query.transpose(0, 1), self._key_up)  # [heads, tokens, kv_rank]
        queries = torch.cat((among_latents, rotary_query.transpose(0, 1)), -1)
        if tokens == 1:  # the heads are the rows of one product
            output = F.scaled_dot_product_attention(
                queries.view(1, 1, spec.num_heads, -1), rows, rows, attn_mask=mask, scale=spec.scale
            ).view(spec.num_heads, 1, -1)
        else:
            output = self._attend(queries, rows, rows, start)
        values = torch.bmm(output[:, :, : mla.kv_rank], self._value_up.transpose(1, 2))
        return values.transpose(0, 1).reshape(tokens, spec.num_heads * spec.value_dim)

    def _attend_expanded(
        self, query: torch.Tensor, rotary_query: torch.Tensor, rows: torch.Tensor, start: int
    ) -> torch.Tensor:
        spec, mla, tokens = self._spec, self._mla, query.shape[0]
        latents, rotary_keys = torch.split(rows[0, 0], [mla.kv_rank, mla.rope_dim], -1)
        expanded = self._kv_b(latents).view(-1, spec.num_heads, mla.nope_dim + spec.value_dim)
        keys, values = torch.split(expanded, [mla.nope_dim, spec.value_dim], -1)
        keys = torch.cat((keys, rotary_keys.unsqueeze(1).expand(-1, spec.num_heads, -1)), -1)
        values = F.pad(values, (0, self._value_padding))
        queries = torch.cat((query, rotary_query), -1)
        output = self._attend(
            queries.transpose(0, 1),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            start,
        )  # [heads, tokens, >= value_dim]
        values = output[:, :, : spec.value_dim]
        return values.transpose(0, 1).reshape(tokens, spec.num_heads * spec.value_dim)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
    ) -> torch.Tensor:
        tokens, rows = queries.shape[1], keys.shape[2]
        is_plain = start == 0 and tokens > 1
        mask = None
        if start and tokens > 1:
            mask = causal_mask(tokens, rows, start, 0, None, queries)
        return attend_in_groups(
            queries, keys, values, mask, is_causal=is_plain, scale=self._spec.scale
        )


def _query_projection(mla: MlaSpec, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
    """[tokens, hidden] to [tokens, heads * head_dim], through a latent where there is one."""
    if mla.q_rank is None:
        return weights.linear("q")
    down, up = weights.linear("q_a"), weights.linear("q_b")
    norm = rms_norm(weights["q_a_norm.weight"], _LATENT_EPS)
    return lambda x: up(norm(down(x)))
