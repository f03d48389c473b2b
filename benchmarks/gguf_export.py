"""A GGUF of the very weights of a checkpoint, for llama.cpp and those that came from it.

    python -m benchmarks.gguf_export MODEL OUT.gguf

Matrices keep their bfloat16 bits; norms, biases and routers become float32, as llama.cpp's own
conversion does. The vocabulary is artificial: token ``i`` is the one character ``U+10000 + i``, so
that a text gives exactly the prompt's tokens, and what is printed says which tokens were drawn.
Such a file is for measuring and for nothing else. OLMoE, Qwen2-MoE and Qwen3-MoE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from benchmarks.gguf_text import FIRST_CHARACTER, VOCABULARY
from moepack.atomic import sync_folder
from moepack.checkpoint import Checkpoint
from moepack.errors import CheckpointError, MoepackError
from moepack.model_spec import ModelSpec
from moepack.segments import align_up

#: Where the file says that its vocabulary is this one, and of which weights it is.
VOCABULARY_KEY = "moepack.vocabulary"
WEIGHTS_KEY = "moepack.weights_digest"

_FILE_ALIGNMENT = 4096  # so that a block device over the file has no ragged end

_BF16 = gguf.GGMLQuantizationType.BF16
_F32 = gguf.GGMLQuantizationType.F32


class _Family(NamedTuple):
    """What llama.cpp's graph of an architecture takes for granted."""

    architecture: str
    normalises: bool


_FAMILIES = {
    "olmoe": _Family("olmoe", normalises=False),
    "qwen2_moe": _Family("qwen2moe", normalises=False),
    "qwen3_moe": _Family("qwen3moe", normalises=True),
}

#: Our module of a layer -> its name in a GGUF.
_MODULES = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "router": "ffn_gate_inp",
    "shared.gate": "ffn_gate_shexp",
    "shared.up": "ffn_up_shexp",
    "shared.down": "ffn_down_shexp",
    "shared_gate": "ffn_gate_inp_shexp",
}
_TOP = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_FLOAT32_MODULES = ("router", "shared_gate")
_PROJECTIONS = ("gate", "up", "down")


class _Tensor(NamedTuple):
    """One tensor of the file: read when it is written.

    ``experts`` is the (layer, projection) of one that is stacked of all experts, else None.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    source: str
    experts: tuple[int, str] | None = None

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape)) * (2 if self.kind is _BF16 else 4)


def export(checkpoint: Checkpoint, out: Path) -> None:
    """Write the GGUF. Peak memory: the largest tensor of the trunk, or an expert.

    It appears whole or not at all.

    Raises
    ------
    CheckpointError
        When llama.cpp's graph of the architecture cannot compute this variant of it.
    """
    spec = checkpoint.spec
    _require_known(spec)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, _FAMILIES[spec.family].architecture)
    _describe(writer, checkpoint)
    tensors = list(_tensors(spec))
    for tensor in tensors:
        dtype = np.dtype(np.uint16 if tensor.kind is _BF16 else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.size_bytes, tensor.kind)
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    _write_tensors(checkpoint, tensors, partial, writer.data_alignment)
    partial.replace(out)
    sync_folder(out.parent)


def require_ours(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse a GGUF that is not of this checkpoint, or has a vocabulary of its own.

    Raises
    ------
    CheckpointError
        When the same prompt would not be the same tokens, or the weights are others.
    """
    fields = gguf.GGUFReader(path).fields
    for key, expected in ((VOCABULARY_KEY, VOCABULARY), (WEIGHTS_KEY, checkpoint.weights_digest)):
        found = fields[key].contents() if key in fields else None
        if found != expected:
            raise CheckpointError(
                f"{path}: {key} is {found}, expected {expected}; write the file with "
                "python -m benchmarks.gguf_export from this checkpoint"
            )


def _require_known(spec: ModelSpec) -> None:
    """Refuse what llama.cpp's graphs leave out."""
    family = _FAMILIES.get(spec.family)
    if family is None:
        raise CheckpointError(
            f"{spec.name} is {spec.family}; a GGUF can be written for {', '.join(_FAMILIES)}"
        )
    for number, layer in enumerate(spec.layers):
        reasons = {
            "has no routed experts": layer.moe is None,
            "has a sliding window": layer.attention.window is not None,
            "clamps its queries": layer.attention.clip is not None,
            "has an output bias": layer.attention.output_bias,
        }
        if layer.moe is not None:
            router = layer.moe.router
            reasons["normalises its weights otherwise"] = router.normalise != family.normalises
        for reason, holds in reasons.items():
            if holds:
                raise CheckpointError(
                    f"{spec.name}: layer {number} {reason}, which llama.cpp does not compute for "
                    f"{family.architecture}; measure a model without that"
                )
    if spec.rope.kind != "default":
        raise CheckpointError(
            f"{spec.name}: rotary embedding of kind {spec.rope.kind}; only the default is written"
        )
    if spec.dtype != "BF16":
        raise CheckpointError(f"{spec.name} is stored in {spec.dtype}, expected BF16")


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """Hyperparameters and vocabulary."""
    spec = checkpoint.spec
    attention, moe = spec.layers[0].attention, spec.moe(0)
    writer.add_name(spec.name)
    writer.add_string(VOCABULARY_KEY, VOCABULARY)
    writer.add_string(WEIGHTS_KEY, checkpoint.weights_digest)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(spec.context_length)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(moe.intermediate_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.value_dim)
    writer.add_rope_dimension_count(attention.rotary_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_feed_forward_length(moe.intermediate_size)
    if moe.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(moe.shared_intermediate_size)
    count = spec.vocab_size
    end = spec.eos_token_ids[0] if spec.eos_token_ids else 0
    writer.add_tokenizer_model("llama")
    writer.add_token_list([chr(FIRST_CHARACTER + token) for token in range(count)])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_bos_token_id(end if spec.bos_token_id is None else spec.bos_token_id)
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _tensors(spec: ModelSpec) -> Iterator[_Tensor]:
    """Everything in the order of the layers, as the model is walked through."""
    hidden = spec.hidden_size
    for info in spec.trunk:
        module, leaf = info.name.rsplit(".", 1)
        if module in _TOP:
            yield _tensor(f"{_TOP[module]}.{leaf}", info.shape, info.name, module)
            continue
        _, number, inner = module.split(".", 2)
        shape = info.shape[1:] if inner == "shared_gate" else info.shape
        yield _tensor(f"blk.{number}.{_MODULES[inner]}.{leaf}", shape, info.name, inner)
        if inner != "router":
            continue
        moe = spec.moe(int(number))
        experts, width = moe.num_experts, moe.intermediate_size
        for projection in _PROJECTIONS:
            matrix = (hidden, width) if projection == "down" else (width, hidden)
            yield _Tensor(
                f"blk.{number}.ffn_{projection}_exps.weight",
                (experts, *matrix),
                _BF16,
                info.name,
                (int(number), projection),
            )


def _tensor(name: str, shape: tuple[int, ...], source: str, module: str) -> _Tensor:
    plain = len(shape) == 1 or module in _FLOAT32_MODULES
    return _Tensor(name, shape, _F32 if plain else _BF16, source)


def _write_tensors(
    checkpoint: Checkpoint, tensors: Sequence[_Tensor], path: Path, alignment: int
) -> None:
    """The data behind the header, each tensor on its boundary, the experts of a layer in passing.

    An expert is read once, and its three matrices go to where they belong.
    """
    end = align_up(path.stat().st_size, alignment)
    with path.open("r+b") as file:
        stacked: dict[str, int] = {}
        for tensor in tensors:
            offset, end = end, align_up(end + tensor.size_bytes, alignment)
            if tensor.experts is None:
                found = checkpoint.trunk_tensor(tensor.source)
                data = _as_float32(found) if tensor.kind is _F32 else _as_bf16(found)
                file.seek(offset)
                data.tofile(file)
                continue
            layer, projection = tensor.experts
            stacked[projection] = offset
            if len(stacked) < len(_PROJECTIONS):
                continue
            for expert in range(tensor.shape[0]):
                weights = checkpoint.expert(layer, expert)
                for projection, start in stacked.items():
                    data = _as_bf16(weights[f"{projection}.weight"])
                    file.seek(start + expert * data.nbytes)
                    data.tofile(file)
            stacked.clear()
        file.truncate(align_up(end, _FILE_ALIGNMENT))


def _as_bf16(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.uint16]:
    if bits.dtype != np.uint16:
        raise CheckpointError(f"a matrix is stored in {bits.dtype}, expected bfloat16")
    return bits.astype(np.uint16, copy=False)


def _as_float32(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the GGUF of a checkpoint's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    try:
        export(Checkpoint.open(args.model), args.out)
    except MoepackError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
