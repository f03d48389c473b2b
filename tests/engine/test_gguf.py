"""GGUF files hold a checkpoint's weights, rounded in the experts or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from benchmarks.gguf_kinds import KINDS
from benchmarks.gguf_text import text_of
from benchmarks.peer_model import PeerModel
from moepack.checkpoint import Checkpoint
from moepack.errors import CheckpointError, GroupMismatchError
from tests.support.tiny_models import TINY_MODELS, TinyModel, randomise

gguf = pytest.importorskip("gguf")
from benchmarks.gguf_export import (  # noqa: E402 - it needs gguf
    QuantiserError,
    expert_types,
    export,
    main,
    require_ours,
    trunk_types,
    write,
)

#: Of a block of 32 weights: the step between codes over the largest magnitude.
STEPS = {"Q8_0": 1 / 127, "Q4_0": 1 / 8}


def saved(tiny: TinyModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Checkpoint:
    model = transformers.AutoModelForCausalLM.from_config(tiny.config(), dtype=torch.float32)
    randomise(model, seed=3)
    model.to(dtype).save_pretrained(folder)
    return Checkpoint.open(folder)


def tiny_of(family: str, **changes: object) -> TinyModel:
    found = next(tiny for tiny in TINY_MODELS if tiny.key == f"{family}-plain")
    return dataclasses.replace(found, changes={**found.changes, **changes})


@pytest.mark.parametrize(
    "tiny",
    [tiny_of("olmoe"), tiny_of("qwen2_moe", mlp_only_layers=[]), tiny_of("qwen3_moe")],
    ids=lambda tiny: tiny.family,
)
def test_a_gguf_holds_the_very_weights(tiny: TinyModel, tmp_path: Path) -> None:
    checkpoint = saved(tiny, tmp_path / "model")
    out = tmp_path / "model.gguf"
    export(checkpoint, out)
    reader = gguf.GGUFReader(out)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert out.stat().st_size % 4096 == 0
    assert [path.name for path in tmp_path.glob("*.partial")] == []
    elements = sum(int(np.prod(tensor.shape)) for tensor in reader.tensors)
    assert elements == checkpoint.spec.total_parameters
    for layer in checkpoint.spec.moe_layers:
        for expert in range(checkpoint.spec.moe(layer).num_experts):
            weights = checkpoint.expert(layer, expert)
            for projection in ("gate", "up", "down"):
                stacked = tensors[f"blk.{layer}.ffn_{projection}_exps.weight"].data
                found = stacked[expert].view(np.uint16)
                np.testing.assert_array_equal(found, weights[f"{projection}.weight"])
    router = checkpoint.trunk_tensor("layers.1.router.weight").astype(np.uint32) << 16
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_gate_inp.weight"].data, router.view(np.float32)
    )
    embedding = tensors["token_embd.weight"].data.view(np.uint16)
    np.testing.assert_array_equal(embedding, checkpoint.trunk_tensor("embed.weight"))
    words = reader.fields["tokenizer.ggml.tokens"].contents()
    assert words[:3] == list(text_of([0, 1, 2]))
    assert len(words) == checkpoint.spec.vocab_size
    require_ours(out, checkpoint)
    other = saved(tiny_of("olmoe", vocab_size=64), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"weights_digest is .*, expected"):
        require_ours(out, other)


@pytest.mark.parametrize(
    ("tiny", "reason"),
    [
        (tiny_of("qwen2_moe"), "layer 0 has no routed experts"),
        (tiny_of("olmoe", clip_qkv=0.9), "layer 0 clamps its queries"),
        (tiny_of("qwen3_moe", norm_topk_prob=False), "normalises its weights otherwise"),
        (tiny_of("mixtral"), "is mixtral"),
    ],
    ids=["dense", "clamped", "normalised", "family"],
)
def test_a_graph_that_llama_cpp_lacks_is_refused(
    tiny: TinyModel, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        export(saved(tiny, tmp_path / "model"), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def float32(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def assert_within_a_step(tensor: Any, expert: int | None, bits: npt.NDArray[Any]) -> None:
    """Of a stacked tensor that of one expert, of any other the whole."""
    kind = tensor.tensor_type.name
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    blocks = float32(bits).reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) * STEPS[kind]
    off = np.abs((values if expert is None else values[expert]).reshape(-1, 32) - blocks)
    # Codes of 4 bits are -8 to 7, so what is as large as the largest but of the other sign is a
    # whole step off. The step itself is a float16.
    most = step if kind == "Q4_0" else step / 2
    assert (off <= most + np.abs(blocks) * 2.0**-11 + 1e-7).all()
    assert off.max() > 0, "something is rounded"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_are_rounded_within_a_step_and_nothing_else_is(kind: str, tmp_path: Path) -> None:
    checkpoint = saved(tiny_of("olmoe"), tmp_path / "model")
    exact, rounded = tmp_path / "exact.gguf", tmp_path / "rounded.gguf"
    export(checkpoint, exact)
    assert main([str(tmp_path / "model"), str(rounded), "--kind", kind]) == 0
    require_ours(rounded, checkpoint)
    before, after = tensors_of(exact), tensors_of(rounded)
    assert list(before) == list(after)
    assert set(expert_types(rounded)) == {kind}
    for name, tensor in after.items():
        if "_exps." not in name:
            assert tensor.tensor_type == before[name].tensor_type
            np.testing.assert_array_equal(tensor.data, before[name].data)
    for layer in checkpoint.spec.moe_layers:
        for projection in ("gate", "up", "down"):
            found = after[f"blk.{layer}.ffn_{projection}_exps.weight"]
            for expert in range(checkpoint.spec.moe(layer).num_experts):
                weights = checkpoint.expert(layer, expert)
                assert_within_a_step(found, expert, weights[f"{projection}.weight"])


#: Of a trunk with shared experts: our matrices and the GGUF's.
TRUNK = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    **{
        f"layers.1.{own}.weight": f"blk.1.{theirs}.weight"
        for own, theirs in {
            "attn.q": "attn_q",
            "attn.k": "attn_k",
            "attn.v": "attn_v",
            "attn.o": "attn_output",
            "shared.gate": "ffn_gate_shexp",
            "shared.up": "ffn_up_shexp",
            "shared.down": "ffn_down_shexp",
        }.items()
    },
}


@pytest.mark.parametrize("kind", ["BF16", "Q4_0"])
def test_a_trunk_is_rounded_within_a_step_and_nothing_else_is(kind: str, tmp_path: Path) -> None:
    changes = {"mlp_only_layers": [], "shared_expert_intermediate_size": 128}
    checkpoint = saved(tiny_of("qwen2_moe", **changes), tmp_path / "model")
    plain, rounded = tmp_path / "plain.gguf", tmp_path / "rounded.gguf"
    export(checkpoint, plain, KINDS[kind])
    options = ["--kind", kind, "--trunk", "Q8_0"]
    assert main([str(tmp_path / "model"), str(rounded), *options]) == 0
    require_ours(rounded, checkpoint)
    assert set(trunk_types(plain)) == {"BF16"}
    assert set(trunk_types(rounded)) == {"Q8_0"}
    assert trunk_types(rounded).total() == trunk_types(plain).total()
    assert set(expert_types(rounded)) == {kind}
    before, after = tensors_of(plain), tensors_of(rounded)
    assert list(before) == list(after)
    for own, theirs in TRUNK.items():
        assert_within_a_step(after[theirs], None, checkpoint.trunk_tensor(own))
    changed = {name for name in after if after[name].tensor_type != before[name].tensor_type}
    layers = len(checkpoint.spec.layers)
    assert len(changed) == 2 + layers * (len(TRUNK) - 2)
    assert changed.issuperset(TRUNK.values())
    for name in set(after) - changed:
        np.testing.assert_array_equal(after[name].data, before[name].data)


def test_files_of_another_trunk_have_names_of_their_own(tmp_path: Path) -> None:
    saved(tiny_of("olmoe"), tmp_path / "model")
    model = PeerModel(tmp_path / "model", tmp_path)
    kinds = [KINDS["Q8_0"], KINDS["Q8_0"].with_trunk("Q8_0"), KINDS["Q4_0"].with_trunk("Q8_0")]
    made = [model.gguf(kind) for kind in kinds]
    assert sorted(tmp_path.glob("*.gguf")) == sorted(made)
    moved = [path.rename(tmp_path / f"{number}") for number, path in enumerate(made)]
    assert [model.gguf(kind, moved) for kind in kinds] == moved, "given ones are told apart"
    assert not list(tmp_path.glob("*.gguf"))


def test_a_kind_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    narrow = saved(tiny_of("olmoe", hidden_size=48, intermediate_size=96), tmp_path / "model")
    refused = {
        "blk.0.ffn_gate_exps.weight": KINDS["Q8_0"],
        "token_embd.weight": KINDS["BF16"].with_trunk("Q8_0"),
    }
    for name, kind in refused.items():
        with pytest.raises(GroupMismatchError, match=f"{name}: rows of 48 weights, .* 32 for Q8_0"):
            export(narrow, tmp_path / "model.gguf", kind)
    assert not list(tmp_path.glob("*.gguf"))


def quantiser(folder: Path, script: str) -> Path:
    """Stands for llama-quantize; its last three arguments are source, result and kind."""
    program = folder / "llama-quantize"
    program.write_text(f"#!/bin/bash\nfrom=${{@: -3:1}}; to=${{@: -2:1}}\n{script}\n")
    program.chmod(0o755)
    return program


def test_other_kinds_are_left_to_llama_quantize(tmp_path: Path) -> None:
    checkpoint = saved(tiny_of("olmoe"), tmp_path / "model")
    out = tmp_path / "out.gguf"
    with pytest.raises(QuantiserError, match="Q4_K needs llama-quantize"):
        write(checkpoint, out, KINDS["Q4_K"])
    failing = quantiser(tmp_path, "echo no such type; exit 3")
    with pytest.raises(QuantiserError, match="exit code 3: no such type"):
        write(checkpoint, out, KINDS["Q4_K"], quantiser=failing)
    assert not out.exists()
    copying = quantiser(tmp_path, 'cp "$from" "$to"; echo "$@" > "$to.told"')
    write(checkpoint, out, KINDS["Q4_K"], quantiser=copying)
    told = (tmp_path / "out.partial.told").read_text()
    assert told.endswith("Q4_K_S\n")
    assert "--pure" in told
    assert "--token-embedding-type bf16 --output-tensor-type bf16" in told
    assert "--tensor-type attn=bf16 --tensor-type shexp=bf16" in told
    assert set(expert_types(out)) == {"BF16"}, "what it stored is read from the file"
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.gguf", "out.partial.told"]
    write(checkpoint, out, KINDS["Q4_K"].with_trunk("Q8_0"), quantiser=copying)
    told = (tmp_path / "out.partial.told").read_text()
    assert "bf16" not in told
    assert told.count("q8_0") == 4
