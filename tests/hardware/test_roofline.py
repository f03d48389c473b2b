from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from moepack_runtime.quantised import INT4_KERNEL_TOKENS, INT8_KERNEL_TOKENS

from moepack.errors import ProfileError
from moepack.hardware import HardwareProfile, find_hardware
from moepack.model_spec import AttentionSpec, LayerSpec, MlaSpec, ModelSpec, TensorInfo
from moepack.rates import AttentionRate, MatmulCurve, MatmulPoint, MemoryRate
from moepack.roofline import KERNEL_TOKENS, TOKENS, derive_compute
from moepack.trunk import rounded_matrices
from tests.pack.fake_models import make_spec

#: A gigabyte and a teraflop a second, nothing else.
PLAIN = dataclasses.replace(
    find_hardware("cpu-sata"),
    memory=MemoryRate(1e9, 0.0),
    launch_s=1e-12,
    matmul=(MatmulCurve("BF16", 8, 8, (MatmulPoint(1, 1e12, 0.0),)),),
)


def with_launch(seconds: float) -> HardwareProfile:
    return dataclasses.replace(PLAIN, launch_s=seconds)


def model() -> ModelSpec:
    """One dense and two MoE layers: experts of 3 x 480 x 320, queries of 320 x 320."""
    spec = make_spec(hidden=320, width=480, vocab=1000)
    trunk = list(spec.trunk)
    for layer in range(3):
        trunk.append(TensorInfo(f"layers.{layer}.attn.q.weight", "BF16", (320, 320)))
        trunk.append(TensorInfo(f"layers.{layer}.attn.q.bias", "BF16", (320,)))
    trunk.append(TensorInfo("layers.0.mlp.up.weight", "BF16", (960, 320)))
    return dataclasses.replace(spec, trunk=tuple(trunk))


def test_one_token_costs_reading_the_weights() -> None:
    profile = derive_compute(model(), PLAIN, context_tokens=0)
    dense, moe = profile.layers
    assert dense.layers == (0,)
    assert moe.layers == (1, 2)
    assert dense.ffn is not None
    assert moe.expert is not None
    assert moe.router is not None
    assert moe.attention.at(1) == pytest.approx(2 * 320 * 320 / 1e9)
    assert moe.expert.at(1) == pytest.approx(2 * 3 * 480 * 320 / 1e9)
    assert moe.router.at(1) == pytest.approx(2 * 3 * 320 / 1e9, rel=1e-3)
    assert dense.ffn.at(1) == pytest.approx(2 * 960 * 320 / 1e9)
    assert profile.head_s == pytest.approx(2 * 1000 * 320 / 1e9)
    assert (dense.router, dense.expert, moe.ffn) == (None, None, None)


def test_many_tokens_cost_arithmetic() -> None:
    moe = derive_compute(model(), slow()).layers[1]
    assert moe.expert is not None
    assert moe.expert.at(512) == pytest.approx(2 * 512 * 3 * 480 * 320 / 1e9)


def test_context_costs_reading_the_cache() -> None:
    spec = model()
    short = derive_compute(spec, PLAIN, context_tokens=0).layers[1].attention.at(1)
    long = derive_compute(spec, PLAIN, context_tokens=10_000).layers[1].attention.at(1)
    cache_bytes = 10_000 * spec.layers[1].attention.cache_width * 2
    assert long - short == pytest.approx(cache_bytes / 1e9)


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    spec = model()
    window = dataclasses.replace(spec.layers[1].attention, window=100)
    layers = tuple(dataclasses.replace(layer, attention=window) for layer in spec.layers)
    windowed = dataclasses.replace(spec, layers=layers)
    far = derive_compute(windowed, PLAIN, context_tokens=10_000).layers[1].attention.at(1)
    near = derive_compute(spec, PLAIN, context_tokens=100).layers[1].attention.at(1)
    assert far == pytest.approx(near)


def latent_attention(tokens: int, context_tokens: int) -> float:
    """Seconds of attention over latents of 24 + 8, at a gigaflop and a gigabyte a second."""
    latent = AttentionSpec(2, 2, 24, 16, 8, 0.2, mla=MlaSpec(None, 24, 16, 8))
    spec = model()
    layers = tuple(LayerSpec(latent, layer.moe, 960) for layer in spec.layers)
    trunk = (*spec.trunk, TensorInfo("layers.1.attn.kv_b.weight", "BF16", (64, 24)))
    mla = dataclasses.replace(spec, layers=layers, trunk=trunk)
    profile = derive_compute(mla, slow(), context_tokens=context_tokens)
    return next(entry for entry in profile.layers if 1 in entry.layers).attention.at(tokens)


def slow(flop_per_s: float = 1e9) -> HardwareProfile:
    """A gigaflop a second, if nothing else is said."""
    curve = MatmulCurve("BF16", 8, 8, (MatmulPoint(1, flop_per_s, 0.0),))
    return dataclasses.replace(PLAIN, matmul=(curve,))


def test_one_token_attends_among_latents_and_expands_none() -> None:
    further_s = latent_attention(1, 2000) - latent_attention(1, 1000)
    assert further_s == pytest.approx(1000 * (24 + 8) * 2 / 1e9)  # reads them, no more


def test_a_long_block_expands_its_latents_and_a_short_one_does_not() -> None:
    weights = 320 * 320 + 64 * 24
    for tokens, width in ((512, 24 + 16), (8, 2 * (24 + 8))):
        flop = 2 * tokens * weights + 2 * tokens * tokens * 2 * width
        assert latent_attention(tokens, 512) == pytest.approx(flop / 1e9)


def test_attention_takes_its_own_rates_where_they_are_known() -> None:
    known = dataclasses.replace(PLAIN, attention=(AttentionRate("BF16", 1e8, 2e8, 1e9, 0.0),))
    spec = model()
    attention = spec.layers[1].attention
    assert (attention.num_heads, attention.num_kv_heads) == (2, 1)
    own = dataclasses.replace(attention, num_kv_heads=2)
    layers = tuple(dataclasses.replace(layer, attention=own) for layer in spec.layers)
    for several, rate in ((spec, 2e8), (dataclasses.replace(spec, layers=layers), 1e8)):
        one, plain = (
            derive_compute(several, profile, context_tokens=1000).layers[1].attention.at(1)
            for profile in (known, PLAIN)
        )
        cache_bytes = 1000 * several.layers[1].attention.cache_width * 2
        assert one - plain == pytest.approx(cache_bytes / rate - cache_bytes / 1e9)
    block, plain = (
        derive_compute(spec, profile).layers[1].attention.at(512) for profile in (known, PLAIN)
    )
    width = attention.head_dim + attention.value_dim
    flop = 2 * 512 * 512 * attention.num_heads * width
    assert block - plain == pytest.approx(flop / 1e9 - flop / 1e12)


def test_as_many_threads_are_taken_as_are_worthwhile() -> None:
    def rates(threads: int, flop_per_s: float) -> MatmulCurve:
        return MatmulCurve("BF16", 8, 8, (MatmulPoint(1, flop_per_s, 0.0),), threads)

    # From memory that is never waited for, so that the products decide.
    fast = dataclasses.replace(PLAIN, memory=MemoryRate(1e15, 0.0))
    little = dataclasses.replace(fast, matmul=(rates(1, 1e9), rates(6, 1.1e9)))
    much = dataclasses.replace(fast, matmul=(rates(1, 1e9), rates(6, 5e9)))
    assert derive_compute(model(), little).threads == 1
    assert derive_compute(model(), much).threads == 6
    assert derive_compute(model(), PLAIN).threads == PLAIN.cores


def test_few_tokens_cost_reading_the_codes_and_as_many_bytes_as_they_are() -> None:
    fast = slow(flop_per_s=1e15)
    moe = derive_compute(model(), fast).layers[1]
    for name, bits in (("INT8", 8.0), ("INT4_G32", 5.0)):
        for cut in (False, True):
            # Scales of INT8: 2 bytes to every 320 or 480 weights, or to a half of these.
            seconds = 3 * 480 * 320 * bits / 8 / 1e9
            assert moe.expert_times(name, cut=cut).at(1) == pytest.approx(seconds, rel=0.01)
    with pytest.raises(ProfileError, match="no times of experts in INT4_G64, it has INT8, INT4_G3"):
        moe.expert_times("INT4_G64", cut=False)


def test_many_tokens_cost_dequantising_as_well() -> None:
    moe = derive_compute(model(), slow()).layers[1]
    assert moe.expert is not None
    for item in moe.quantised:
        further_s = item.whole.at(512) - moe.expert.at(512)
        assert 3 * 480 * 320 * 10e-9 < further_s < 3 * 480 * 320 * 30e-9, "so many bytes a weight"


def test_other_dtypes_and_devices_have_no_kernel_and_dequantise() -> None:
    gpu = derive_compute(model(), find_hardware("rtx-4090")).layers[1]
    wide = derive_compute(dataclasses.replace(model(), dtype="F32"), PLAIN).layers[1]
    for moe in (gpu, wide):
        assert moe.expert is not None
        assert all(item.whole.at(1) > moe.expert.at(1) for item in moe.quantised)


def test_the_kernels_tokens_are_those_of_the_runtime() -> None:
    assert KERNEL_TOKENS == {"int8": INT8_KERNEL_TOKENS, "int4": INT4_KERNEL_TOKENS}


def test_two_segments_cost_their_launches_twice_and_their_bytes_once() -> None:
    moe = derive_compute(model(), with_launch(1e-3)).layers[1]
    plain = derive_compute(model(), PLAIN).layers[1]
    assert moe.expert is not None
    assert moe.expert_split is not None
    assert plain.expert is not None
    launches_s = moe.expert.at(1) - plain.expert.at(1)
    assert launches_s > 1e-3
    assert moe.expert_split.at(1) - plain.expert.at(1) == pytest.approx(2 * launches_s)


def test_the_profile_says_that_it_was_derived_and_from_what() -> None:
    profile = derive_compute(model(), find_hardware("rtx-4090"))
    assert profile.source == "derived"
    assert profile.model_digest == model().digest
    assert profile.device == "cuda"
    assert "rtx-4090 (preset); never run there" in profile.how
    assert profile.layers[0].attention.tokens == TOKENS
    for entry in profile.layers:
        blocks = entry.attention.seconds[1:]  # the first point is behind a context, these are not
        assert all(more > 0.999 * less for less, more in pairwise(blocks))


def test_a_rounded_trunk_reads_fewer_bytes_and_nothing_else_changes() -> None:
    """One token on a machine where memory is all that takes time."""
    spec = model()
    found = derive_compute(spec, PLAIN, context_tokens=0)
    rounded = found.with_trunk("INT8")
    codes = rounded_matrices(spec, "INT8")
    assert {info.name for info in codes} >= {"layers.1.attn.q.weight"}
    for number in (0, 1):
        prefix = f"layers.{number}.attn."
        saved = sum(
            info.elements * 2 - (info.elements + 2 * info.shape[0])
            for info in codes
            if info.name.startswith(prefix)
        )
        exact_s = found.layer(number).attention.at(1)
        assert exact_s - rounded.layer(number).attention.at(1) == pytest.approx(
            saved / 1e9, rel=1e-4
        )
    assert rounded.layer(1).router == found.layer(1).router
    assert rounded.layer(1).expert == found.layer(1).expert
