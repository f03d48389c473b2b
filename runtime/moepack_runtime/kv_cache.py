"""The KV cache: allocated once, in as many bytes as :mod:`moepack.working_memory` says.

A layer keeps its rows (a token's keys and values, or MLA's latent) behind one another, so that
attention reads one slice. A layer with a sliding window keeps the window and a block: when that
is full, the last window moves to the front. A layer with attention sinks keeps a row of zeros
right before the rows that a step sees: the virtual key of the sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch

from moepack.model_spec import DTYPE_BYTES, AttentionSpec, ModelSpec
from moepack.working_memory import kv_bytes, kv_capacity_tokens
from moepack_runtime.weights import TORCH_DTYPE


class Seen(NamedTuple):
    """What the tokens of a step attend to.

    Attributes
    ----------
    start : int
        Position of the first row.
    rows : tuple of Tensor
        Each [1, heads, rows, width]; with sinks, a row of zeros comes first, before ``start``.
    """

    start: int
    rows: tuple[torch.Tensor, ...]


class LayerCache:
    """The rows of one layer.

    Parameters
    ----------
    memory : Tensor
        Flat, of ``capacity`` times the widths of a token.
    widths : sequence of (heads, width)
        Of each kind of row: keys and values, or latents alone.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        widths: Sequence[tuple[int, int]],
        *,
        capacity: int,
        window: int | None,
        sinks: bool,
    ) -> None:
        sizes = [capacity * heads * width for heads, width in widths]
        self._tensors = [
            flat.view(1, heads, capacity, width)
            for flat, (heads, width) in zip(torch.split(memory, sizes), widths, strict=True)
        ]
        self._capacity = capacity
        self._window = window
        self._sink_rows = 1 if sinks else 0
        self.size_bytes = sum(tensor.nbytes for tensor in self._tensors)
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self._first = 0  # the oldest token that is kept,
        self._front = self._sink_rows  # the slot that it sits in,
        self._end = 0  # and the position behind the newest

    def append(self, start: int, *rows: torch.Tensor) -> Seen:
        """Store the rows of tokens from position ``start`` on, and give all that they may see.

        Parameters
        ----------
        rows
            Of each kind, [tokens, heads, width]; rounded to the cache's dtype.
        """
        assert start == self._end, f"rows of position {start} behind {self._end} cached tokens"
        tokens = rows[0].shape[0]
        seen_from = self._first
        if self._window is not None:
            seen_from = max(seen_from, start - self._window + 1)
        if self._slot(start) + tokens > self._capacity:
            self._compact(seen_from)
        slot = self._slot(start)
        for tensor, new in zip(self._tensors, rows, strict=True):
            if tokens == 1:
                tensor.select(2, slot).copy_(new)
            else:
                tensor[0, :, slot : slot + tokens].copy_(new.transpose(0, 1))
        self._end = start + tokens
        begin = self._slot(seen_from)
        if self._sink_rows:
            if begin > self._sink_rows:
                self._drop_before(seen_from)
            begin -= 1
        rows_seen = slot + tokens - begin
        return Seen(
            seen_from, tuple([tensor.narrow(2, begin, rows_seen) for tensor in self._tensors])
        )

    @property
    def is_plain(self) -> bool:
        """Whether a token's row is the one of its position: nothing moves, no sink comes before."""
        return self._window is None and not self._sink_rows

    def place(self, position: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Store one token's rows where ``position`` will say when this is replayed.

        For caches that are :attr:`is_plain`; :meth:`count` follows each replay.

        Parameters
        ----------
        position
            int64 [1], on the device.
        rows
            Of each kind, [1, heads, width]; rounded to the cache's dtype.

        Returns
        -------
        tuple of Tensor
            All rows that there is room for, each [1, heads, capacity, width].
        """
        for tensor, new in zip(self._tensors, rows, strict=True):
            tensor.index_copy_(2, position, new.unsqueeze(2))
        return tuple(self._tensors)

    def count(self, start: int) -> None:
        """Know of the row that was placed at ``start``."""
        assert start == self._end, f"a row of position {start} behind {self._end} cached tokens"
        self._end = start + 1

    def _slot(self, position: int) -> int:
        return self._front + position - self._first

    def _compact(self, seen_from: int) -> None:
        """Move the tokens from ``seen_from`` on to the front."""
        old, new = self._slot(seen_from), self._sink_rows
        count = self._end - seen_from
        for tensor in self._tensors:
            # A copy, because the two ranges may overlap.
            tensor[:, :, new : new + count] = tensor[:, :, old : old + count].clone()
        self._first, self._front = seen_from, new

    def _drop_before(self, position: int) -> None:
        """Give up what is older than ``position``; its neighbour becomes the sink's zeros."""
        self._front = self._slot(position)
        self._first = position
        for tensor in self._tensors:
            tensor[:, :, self._front - 1].zero_()

    def can_truncate(self, length: int) -> bool:
        """Whether the first ``length`` tokens can be gone on from."""
        if length in {0, self._end}:
            return True
        needed_from = 0 if self._window is None else max(0, length - self._window + 1)
        return length < self._end and self._first <= needed_from

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on. See :meth:`can_truncate`."""
        assert self.can_truncate(length), f"cannot go back from {self._end} to {length} tokens"
        if length == 0:
            self.reset()
        self._end = length


class KvCache:
    """The caches of all layers, and how long the sequence in them is."""

    def __init__(self, layers: Sequence[LayerCache], *, context_tokens: int) -> None:
        self.layers = tuple(layers)
        self.context_tokens = context_tokens
        self.size_bytes = sum(layer.size_bytes for layer in layers)
        self.length = 0

    @classmethod
    def allocate(
        cls, spec: ModelSpec, *, context_tokens: int, block_tokens: int, device: torch.device
    ) -> Self:
        """Take the memory, all of it touched.

        Parameters
        ----------
        context_tokens
            The longest sequence.
        block_tokens
            The most tokens that are appended at a time.
        """
        elements = kv_bytes(spec, context_tokens, block_tokens) // DTYPE_BYTES[spec.dtype]
        memory = torch.empty(elements, dtype=TORCH_DTYPE[spec.dtype], device=device)
        memory.zero_()  # the sinks' rows; and the pages are taken now, not while generating
        layers = []
        for layer in spec.layers:
            attention = layer.attention
            capacity = kv_capacity_tokens(attention, context_tokens, block_tokens)
            count = capacity * attention.cache_width
            layers.append(
                LayerCache(
                    memory[:count],
                    _row_widths(attention),
                    capacity=capacity,
                    window=attention.window,
                    sinks=attention.sinks,
                )
            )
            memory = memory[count:]
        assert memory.numel() == 0, f"{memory.numel()} elements of the cache belong to no layer"
        return cls(layers, context_tokens=context_tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens that have gone through every layer."""
        self.length += tokens

    def can_truncate(self, length: int) -> bool:
        """Whether the first ``length`` tokens can be gone on from.

        Always for 0 and for the present length; a window may have passed on from others.
        """
        return all(layer.can_truncate(length) for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on. See :meth:`can_truncate`."""
        for layer in self.layers:
            layer.truncate(length)
        self.length = length


def _row_widths(attention: AttentionSpec) -> tuple[tuple[int, int], ...]:
    if attention.mla is not None:
        return ((1, attention.cache_width),)
    heads = attention.num_kv_heads
    return ((heads, attention.head_dim), (heads, attention.value_dim))
