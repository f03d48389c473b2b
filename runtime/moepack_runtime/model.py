"""The decoder, built from a :class:`~moepack.model_spec.ModelSpec`.

Everything but the routed experts: embedding, attention, norms, routers, dense and shared FFNs,
head. Nothing here knows where experts come from; the engine walks the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from moepack.model_spec import ActivationSpec, LayerSpec, ModelSpec
from moepack_runtime.attention import Attention, GroupedQueryAttention, Here
from moepack_runtime.ffn import FfnWeights, activate, gated_ffn
from moepack_runtime.kv_cache import KvCache, LayerCache
from moepack_runtime.latent_attention import LatentAttention
from moepack_runtime.norms import read_norm
from moepack_runtime.rope import RotaryEmbedding
from moepack_runtime.router import Router, Routing
from moepack_runtime.weights import TORCH_DTYPE, ExactLinear, Linear, Weights


class DecoderLayer:
    """One layer without its routed experts.

    A step of a layer is ``x = attend(x, start)``, then ``h = mlp_norm(x)``, and ``x`` plus either
    ``dense(h)`` or the experts of ``route(h)`` and ``shared(h)``.
    """

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, weights: Weights, attention: Attention
    ) -> None:
        self._attention = attention
        self._attn_norm = read_norm(spec.norm, weights.within("attn_norm"), spec.norm_eps)
        #: Norm before the second half: [tokens, hidden] to the same.
        self.mlp_norm = read_norm(spec.norm, weights.within("mlp_norm"), spec.norm_eps)
        self._router: Router | None = None
        self._ffn: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._shared_gate: Linear | None = None
        if layer.moe is None:
            dense = ActivationSpec(layer.dense_activation)
            self._ffn = _read_ffn(weights.within("mlp"), dense)
            return
        self._router = Router(layer.moe, weights.within("router"))
        if layer.moe.shared_intermediate_size:
            self._ffn = _read_ffn(weights.within("shared"), layer.moe.activation_spec)
        if layer.moe.shared_gate:
            self._shared_gate = weights.linear("shared_gate")

    def attend(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """The first half, the residual included.

        Parameters
        ----------
        x
            [tokens, hidden], the tokens from position ``start`` on. Their keys and values join
            the cache: each block of a sequence passes once, in order.
        """
        return x + self._attention(self._attn_norm(x), start)

    @property
    def is_recordable(self) -> bool:
        """Whether there is :meth:`attend_at`."""
        return self._attention.is_recordable

    def attend_at(self, x: torch.Tensor, here: Here) -> torch.Tensor:
        """:meth:`attend` of one token, wherever ``here`` will be, for a step that is replayed."""
        return x + self._attention.at(self._attn_norm(x), here)

    @property
    def has_experts(self) -> bool:
        """Whether the second half is one of routed experts."""
        return self._router is not None

    def route(self, x: torch.Tensor) -> Routing:
        """The experts of each token, from the normed [tokens, hidden]."""
        assert self._router is not None, "a dense layer routes nothing"
        return self._router.route(x)

    def rank(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        """The ``depth`` best liked experts of each token, best first: int64 [tokens, depth]."""
        assert self._router is not None, "a dense layer ranks nothing"
        return self._router.rank(x, depth)

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        """Output of the shared expert, gated where it is; None where there is none."""
        if self._ffn is None:
            return None
        output = self._ffn(x)
        if self._shared_gate is not None:
            output.mul_(self._shared_gate(x).sigmoid_())
        return output

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the FFN of a layer without experts."""
        assert self._ffn is not None, "a layer of experts has no dense FFN"
        return self._ffn(x)


class Head:
    """What is behind the last layer: final norm and head."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        self._norm = read_norm(spec.norm, weights.within("norm"), spec.norm_eps)
        self._linear = weights.linear("embed" if spec.tied_embeddings else "head", "head.bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to float32 [tokens, vocab]."""
        return self._linear(self._norm(x)).float()


class Decoder:
    """The trunk of a model over a cache.

    Copies no weights: peak memory is the trunk, the cache, and the temporaries of one block.

    Parameters
    ----------
    trunk : mapping of str to Tensor
        Names of :func:`moepack.trunk.stored_trunk`; on one device.

    Raises
    ------
    ContextLengthError
        When the cache is longer than the model's rotary embedding can go.
    """

    def __init__(self, spec: ModelSpec, trunk: Mapping[str, torch.Tensor], kv: KvCache) -> None:
        weights = Weights(trunk)
        self._device = weights["embed.weight"].device
        self._embedding = weights.embedding("embed", TORCH_DTYPE[spec.dtype])
        self._head = Head(spec, weights)
        self._kv = kv
        self._ropes: dict[tuple[int, int], RotaryEmbedding] = {}
        self.layers = tuple(
            DecoderLayer(
                spec, layer, scope, self._build_attention(spec, layer, scope.within("attn"), cache)
            )
            for layer, scope, cache in zip(
                spec.layers,
                (weights.within(f"layers.{number}") for number in range(len(spec.layers))),
                kv.layers,
                strict=True,
            )
        )

    def _build_attention(
        self, spec: ModelSpec, layer: LayerSpec, weights: Weights, cache: LayerCache
    ) -> Attention:
        attention = layer.attention
        if attention.mla is not None:
            rope = self._rope(spec, attention.mla.rope_dim, attention.rotary_dim)
            return LatentAttention(attention, attention.mla, weights, rope=rope, cache=cache)
        return GroupedQueryAttention(
            attention,
            weights,
            rope=self._rope(spec, attention.head_dim, attention.rotary_dim),
            cache=cache,
            norm_eps=spec.norm_eps,
        )

    def _rope(self, spec: ModelSpec, head_dim: int, rotary_dim: int) -> RotaryEmbedding:
        """One for all layers of equal widths, so that they share the angles of a step."""
        key = (head_dim, rotary_dim)
        if key not in self._ropes:
            self._ropes[key] = RotaryEmbedding(
                spec.rope,
                head_dim=head_dim,
                rotary_dim=rotary_dim,
                context_tokens=self._kv.context_tokens,
                device=self._device,
            )
        return self._ropes[key]

    @property
    def ropes(self) -> Collection[RotaryEmbedding]:
        """The rotary embeddings of all layers, each once."""
        return self._ropes.values()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Begin a pass behind what is in the cache.

        Parameters
        ----------
        ids
            int64 [tokens]: all tokens of the pass, however it is cut into blocks.

        Returns
        -------
        Tensor
            [tokens, hidden].
        """
        for rope in self._ropes.values():
            rope.begin_pass(self._kv.length + ids.shape[0])
        return self._embedding(ids)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and head: [tokens, hidden] to float32 [tokens, vocab]."""
        return self._head(x)


def _read_ffn(
    weights: Weights, activation: ActivationSpec
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A dense or shared FFN: [tokens, hidden] to the same."""
    gate, up, down = (weights.linear(name) for name in ("gate", "up", "down"))
    match gate, up, down:
        case ExactLinear(), ExactLinear(), ExactLinear():
            exact = FfnWeights(gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias)
            return lambda x: gated_ffn(x, exact, activation)
        case _:
            return lambda x: down(activate(gate(x), up(x), activation))
