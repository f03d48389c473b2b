"""Compute times of a model that has not been run on a machine, from the machine's rates.

Every piece takes ``max(bytes / memory bandwidth, flop / matmul rate) + launches * launch cost``:
bytes are the weights (and the part of the KV cache) that it reads, flop two for each weight and
token, the rate that of the machine's matmul curve at this number of tokens. What that leaves out
(norms, softmax, the allocator, kernels worse than the reference product) makes it an estimate from
below, which is why a plan made from it widens its band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime

from moepack.compute import COMPUTE_VERSION, ComputeProfile, Curve, LayerCompute
from moepack.hardware import HardwareProfile
from moepack.model_spec import DTYPE_BYTES, LayerSpec, ModelSpec

#: Where the curves have points.
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Context behind the one token whose attention is priced.
CONTEXT_TOKENS = 512

# Torch operations of each piece, counted in moepack_runtime.
_ATTENTION_LAUNCHES = 24
_ROUTER_LAUNCHES = 10
_SEGMENT_LAUNCHES = 8
_FFN_LAUNCHES = 5
_HEAD_LAUNCHES = 8


def derive_compute(
    spec: ModelSpec, hardware: HardwareProfile, *, context_tokens: int = CONTEXT_TOKENS
) -> ComputeProfile:
    """Estimate a model's compute times on a machine by the roofline above."""
    roofline = _Roofline(spec, hardware, context_tokens)
    kinds: dict[LayerSpec, list[int]] = {}
    for number, layer in enumerate(spec.layers):
        kinds.setdefault(layer, []).append(number)
    return ComputeProfile(
        version=COMPUTE_VERSION,
        model_name=spec.name,
        model_digest=spec.digest,
        device=hardware.device,
        threads=hardware.cores,
        source="derived",
        how=f"roofline from the rates of {hardware.name} ({hardware.source}); never run there",
        recorded_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        context_tokens=context_tokens,
        head_s=roofline.head_s(),
        spread=0.0,
        layers=tuple(roofline.layer(tuple(numbers)) for numbers in kinds.values()),
    )


@dataclasses.dataclass(frozen=True)
class _Roofline:
    spec: ModelSpec
    hardware: HardwareProfile
    context_tokens: int

    def layer(self, numbers: tuple[int, ...]) -> LayerCompute:
        """All layers of one kind, by the tensors of the first of them."""
        number = numbers[0]
        routed = self.spec.layers[number].moe is not None
        ffn = self._elements(f"layers.{number}.mlp.", f"layers.{number}.shared")
        return LayerCompute(
            layers=numbers,
            attention=_curve(lambda tokens: self._attention_s(number, tokens)),
            router=self._linear(self._elements(f"layers.{number}.router."), _ROUTER_LAUNCHES)
            if routed
            else None,
            expert=self._expert(number, segments=1) if routed else None,
            expert_split=self._expert(number, segments=2) if routed else None,
            ffn=self._linear(ffn, _FFN_LAUNCHES) if ffn else None,
        )

    def head_s(self) -> float:
        """Embedding, final norm, head and sampling of one token."""
        elements = self.spec.vocab_size * self.spec.hidden_size
        return self._seconds(1, elements, launches=_HEAD_LAUNCHES)

    def _expert(self, number: int, *, segments: int) -> Curve:
        elements = 3 * self.spec.moe(number).intermediate_size * self.spec.hidden_size
        return self._linear(elements, _SEGMENT_LAUNCHES * segments)

    def _linear(self, elements: int, launches: int) -> Curve:
        return _curve(lambda tokens: self._seconds(tokens, elements, launches=launches))

    def _attention_s(self, number: int, tokens: int) -> float:
        """One token behind the context, or a block at the beginning of a sequence."""
        attention = self.spec.layers[number].attention
        keys = tokens if tokens > 1 else self.context_tokens
        if attention.window is not None:
            keys = min(keys, attention.window)
        flop = 2 * tokens * keys * attention.num_heads * (attention.head_dim + attention.value_dim)
        if attention.mla is not None:
            # Keys and values of the whole context are expanded from the latent.
            flop += 2 * keys * self._elements(f"layers.{number}.attn.kv_b.")
        cache_bytes = keys * attention.cache_width * DTYPE_BYTES[self.spec.dtype]
        return self._seconds(
            tokens,
            self._elements(f"layers.{number}.attn."),
            more_flop=flop,
            more_bytes=cache_bytes,
            launches=_ATTENTION_LAUNCHES,
        )

    def _elements(self, *prefixes: str) -> int:
        """Weights of the trunk's matrices under any of these prefixes."""
        return sum(
            tensor.elements
            for tensor in self.spec.trunk
            if len(tensor.shape) == 2 and tensor.name.startswith(prefixes)
        )

    def _seconds(
        self, tokens: int, elements: int, *, launches: int, more_flop: int = 0, more_bytes: int = 0
    ) -> float:
        rate = self.hardware.matmul_curve(self.spec.dtype).flop_per_s(tokens)
        flop = 2 * tokens * elements + more_flop
        read_bytes = elements * DTYPE_BYTES[self.spec.dtype] + more_bytes
        bound_s = max(read_bytes / self.hardware.memory.bytes_per_s, flop / rate)
        return bound_s + launches * self.hardware.launch_s


def _curve(seconds: Callable[[int], float]) -> Curve:
    return Curve(TOKENS, tuple(seconds(tokens) for tokens in TOKENS))
