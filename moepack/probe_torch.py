"""Measuring what torch makes of a device: its memory, launches, matrix products, attention.

What is run is what the runtime runs, and in rounds: a round takes every figure once, so that the
spread over several says how much the machine varies in seconds, not in microseconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from moepack.rates import AttentionRate, MatmulCurve, MatmulPoint, MemoryRate
from moepack.timing import Timing, measure, rounded, summarise
from moepack.units import MIB

if TYPE_CHECKING:
    import torch

#: Rows (and columns) of the weights, those of small models and of large ones, and at each the
#: numbers of tokens at which products are timed.
MATMUL_TOKENS = {
    128: (1, 8, 64, 512),
    512: (1, 8, 64, 512),
    2048: (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}

#: Tokens behind which one token attends, and of the block that attends to itself.
CONTEXT_TOKENS = 2048
BLOCK_TOKENS = 512

# Weights (and caches) are taken in turn from so much memory, so that no cache holds the next ones.
_MEMORY_BYTES = 512 * MIB
_FILL_BYTES = 16 * MIB

# Keys and values of four heads, seen by one query head each or by a group of four.
_KV_HEADS = 4
_GROUP = 4
_HEADS = _KV_HEADS * _GROUP
_HEAD_DIM = 128

# Seconds for one figure of a round. What is timed at once is short: where other work takes its turn
# on the cores, a median of short timings is one without it.
_LIMIT_S = 0.03
_LAUNCH_REPEATS = 5

Dtype = Literal["BF16", "F32"]
DTYPES: tuple[Dtype, ...] = ("BF16", "F32")


class TorchProbe:
    """Rounds of measurements on one device. Takes half a gigabyte of its memory."""

    def __init__(self, place: torch.device) -> None:
        import torch

        self._place = place
        self._memory = _random_memory(place)
        self._synchronize: Callable[[], None] | None = None
        most = torch.get_num_threads()
        self._threads = sorted({1, most}) if place.type == "cpu" else [most]
        # A GPU is given several at a time, or the waiting for it would be what is timed.
        self._batch = 1
        if place.type == "cuda":
            self._synchronize = torch.cuda.synchronize
            self._batch = 20
        self._rounds_s: defaultdict[tuple[object, ...], list[float]] = defaultdict(list)

    def round(self) -> None:
        """Take every figure once: with all threads and, where that is another number, with one."""
        import torch

        try:
            with torch.inference_mode():
                values = self._memory.view(torch.float32)
                self._time("memory", work=values.sum)
                torch.set_num_threads(self._threads[0])
                self._time("launch", work=_small_operations(self._place))
                for threads in self._threads:
                    torch.set_num_threads(threads)
                    for dtype in DTYPES:
                        self._time_products(threads, dtype)
                        for group in (1, _GROUP):
                            work = self._attend_one(dtype, group)
                            self._time(threads, dtype, group, work=work)
                        self._time(threads, dtype, "block", work=self._attend_block(dtype))
        finally:
            torch.set_num_threads(self._threads[-1])

    def _time_products(self, threads: int, dtype: Dtype) -> None:
        for width, counts in MATMUL_TOKENS.items():
            weights = cycle(self._pieces(dtype, width, width))
            for tokens in counts:
                work = _product(self._inputs(dtype, tokens, width), weights, self._batch)
                self._time(threads, dtype, width, tokens, work=work)

    def memory(self) -> MemoryRate:
        """Bandwidth of reading: a sum, which does next to nothing else."""
        timing = self._summary("memory")
        rate = self._memory.nbytes / timing.median_s
        return MemoryRate(rounded(rate), rounded(timing.spread))

    def launch(self) -> Timing:
        """Seconds of one operation on next to no data, called from Python, on one thread."""
        timing = self._summary("launch")
        count = _LAUNCH_REPEATS * _SMALL_OPERATIONS
        return timing._replace(median_s=rounded(timing.median_s / count))

    def matmul(self) -> tuple[MatmulCurve, ...]:
        """Products, each with weights that no cache holds."""
        return tuple(
            self._curve(threads, dtype, width)
            for threads in self._threads
            for dtype in DTYPES
            for width in MATMUL_TOKENS
        )

    def attention(self) -> tuple[AttentionRate, ...]:
        """Of one token over a context that no cache holds, and of a block over itself."""
        return tuple(
            self._attention_rate(threads, dtype) for threads in self._threads for dtype in DTYPES
        )

    def _attention_rate(self, threads: int, dtype: Dtype) -> AttentionRate:
        one, grouped, block = (
            self._summary(threads, dtype, figure) for figure in (1, _GROUP, "block")
        )
        itemsize = _torch_dtype(dtype).itemsize
        cache_bytes = self._batch * 2 * CONTEXT_TOKENS * _KV_HEADS * _HEAD_DIM * itemsize
        flop = self._batch * 4 * BLOCK_TOKENS * BLOCK_TOKENS * _HEADS * _HEAD_DIM
        return AttentionRate(
            dtype=dtype,
            cache_bytes_per_s=rounded(cache_bytes / one.median_s),
            grouped_bytes_per_s=rounded(cache_bytes / grouped.median_s),
            block_flop_per_s=rounded(flop / block.median_s),
            spread=rounded(max(one.spread, grouped.spread, block.spread)),
            threads=threads,
        )

    def _curve(self, threads: int, dtype: Dtype, width: int) -> MatmulCurve:
        points = []
        for tokens in MATMUL_TOKENS[width]:
            timing = self._summary(threads, dtype, width, tokens)
            rate = 2 * tokens * width * width * self._batch / timing.median_s
            points.append(MatmulPoint(tokens, rounded(rate), rounded(timing.spread)))
        return MatmulCurve(dtype, width, width, tuple(points), threads)

    def _time(self, *figure: object, work: Callable[[], object]) -> None:
        timing = measure(work, repeats=200, limit_s=_LIMIT_S, synchronize=self._synchronize)
        self._rounds_s[figure].append(timing.median_s)

    def _summary(self, *figure: object) -> Timing:
        return summarise(self._rounds_s[figure])

    def _pieces(self, dtype: Dtype, *shape: int) -> Sequence[torch.Tensor]:
        """The memory as tensors of a shape, as many as fit, one behind the other."""
        count = math.prod(shape)
        values = self._memory.view(_torch_dtype(dtype))
        return values[: len(values) // count * count].view(-1, *shape).unbind()

    def _inputs(self, dtype: Dtype, *shape: int) -> torch.Tensor:
        values = self._memory.view(_torch_dtype(dtype))
        return values[: math.prod(shape)].view(shape).clone()

    def _attend_one(self, dtype: Dtype, group: int) -> Callable[[], None]:
        """As the runtime does it: the heads of a group are the rows of one product."""
        import torch

        caches = cycle(self._pieces(dtype, 1, _KV_HEADS, CONTEXT_TOKENS, _HEAD_DIM))
        query = self._inputs(dtype, 1, _KV_HEADS, group, _HEAD_DIM)

        def work() -> None:
            for _ in range(self._batch):
                torch.nn.functional.scaled_dot_product_attention(query, next(caches), next(caches))

        return work

    def _attend_block(self, dtype: Dtype) -> Callable[[], None]:
        import torch

        block = self._inputs(dtype, _HEADS, 1, BLOCK_TOKENS, _HEAD_DIM)

        def work() -> None:
            for _ in range(self._batch):
                torch.nn.functional.scaled_dot_product_attention(
                    block, block, block, is_causal=True
                )

        return work


def _random_memory(place: torch.device) -> torch.Tensor:
    """Memory such as the runtime keeps experts in, filled with ordinary numbers.

    They are ordinary both in BF16 and in F32, so that neither is slowed down by what it reads.
    """
    import torch
    from moepack_runtime.direct_io import allocate

    filling = torch.randn(_FILL_BYTES // 2, device=place).bfloat16().view(torch.uint8)
    if place.type == "cuda":
        return filling.repeat(_MEMORY_BYTES // _FILL_BYTES)
    memory = allocate(_MEMORY_BYTES)
    memory.view(-1, _FILL_BYTES).copy_(filling)
    return memory


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    import torch

    return {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]


def _product(
    inputs: torch.Tensor, weights: Iterator[torch.Tensor], count: int
) -> Callable[[], None]:
    import torch

    def work() -> None:
        for _ in range(count):
            torch.nn.functional.linear(inputs, next(weights))

    return work


_SMALL_OPERATIONS = 10


def _small_operations(place: torch.device) -> Callable[[], None]:
    """The kinds of operation that a layer has beside its products, on one token's worth of data."""
    import torch

    x = torch.ones(1, 256, dtype=torch.bfloat16, device=place)
    weight = torch.ones(256, dtype=torch.bfloat16, device=place)
    total = torch.zeros(1, 256, device=place)

    def work() -> None:
        for _ in range(_LAUNCH_REPEATS):
            normed = torch.nn.functional.rms_norm(x, (256,), weight, 1e-6)
            half, other = normed.view(2, 128).chunk(2)
            torch.nn.functional.silu(half).mul_(other)
            turned = torch.cat((other, half)).view(1, 256)
            total.add_(turned, alpha=0.5)
            x.copy_(turned)
            torch.softmax(total, -1)

    return work
