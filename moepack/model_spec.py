"""What a model is, in the field's standard terms: enough to plan it, pack it and run it.

A :class:`ModelSpec` is made from ``config.json`` and the safetensors headers alone (see
:mod:`moepack.families`, where foreign names end). It describes; it holds no weights.

Canonical tensor names
----------------------
The trunk (everything that is not a routed expert), ``{i}`` being the decoder's layer number::

    embed.weight                      [vocab, hidden]
    norm.weight, norm.bias            [hidden]                 the final norm
    head.weight, head.bias            [vocab, hidden], [vocab] absent when tied to embed
    layers.{i}.attn_norm.{weight,bias}, layers.{i}.mlp_norm.{weight,bias}      [hidden]
    layers.{i}.attn.{q,k,v,o}.{weight,bias}
    layers.{i}.attn.{q_norm,k_norm}.weight
    layers.{i}.attn.sinks             [heads]
    layers.{i}.attn.q_a.{weight,bias}, .q_a_norm.weight, .q_b.weight           MLA
    layers.{i}.attn.kv_a.{weight,bias}, .kv_a_norm.weight, .kv_b.weight        MLA
    layers.{i}.mlp.{gate,up,down}.weight                                       dense layers
    layers.{i}.router.{weight,bias}, layers.{i}.router.correction_bias
    layers.{i}.shared.{gate,up,down}.weight, layers.{i}.shared_gate.weight     [1, hidden]

Routed experts (``F`` the intermediate size; all linear weights are [out, in])::

    layers.{i}.experts.{e}.gate.{weight,bias}    [F, hidden], [F]
    layers.{i}.experts.{e}.up.{weight,bias}      [F, hidden], [F]
    layers.{i}.experts.{e}.down.{weight,bias}    [hidden, F], [hidden]
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from moepack.records import digest, record

#: Bytes of one element of each dtype that moepack reads, by its safetensors name.
DTYPE_BYTES: dict[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "clamped_swiglu"]
RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


@record
class TensorInfo:
    """Name, dtype (as safetensors spells it) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.elements * DTYPE_BYTES[self.dtype]


@record
class RopeSpec:
    """Rotary position embedding.

    ``interleaved``: pairs are neighbours (0, 1), (2, 3) ... rather than halves. The remaining
    fields are the parameters of the scaling named by ``kind`` and are ``None`` where it has none;
    their formulas are those of the papers (YaRN arXiv 2309.00071, LongRoPE arXiv 2402.13753).
    """

    theta: float
    kind: RopeKind = "default"
    interleaved: bool = False
    factor: float | None = None
    original_context: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    short_mscale: float | None = None
    long_mscale: float | None = None

    @property
    def switch_tokens(self) -> int | None:
        """Length beyond which LongRoPE takes other frequencies for every position; else None."""
        return self.original_context if self.kind == "longrope" else None


@record
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds the latent."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int


@record
class AttentionSpec:
    """One layer's attention.

    Attributes
    ----------
    head_dim, value_dim : int
        Width of a head's query and key, and of its value.
    rotary_dim : int
        How many leading dimensions of each head are rotated (all of ``mla.rope_dim`` for MLA);
        0 for none.
    scale : float
        Factor on the scores, scaling of the rotary embedding included.
    window : int or None
        A token attends to itself and the ``window - 1`` tokens before it.
    qk_norm : {"none", "head", "full"}
        RMS norm of queries and keys: per head, or over all heads together.
    clip : float or None
        Queries, keys and values are clamped to [-clip, clip].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    scale: float
    window: int | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    clip: float | None = None
    mla: MlaSpec | None = None

    @property
    def cache_width(self) -> int:
        """Elements that one token leaves in this layer's cache."""
        if self.mla is not None:
            return self.mla.kv_rank + self.mla.rope_dim
        return self.num_kv_heads * (self.head_dim + self.value_dim)


@record
class RouterSpec:
    """How a token chooses its experts, and with what weights.

    Attributes
    ----------
    scoring : {"softmax", "sigmoid", "topk_softmax", "sparsemixer"}
        ``topk_softmax`` takes the softmax over the chosen logits alone (GPT-OSS); ``sparsemixer``
        is PhiMoE's (arXiv 2409.12136), with ``jitter`` as its threshold.
    normalise : bool
        Weights of the chosen experts are divided by their sum.
    correction_bias : bool
        A bias that counts for the choice and not for the weights (DeepSeek-V3).
    num_groups, top_groups : int
        Experts are chosen within the best ``top_groups`` of ``num_groups`` groups; 1, 1: none.
    group_score : {"max", "top2_sum"}
        The score of a group.
    masked_score : float
        What a score outside the chosen groups is set to: 0 or -inf; it matters where fewer than
        ``top_k`` scores inside are larger.
    scaling : float
        Factor on the weights.
    float32 : bool
        The logits are computed in float32, whatever the dtype of the model.
    """

    scoring: Literal["softmax", "sigmoid", "topk_softmax", "sparsemixer"] = "softmax"
    normalise: bool = False
    bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    masked_score: Literal["zero", "minus_inf"] = "zero"
    scaling: float = 1.0
    jitter: float = 0.0
    float32: bool = False


@record
class ActivationSpec:
    """What a gated FFN does between its two products, with the parameters of ``clamped_swiglu``."""

    kind: Activation = "silu"
    alpha: float = 0.0
    limit: float = 0.0


@record
class MoeSpec:
    """The mixture-of-experts half of a layer.

    ``shared_intermediate_size`` is 0 where there is no shared expert; ``shared_gate`` weighs the
    shared expert by a sigmoid (Qwen2-MoE). ``activation_alpha`` (a) and ``activation_limit`` (l)
    belong to ``clamped_swiglu``: (clamp(up, -l, l) + 1) * g * sigmoid(a * g), g = min(gate, l).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    router: RouterSpec
    activation: Activation = "silu"
    activation_alpha: float = 0.0
    activation_limit: float = 0.0
    expert_bias: bool = False
    shared_intermediate_size: int = 0
    shared_gate: bool = False

    @property
    def activation_spec(self) -> ActivationSpec:
        """The activation of every routed and shared expert."""
        return ActivationSpec(self.activation, self.activation_alpha, self.activation_limit)


@record
class LayerSpec:
    """One decoder layer: attention, then either a dense FFN or a mixture of experts."""

    attention: AttentionSpec
    moe: MoeSpec | None
    dense_intermediate_size: int | None
    dense_activation: Activation = "silu"


@record
class ModelSpec:
    """A mixture-of-experts decoder.

    Attributes
    ----------
    name : str
        What the user called it (a folder's name or a hub id): for people, not part of the digest.
    family, architecture : str
        Row of the families' table, and the class that the configuration names.
    dtype : str
        Dtype of the routed experts and of the activations, as safetensors spells it; where the
        checkpoint is quantised, what it is dequantised to.
    context_length : int
        The longest sequence that the model was made for.
    trunk : tuple of TensorInfo
        Every trunk tensor under its canonical name, in the order of the trunk shard.
    unused : tuple of str
        Source tensors that are known and not needed (multi-token-prediction layers).
    """

    name: str
    family: str
    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    context_length: int
    norm: Norm
    norm_eps: float
    tied_embeddings: bool
    rope: RopeSpec
    layers: tuple[LayerSpec, ...]
    trunk: tuple[TensorInfo, ...]
    head_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Identity of the model's structure: two models with equal digests can share plans."""
        return digest(dataclasses.replace(self, name="", unused=()))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The decoder's numbers of the layers that have routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.moe is not None)

    def moe(self, layer: int) -> MoeSpec:
        """The mixture of experts of a layer that has one."""
        moe = self.layers[layer].moe
        assert moe is not None, f"layer {layer} has no routed experts"
        return moe

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one whole routed expert of a layer, in the model's dtype."""
        moe = self.moe(layer)
        elements = 3 * moe.intermediate_size * self.hidden_size
        if moe.expert_bias:
            elements += 2 * moe.intermediate_size + self.hidden_size
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def experts_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(self.moe(i).num_experts * self.expert_bytes(i) for i in self.moe_layers)

    @property
    def trunk_bytes(self) -> int:
        """Bytes of everything that is not a routed expert."""
        return sum(tensor.size_bytes for tensor in self.trunk)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.trunk_bytes + self.experts_bytes

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        routed = self.experts_bytes // DTYPE_BYTES[self.dtype]
        return routed + sum(tensor.elements for tensor in self.trunk)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token touches (trunk, and top-k experts a layer)."""
        routed = sum(self.moe(i).top_k * self.expert_bytes(i) for i in self.moe_layers)
        trunk = sum(tensor.elements for tensor in self.trunk)
        return trunk + routed // DTYPE_BYTES[self.dtype]
