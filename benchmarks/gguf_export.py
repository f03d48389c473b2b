"""A GGUF of the very weights of a checkpoint, for llama.cpp and those that came from it.

    python -m benchmarks.gguf_export MODEL OUT.gguf
    python -m benchmarks.gguf_export MODEL OUT.gguf --kind Q4_K --llama-quantize PATH
    python -m benchmarks.gguf_export MODEL OUT.gguf --kind Q4_0 --trunk Q8_0

Matrices keep their bfloat16 bits; norms, biases and routers become float32, as llama.cpp's own
conversion does. Of another kind than BF16 the routed experts are rounded and nothing else is, as in
a moepack pack: Q8_0 and Q4_0 by gguf's own writer, Q4_K by llama.cpp's ``llama-quantize`` from the
file in BF16 (``--source``, or one that is made and removed). With ``--trunk Q8_0`` so are all other
matrices but the routers: embeddings, head, attention and shared experts.

The vocabulary is artificial: token ``i`` is the one character ``U+10000 + i``, so that a text gives
exactly the prompt's tokens, and what is printed says which tokens were drawn. Such a file is for
measuring and for nothing else. OLMoE, Qwen2-MoE and Qwen3-MoE.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np

from benchmarks.gguf_kinds import BF16, KINDS, TRUNKS, Kind
from benchmarks.gguf_tensors import PROJECTIONS, Tensor, architecture, stored, tensors
from benchmarks.gguf_text import FIRST_CHARACTER, VOCABULARY
from benchmarks.setting import named
from moepack.atomic import sync_folder
from moepack.checkpoint import Checkpoint
from moepack.errors import CheckpointError, MoepackError
from moepack.segments import align_up

#: Where the file says that its vocabulary is this one, and of which weights it is.
VOCABULARY_KEY = "moepack.vocabulary"
WEIGHTS_KEY = "moepack.weights_digest"

_FILE_ALIGNMENT = 4096  # so that a block device over the file has no ragged end

#: In the names of tensors: of stacked routed experts, and of routers.
_EXPERTS, _ROUTER = "_exps.", "ffn_gate_inp."


class QuantiserError(MoepackError):
    """llama-quantize is not there, or did not go through."""


def export(checkpoint: Checkpoint, out: Path, kind: Kind = BF16) -> None:
    """Write the GGUF. Peak memory: three times the largest tensor of the trunk, or an expert.

    It appears whole or not at all.

    Raises
    ------
    CheckpointError
        When llama.cpp's graph of the architecture cannot compute this variant of it.
    GroupMismatchError
        When a matrix does not divide into the kind's blocks.
    """
    assert kind.ours, f"{kind.name} is for llama-quantize to write"
    spec = checkpoint.spec
    graph = architecture(spec)
    wanted = list(tensors(spec, kind))
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, graph)
    _describe(writer, checkpoint, kind)
    for tensor in wanted:
        # The shape is in weights whatever they are stored in, which it is not for bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, tensor.kind
        )
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    _write_tensors(checkpoint, wanted, partial, writer.data_alignment)
    partial.replace(out)
    sync_folder(out.parent)


def requantise(quantiser: Path | None, source: Path, out: Path, kind: Kind) -> None:
    """Have llama-quantize round a file in BF16. The result appears whole or not at all.

    Where a matrix does not divide into the kind's blocks llama-quantize takes another one that it
    does divide into; :func:`expert_types` and :func:`trunk_types` say which.

    Raises
    ------
    QuantiserError
        When it is not there, or says why not.
    """
    if quantiser is None:
        raise QuantiserError(f"{kind.name} needs llama-quantize; give llama.cpp's folder")
    partial = out.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    command = [str(quantiser), *_told(kind), str(source), str(partial), kind.file]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode or not partial.exists():
        said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        raise QuantiserError(f"{quantiser}: exit code {done.returncode}: {said[-1]}")
    with partial.open("r+b") as file:
        file.truncate(align_up(partial.stat().st_size, _FILE_ALIGNMENT))
    partial.replace(out)
    sync_folder(out.parent)


def _told(kind: Kind) -> Iterator[str]:
    """What llama-quantize is told, so that the experts and nothing else become what it says last.

    It leaves routers and norms as they are.
    """
    yield "--pure"  # without which some matrices get more bits than the kind has
    trunk = kind.trunk.lower()
    yield from ("--token-embedding-type", trunk, "--output-tensor-type", trunk)
    for part in ("attn", "shexp"):
        yield from ("--tensor-type", f"{part}={trunk}")


def expert_types(path: Path) -> Counter[str]:
    """What the routed experts of a file are really stored in: weights of each type."""
    return _types(path, lambda name: _EXPERTS in name)


def trunk_types(path: Path) -> Counter[str]:
    """The same of all other matrices but the routers."""
    return _types(path, lambda name: _EXPERTS not in name and _ROUTER not in name)


def _types(path: Path, wanted: Callable[[str], bool]) -> Counter[str]:
    found: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1 and wanted(tensor.name):
            found[tensor.tensor_type.name] += int(tensor.n_elements)
    return found


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


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint, kind: Kind) -> None:
    """Hyperparameters and vocabulary."""
    spec = checkpoint.spec
    attention, moe = spec.layers[0].attention, spec.moe(0)
    writer.add_name(spec.name)
    writer.add_string(VOCABULARY_KEY, VOCABULARY)
    writer.add_string(WEIGHTS_KEY, checkpoint.weights_digest)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.file}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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


def _write_tensors(
    checkpoint: Checkpoint, wanted: Sequence[Tensor], path: Path, alignment: int
) -> None:
    """The data behind the header, each tensor on its boundary, the experts of a layer in passing.

    An expert is read once, and its three matrices go to where they belong.
    """
    end = align_up(path.stat().st_size, alignment)
    with path.open("r+b") as file:
        stacked: dict[str, int] = {}
        for tensor in wanted:
            offset, end = end, align_up(end + tensor.size_bytes, alignment)
            if tensor.experts is None:
                file.seek(offset)
                stored(checkpoint.trunk_tensor(tensor.source), tensor.kind).tofile(file)
                continue
            layer, projection = tensor.experts
            stacked[projection] = offset
            if len(stacked) < len(PROJECTIONS):
                continue
            for expert in range(tensor.shape[0]):
                weights = checkpoint.expert(layer, expert)
                for projection, start in stacked.items():
                    data = stored(weights[f"{projection}.weight"], tensor.kind)
                    file.seek(start + expert * data.nbytes)
                    data.tofile(file)
            stacked.clear()
        file.truncate(align_up(end, _FILE_ALIGNMENT))


def write(
    checkpoint: Checkpoint,
    out: Path,
    kind: Kind,
    *,
    quantiser: Path | None = None,
    source: Path | None = None,
) -> None:
    """Write a GGUF of any kind.

    Parameters
    ----------
    source
        The same weights in BF16, where llama-quantize is to round them; None: made, and removed.

    Raises
    ------
    CheckpointError, GroupMismatchError, QuantiserError
        When it cannot be written.
    """
    if kind.ours:
        export(checkpoint, out, kind)
    elif source is not None or quantiser is None:
        requantise(quantiser, source or out, out, kind)
    else:
        made = out.with_suffix(".BF16")
        try:
            export(checkpoint, made)
            requantise(quantiser, made, out, kind)
        finally:
            made.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the GGUF of a checkpoint's folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a checkpoint's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="BF16", help="of the routed experts")
    parser.add_argument(
        "--trunk", choices=TRUNKS, default="BF16", help="of all other matrices but the routers"
    )
    parser.add_argument("--llama-quantize", type=Path, metavar="PATH", help="for Q4_K")
    parser.add_argument("--source", type=Path, metavar="PATH", help="for Q4_K: a file in BF16")
    return named(_run, parser.parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    checkpoint, kind = Checkpoint.open(args.model), KINDS[args.kind].with_trunk(args.trunk)
    write(checkpoint, args.out, kind, quantiser=args.llama_quantize, source=args.source)
    return 0


if __name__ == "__main__":
    sys.exit(main())
