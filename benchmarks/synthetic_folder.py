"""Writing a synthetic checkpoint as a folder of the kind that publishers provide.

Tensors are streamed into shards of bfloat16 (or float32); peak memory is a block of rows. The
folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from benchmarks.synthetic_tensors import END_ID, Shape, Tensor, tensors
from moepack.atomic import output_error, sync_folder
from moepack.errors import DiskFullError, OutputInUseError, UnsupportedModelError
from moepack.progress import NO_PROGRESS, Progress
from moepack.routing_model import RoutingModel
from moepack.safetensors_io import TensorSpan, encode_header
from moepack.shipped import shipped_model
from moepack.units import format_size

#: What was asked for, beside the weights.
RECIPE_FILE = "synthetic.json"

SHARD_BYTES = 2 << 30
_SPARE_BYTES = 64 << 20
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def write_checkpoint(
    config: Mapping[str, Any],
    model: RoutingModel,
    out: Path,
    *,
    seed: int = 0,
    dtype: str = "BF16",
    recipe: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a checkpoint whose routers behave as ``model`` says.

    Parameters
    ----------
    config
        As the publisher of a model has it.
    recipe
        For :data:`RECIPE_FILE`, beside what is known here.

    Raises
    ------
    UnsupportedModelError
        When no such checkpoint can be made.
    DiskFullError
        Before anything is written, where it does not fit.
    OutputInUseError
        When ``out`` exists.
    """
    shape = Shape.of(config)
    files = _tokenizer(shape.vocab) | _documents(config, dtype)
    listed = list(tensors(shape, model, seed))
    size_bytes = sum(_size_bytes(tensor, dtype) for tensor in listed)
    work = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        if out.exists():
            raise OutputInUseError(f"{out}: is there already; name another folder or delete it")
        out.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(out.parent).free
        if free_bytes < size_bytes + _SPARE_BYTES:
            raise DiskFullError(
                f"{out}: takes {format_size(size_bytes)}, {format_size(free_bytes)} are free; "
                "free some space, or cut the model with --layers"
            )
        work.mkdir()
        progress.start(f"write {out.name}", size_bytes)
        try:
            _write_shards(work, listed, dtype, shard_bytes, progress)
        finally:
            progress.done()
        told = {**(recipe or {}), "routing": model.name, "seed": seed}
        for name, document in {**files, RECIPE_FILE: told}.items():
            text = json.dumps(document, indent=2, ensure_ascii=False)
            (work / name).write_text(f"{text}\n", "utf-8")
        sync_folder(work)
        work.rename(out)
        sync_folder(out.parent)
    except OSError as failure:
        raise output_error(out, failure) from failure
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_shards(
    folder: Path, listed: Sequence[Tensor], dtype: str, limit_bytes: int, progress: Progress
) -> None:
    shards = list(_shards(listed, dtype, limit_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        spans, end_bytes = [], 0
        for tensor in shard:
            begin_bytes, end_bytes = end_bytes, end_bytes + _size_bytes(tensor, dtype)
            spans.append(TensorSpan(tensor.name, dtype, tensor.shape, begin_bytes, end_bytes))
        with (folder / name).open("xb") as file:
            file.write(encode_header(spans, {"format": "pt"}))
            for tensor in shard:
                _write_tensor(file, tensor, dtype, progress)
            file.flush()
            os.fsync(file.fileno())
    total_bytes = sum(_size_bytes(tensor, dtype) for tensor in listed)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    path = folder / "model.safetensors.index.json"
    path.write_text(f"{json.dumps(index, indent=2)}\n", "utf-8")


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: str, progress: Progress) -> None:
    for block in tensor.blocks():
        stored = torch.from_numpy(np.ascontiguousarray(block)).to(_DTYPES[dtype])
        file.write(stored.view(torch.uint8).numpy().data)
        progress.advance(stored.nbytes)


def _shards(listed: Iterable[Tensor], dtype: str, limit_bytes: int) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    held_bytes = 0
    for tensor in listed:
        size_bytes = _size_bytes(tensor, dtype)
        if held and held_bytes + size_bytes > limit_bytes:
            yield held
            held, held_bytes = [], 0
        held.append(tensor)
        held_bytes += size_bytes
    yield held


def _size_bytes(tensor: Tensor, dtype: str) -> int:
    return int(np.prod(tensor.shape)) * _DTYPES[dtype].itemsize


def _documents(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": END_ID, "pad_token_id": END_ID}
    stored = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {
        "config.json": {**config, **ends, "torch_dtype": stored},
        "generation_config.json": {**sampling, **ends},
    }


def _tokenizer(vocab: int) -> dict[str, Any]:
    """The shipped model's tokenizer, with made-up words up to the size of the vocabulary.

    Texts use the tokens that it has; the words are drawn by the model alone.
    """
    folder = shipped_model()
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    known: dict[str, int] = document["model"]["vocab"]
    if vocab < len(known):
        raise UnsupportedModelError(
            f"a vocabulary of {vocab}, expected at least the {len(known)} tokens of the tokenizer"
        )
    number = 0
    while len(known) < vocab:
        known.setdefault(_word(number), len(known))
        number += 1
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    return {"tokenizer.json": document, "tokenizer_config.json": settings}


def _word(number: int) -> str:
    """The n-th made-up word, a space before it: syllables that can be told apart."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    text = ""
    for _ in range(4):
        number, syllable = divmod(number, len(consonants) * len(vowels))
        consonant, vowel = divmod(syllable, len(vowels))
        text += consonants[consonant] + vowels[vowel]
    return f"\u0120{text}"
