"""A Hugging Face checkpoint, local or on the hub: its spec from headers, its tensors as a stream.

Tensors come as numpy bit patterns, in the dtype that the model has, and need no torch: it is the
one they are stored in, or for FP8 and MXFP4 what :mod:`moepack.source_formats` makes of them. The
files are read by position; nothing is mapped and nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moepack import families, hub, source_files, source_formats, source_headers
from moepack.errors import CheckpointError, ModelNotFoundError, UnsupportedEncodingError
from moepack.families import TensorSource
from moepack.model_spec import ModelSpec
from moepack.progress import NO_PROGRESS, Progress
from moepack.segments import Bits
from moepack.source_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    FolderFiles,
    ModelFiles,
)
from moepack.source_formats import SourceSize, StoredTensor
from moepack.source_headers import TensorHeader

#: What a running model needs beside its weights, where a checkpoint has it.
AUXILIARY_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)

_SAMPLE_BYTES = 256
_THREADS = 8


class Checkpoint:
    """A model as its publisher stores it. Made by :meth:`open`.

    Attributes
    ----------
    name : str
        The hub id, or the folder's name.
    folder : Path or None
        Where the weights are; None where only headers were fetched.
    config, generation_config : mapping
        The parsed JSON files; the second is empty where there is none.
    shards : tuple of str
        Names of the files that hold the weights.
    headers : mapping
        Every tensor of the files under its source name.
    tensors : mapping
        The same as the model has them: codes and their scales are one.
    spec : ModelSpec
    """

    def __init__(self, source: ModelFiles, folder: Path | None) -> None:
        self.name = source.name
        self.folder = folder
        self.config = _read_json(source, CONFIG_FILE)
        self.generation_config = (
            _read_json(source, GENERATION_FILE) if GENERATION_FILE in source.files else {}
        )
        what = f"{self.name}: {CONFIG_FILE}"
        families.find_family(self.config, what)  # before the headers: they may be many megabytes
        # Used by who runs the model, after hours of packing; refused now.
        families.stop_ids(self.generation_config, f"{self.name}: {GENERATION_FILE}")
        self.headers: Mapping[str, TensorHeader] = _read_headers(source)
        self.shards = tuple(sorted({header.file for header in self.headers.values()}))
        self.tensors: Mapping[str, StoredTensor] = source_formats.stored_tensors(
            self.config, self.headers, self.name
        )
        self.spec: ModelSpec = families.read_spec(self.config, self.tensors, self.name)
        self._sources = families.source_of(self.spec, self.tensors)
        self._known_digest = source.weights_digest(self.shards)

    @classmethod
    def open(
        cls,
        name: str | Path,
        *,
        headers_only: bool = False,
        progress: Progress = NO_PROGRESS,
    ) -> Checkpoint:
        """Open a local folder or a model on the hub.

        Parameters
        ----------
        name
            A folder, or a hub id such as ``Qwen/Qwen3-30B-A3B``.
        headers_only
            Of a model on the hub, fetch the config and the headers of the shards and no more.
            Then there are no weights to read, unless they have been downloaded before. A local
            folder is opened as ever.
        progress
            Told of a download.

        Raises
        ------
        ModelNotFoundError
            Neither a model's folder nor a repository.
        HubUnreachableError
            The hub did not answer.
        CheckpointError
            The model cannot be used: see :func:`moepack.families.read_spec`,
            :func:`moepack.source_formats.stored_tensors` and :mod:`moepack.source_files`. This is
            found out before anything is downloaded.
        """
        folder = source_files.local_folder(name)
        if folder is not None:
            return cls(FolderFiles(folder), folder)
        if not hub.is_hub_id(str(name)):
            raise ModelNotFoundError(
                f"{name}: no such folder; expected a model's folder, or a hub id such as"
                " Qwen/Qwen3-30B-A3B"
            )
        repository = hub.Repository.find(str(name))
        checkpoint = cls(repository, None)
        needed = checkpoint.needed_files(repository.files)
        checkpoint.folder = repository.folder(needed)
        if checkpoint.folder is None and not headers_only:
            checkpoint.folder = repository.download(needed, progress)
        return checkpoint

    def needed_files(self, files: Iterable[str]) -> tuple[str, ...]:
        """Those of a model's files that moepack uses."""
        wanted = {CONFIG_FILE, INDEX_FILE, *AUXILIARY_FILES, *self.shards}
        return tuple(sorted(wanted.intersection(files)))

    @functools.cached_property
    def weights_digest(self) -> str:
        """Cheap identity of the weights, lower-case hex: tells one model from another.

        For a hub id it is made from the hub's digests of the shards, the same for headers alone
        and for the downloaded files; for a folder, from the headers and 256 bytes out of the middle
        of each trunk tensor and of each tensor of each expert: every fine-tuning shows, and a
        repair of single bytes may not.
        """
        return self._known_digest or self._sampled_digest()

    @property
    def source_size(self) -> SourceSize:
        """What the files hold of the model, whatever it becomes."""
        unused = set(self.spec.unused)
        used = [tensor for name, tensor in self.tensors.items() if name not in unused]
        layout = self._sources.experts[self.spec.moe_layers[0]]
        expert = self.tensors[layout.expert(0)["gate.weight"].name]
        encoding = self.spec.dtype if expert.method == "plain" else expert.method.upper()
        return SourceSize(encoding, sum(tensor.size_bytes for tensor in used))

    @property
    def auxiliary_files(self) -> tuple[Path, ...]:
        """Files to carry along with the weights: tokenizer, chat template, generation config."""
        if self.folder is None:
            return ()
        paths = (self.folder / file for file in AUXILIARY_FILES)
        return tuple(path for path in paths if path.is_file())

    def trunk_tensor(self, name: str) -> Bits:
        """Bit patterns of a trunk tensor, by its canonical name, in the spec's shape.

        BF16 comes as uint16, F16 as float16, F32 as float32. Peak memory: the tensor, and its codes
        where it is quantised.

        Raises
        ------
        CheckpointError
            When only headers were fetched, the shard cannot be read, or scales are damaged.
        """
        return self._read(TensorSource(self._sources.trunk[name]))

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        """Bit patterns of a whole routed expert, by the names of ``segments.EXPERT_TENSORS``.

        Dtypes as in :meth:`trunk_tensor`; linear weights are [out, in], contiguous. Peak memory:
        the expert, once more the part of it that is stored fused, and the codes of one tensor where
        it is quantised; of a fused tensor only this expert's bytes are read.

        Parameters
        ----------
        layer
            The decoder's own number of a layer with routed experts.

        Raises
        ------
        CheckpointError
            When only headers were fetched, the shard cannot be read, or scales are damaged.
        """
        tensors: dict[str, Bits] = {}
        slab: tuple[TensorSource, Bits] | None = None
        for name, source in self._sources.experts[layer].expert(expert).items():
            whole = TensorSource(source.name, source.index)
            if slab is None or slab[0] != whole:
                slab = whole, self._read(whole)
            part = slab[1][source.select]
            tensors[name] = np.ascontiguousarray(part.T if source.transpose else part)
        return tensors

    def _read(self, source: TensorSource) -> Bits:
        """A source tensor, or one entry of its first dimension."""
        if self.folder is None:
            raise CheckpointError(
                f"{self.name}: only its headers were fetched; open it with its weights to read them"
            )
        return self._stored(source).read(self.folder)

    def _stored(self, source: TensorSource) -> StoredTensor:
        """What :meth:`_read` reads."""
        tensor = self.tensors[source.name]
        return tensor if source.index is None else tensor.entry(source.index)

    def _sampled_digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.headers):
            header = self.headers[name]
            digest.update(f"{name} {header.dtype} {header.shape} {header.file}\n".encode())
        if self.folder is not None:
            samples = self._samples()
            paths = [self.folder / shard for shard in self.shards]
            with ThreadPoolExecutor(_THREADS) as pool:
                places = (sorted(samples[shard]) for shard in self.shards)
                for read in pool.map(source_files.read_places, paths, places):
                    digest.update(read)
        return digest.hexdigest()

    def _samples(self) -> dict[str, set[tuple[int, int]]]:
        """Per shard, (offset, size) of what is sampled: the middle of each tensor and expert."""
        experts = (
            source
            for layout in self._sources.experts.values()
            for expert in range(layout.moe.num_experts)
            for source in layout.expert(expert).values()
        )
        samples: dict[str, set[tuple[int, int]]] = {shard: set() for shard in self.shards}
        for source in (*map(TensorSource, self._sources.trunk.values()), *experts):
            for part in self._stored(source).parts:
                sample_bytes = min(_SAMPLE_BYTES, part.size_bytes)
                middle_bytes = part.offset_bytes + (part.size_bytes - sample_bytes) // 2
                samples[part.file].add((middle_bytes, sample_bytes))
        return samples


def _read_json(source: ModelFiles, file: str) -> dict[str, Any]:
    if file not in source.files:
        raise ModelNotFoundError(
            f"{source.name}: there is no {file} in it; expected a model as transformers saves it"
        )
    return source_headers.parse_json(source.read(file), f"{source.name}: {file}")


def _read_headers(source: ModelFiles) -> dict[str, TensorHeader]:
    """Every tensor of a model, be it one file or sharded."""
    if SINGLE_FILE in source.files:
        return source.read_header(SINGLE_FILE)
    if INDEX_FILE not in source.files:
        pickled = ("pytorch_model.bin", "pytorch_model.bin.index.json")
        if any(file in source.files for file in pickled):
            raise UnsupportedEncodingError(
                f"{source.name}: the weights are pickled (pytorch_model.bin); expected safetensors;"
                " convert them with transformers: from_pretrained, then save_pretrained"
            )
        raise source_headers.damaged(source.name, "no weights", f"{SINGLE_FILE} or {INDEX_FILE}")
    what = f"{source.name}: {INDEX_FILE}"
    weight_map = source_headers.parse_index(source.read(INDEX_FILE), what)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in source.files:
            raise source_headers.damaged(source.name, f"no {shard}", "every shard of the index")
    headers: dict[str, TensorHeader] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(source.read_header, shards):
            headers.update(found)
    source_headers.check_index(weight_map, headers, what)
    return headers
