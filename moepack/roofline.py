"""Compute times of a model that has not been run on a machine, from the machine's rates.

A piece of a layer takes the sum over its matrix products, plus so many launches of small
operations, plus attention over the cache:

- a product takes what one with as many weights took where the machine was measured
  (:meth:`moepack.hardware.HardwareProfile.product_seconds`); of a preset it takes
  ``max(bytes / memory bandwidth, flop / matmul rate) + launch``;
- a product with quantised weights takes, for a few tokens in bfloat16 on a processor, as long as
  one with as many bytes of plain weights, or ``weights * tokens / kernel rate``; else they are
  dequantised first: ``bytes moved / memory bandwidth + launches``, stated below for each encoding;
- attention of one token takes ``cache bytes / attention's rate of bytes``, that of a block
  ``flop / attention's rate of flop``; flop are two for each channel, head, token and row.

What that leaves out (weights that some cache holds, cores that wait for one another) goes either
way; ``moepack profile`` prints these times beside the measured ones, and a plan made from them
widens its band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from moepack.compute import (
    COMPUTE_VERSION,
    ComputeProfile,
    Curve,
    LayerCompute,
    QuantisedExpert,
    RoundedLayer,
)
from moepack.compute_rounds import worthwhile_threads
from moepack.encodings import ENCODINGS, Encoding, fitting
from moepack.hardware import HardwareProfile
from moepack.model_spec import DTYPE_BYTES, LayerSpec, ModelSpec, TensorInfo
from moepack.trunk import is_rounded
from moepack.working_memory import dequantised_rows

#: Where the curves have points.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Context behind the one token whose attention is priced.
CONTEXT_TOKENS = 512

# Torch operations of each piece beside its products, counted in moepack_runtime.
_ATTENTION_LAUNCHES = 36
_ROUTER_LAUNCHES = 9
_SEGMENT_LAUNCHES = 4
_GATHER_LAUNCHES = 6  # an expert's tokens of several: taken out, filled up, added back
_PASS_LAUNCHES = 12
_FFN_LAUNCHES = 5
_HEAD_LAUNCHES = 8

#: Up to how many tokens torch's kernels multiply with quantised weights, by the kind of encoding;
#: the numbers of moepack_runtime.quantised.
KERNEL_TOKENS = {"int8": 32, "int4": 80}

# Weights times tokens that the kernels take in a second on one thread: with AVX-512, 31 to 47 G.
_KERNEL_RATE = 35e9

# The one encoding that a trunk may have.
_ROUNDED = "INT8"

# What dequantising one weight reads and writes, in bytes, and how many operations a part of a
# matrix takes: counted in moepack_runtime.quantised.
_DEQUANTISED_BYTES = {"int8": 19, "int4": 23}
_DEQUANTISE_LAUNCHES = {"int8": 6, "int4": 25}


def derive_compute(
    spec: ModelSpec, hardware: HardwareProfile, *, context_tokens: int = CONTEXT_TOKENS
) -> ComputeProfile:
    """Estimate a model's compute times on a machine by the roofline above.

    With as many threads as are worthwhile, of the numbers whose rates the machine's profile has.
    """
    return worthwhile_threads(
        spec,
        [
            _derive(_Roofline(spec, hardware, context_tokens, threads))
            for threads in hardware.thread_counts
        ],
    )


def _derive(roofline: _Roofline) -> ComputeProfile:
    spec, hardware = roofline.spec, roofline.hardware
    kinds: dict[LayerSpec, list[int]] = {}
    for number, layer in enumerate(spec.layers):
        kinds.setdefault(layer, []).append(number)
    return ComputeProfile(
        version=COMPUTE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        device=hardware.device,
        threads=roofline.threads,
        source="derived",
        how=f"roofline from the rates of {hardware.name} ({hardware.source}); never run there",
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        context_tokens=roofline.context_tokens,
        head_s=roofline.head_s(),
        spread=0.0,
        layers=tuple(roofline.layer(tuple(numbers)) for numbers in kinds.values()),
        rounded_head_s=roofline.head_s(_ROUNDED),
    )


@dataclasses.dataclass(frozen=True)
class _Roofline:
    spec: ModelSpec
    hardware: HardwareProfile
    context_tokens: int
    threads: int

    def layer(self, numbers: tuple[int, ...]) -> LayerCompute:
        """All layers of one kind, by the tensors of the first of them."""
        number = numbers[0]
        routed = self.spec.layers[number].moe is not None
        ffn = self._matrices(f"layers.{number}.mlp.", f"layers.{number}.shared")
        router = self._matrices(f"layers.{number}.router.")
        return LayerCompute(
            layers=numbers,
            attention=_curve(lambda tokens: self._attention_s(number, tokens)),
            router=self._linear(router, _ROUTER_LAUNCHES) if routed else None,
            expert=self._expert(number, segments=1) if routed else None,
            expert_split=self._expert(number, segments=2) if routed else None,
            quantised=self._quantised(number) if routed else (),
            ffn=self._linear(ffn, _FFN_LAUNCHES) if ffn else None,
            rounded=RoundedLayer(
                _curve(lambda tokens: self._attention_s(number, tokens, _ROUNDED)),
                self._linear(ffn, _FFN_LAUNCHES, _ROUNDED) if ffn else None,
            ),
            fixed=self._linear((), _PASS_LAUNCHES) if routed else None,
        )

    def head_s(self, trunk: str = "") -> float:
        """Embedding, final norm, head and sampling of one token."""
        name = "embed.weight" if self.spec.tied_embeddings else "head.weight"
        return self._trunk_s(1, self._matrices(name), trunk, launches=_HEAD_LAUNCHES)

    def _quantised(self, number: int) -> tuple[QuantisedExpert, ...]:
        """In every encoding that fits."""
        width = self.spec.moe(number).intermediate_size
        return tuple(
            QuantisedExpert(
                name,
                self._expert(number, segments=1, stored=ENCODINGS[name]),
                self._expert(number, segments=2, stored=ENCODINGS[name]),
            )
            for name in fitting(self.spec.hidden_size, width)
        )

    def _expert(self, number: int, *, segments: int, stored: Encoding | None = None) -> Curve:
        """Gate and up are one product of a segment, down is another."""
        neurons = -(-self.spec.moe(number).intermediate_size // segments)
        hidden = self.spec.hidden_size
        shapes = [(2 * neurons, hidden), (hidden, neurons)] * segments

        def seconds(tokens: int) -> float:
            each = _SEGMENT_LAUNCHES + (_GATHER_LAUNCHES if tokens > 1 else 0)
            launches_s = segments * each * self.hardware.launch_s
            return launches_s + sum(self._product_s(tokens, *shape, stored) for shape in shapes)

        return _curve(seconds)

    def _product_s(self, tokens: int, outputs: int, inputs: int, stored: Encoding | None) -> float:
        """One product with a matrix [outputs, inputs] in an encoding; None: the model's dtype."""
        elements = outputs * inputs
        if stored is None:
            return self._seconds(tokens, [elements])
        by_kernel = self.hardware.device == "cpu" and self.spec.dtype == "BF16"
        if by_kernel and tokens <= KERNEL_TOKENS[stored.kind]:
            share = stored.bytes_per_weight(inputs) / DTYPE_BYTES[self.spec.dtype]
            read_s = self._seconds(1, [round(share * elements)])
            return max(read_s, elements * tokens / (_KERNEL_RATE * self.threads))
        parts = -(-outputs // dequantised_rows(inputs))
        moved_bytes = elements * _DEQUANTISED_BYTES[stored.kind]
        return (
            moved_bytes / self.hardware.memory.bytes_per_s
            + parts * _DEQUANTISE_LAUNCHES[stored.kind] * self.hardware.launch_s
            + self._seconds(tokens, [elements])
        )

    def _linear(self, matrices: Sequence[TensorInfo], launches: int, trunk: str = "") -> Curve:
        return _curve(lambda tokens: self._trunk_s(tokens, matrices, trunk, launches=launches))

    def _trunk_s(
        self, tokens: int, matrices: Sequence[TensorInfo], trunk: str = "", *, launches: int = 0
    ) -> float:
        """Products with matrices of a trunk that is stored so."""
        seconds = launches * self.hardware.launch_s
        for info in matrices:
            outputs, inputs = info.shape
            stored = ENCODINGS[trunk] if trunk and is_rounded(info, trunk) else None
            seconds += self._product_s(tokens, outputs, inputs, stored)
        return seconds

    def _attention_s(self, number: int, tokens: int, trunk: str = "") -> float:
        """One token behind the context, or a block at the beginning of a sequence."""
        spec = self.spec.layers[number].attention
        rows = tokens if tokens > 1 else self.context_tokens
        if spec.window is not None:
            rows = min(rows, spec.window)
        prefix = f"layers.{number}.attn."
        seconds = self._trunk_s(tokens, self._matrices(prefix), trunk, launches=_ATTENTION_LAUNCHES)
        rate = self.hardware.attention_rate(self.spec.dtype, self.threads)
        width, shared = spec.head_dim + spec.value_dim, spec.num_heads > spec.num_kv_heads
        mla = spec.mla
        if mla is not None:
            # As moepack_runtime decides: short blocks attend among latents, long ones expand them.
            latent = 2 * (mla.kv_rank + mla.rope_dim)
            expanding = mla.kv_rank * (mla.nope_dim + spec.value_dim)
            if tokens * latent < 2 * tokens * spec.head_dim + expanding:
                width, shared = latent, True
            else:
                kv_b = self._matrices(f"{prefix}kv_b.")
                seconds += self._trunk_s(rows, kv_b) - self._trunk_s(tokens, kv_b)
        if tokens == 1:
            cache_bytes = rows * spec.cache_width * DTYPE_BYTES[self.spec.dtype]
            read = rate.grouped_bytes_per_s if shared else rate.cache_bytes_per_s
            return seconds + cache_bytes / read
        return seconds + 2 * tokens * rows * spec.num_heads * width / rate.block_flop_per_s

    def _matrices(self, *prefixes: str) -> list[TensorInfo]:
        """The trunk's matrices under any of these prefixes."""
        return [
            tensor
            for tensor in self.spec.trunk
            if len(tensor.shape) == 2 and tensor.name.startswith(prefixes)
        ]

    def _seconds(self, tokens: int, matrices: Sequence[int], *, launches: int = 0) -> float:
        dtype, threads = self.spec.dtype, self.threads
        products_s = (
            self.hardware.product_seconds(dtype, tokens, elements, threads) for elements in matrices
        )
        return sum(products_s) + launches * self.hardware.launch_s


def _curve(seconds: Callable[[int], float]) -> Curve:
    return Curve(TOKENS, tuple(seconds(tokens) for tokens in TOKENS))
