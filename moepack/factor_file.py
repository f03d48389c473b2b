"""Which second moments of a model are kept, and the file that they are in.

The factors (:mod:`moepack.second_moments`) of a layer's inputs take 2 bytes for each pair of them,
halved; those of an expert's neurons likewise. All together get :data:`MOST_BYTES`, in this order:

1. each expert's own of both, where everything fits (the shipped model: 6.5 MiB);
2. the layer's inputs, of all tokens, for gate and up of all its experts; in blocks where the whole
   does not fit (DeepSeek-V3);
3. each expert's neurons, for down, in blocks as wide as fit (OLMoE-1B-7B: the whole, 1.07 GiB
   together; Qwen3-30B-A3B: halves, 1.9 GiB), or not at all (Qwen3-235B-A22B).

A block is a multiple of 64 inputs, which are never divided, or all of them.

The factors lie one behind the other without anything between: of each layer, in the order of the
layers, those of its inputs, then those of its experts' neurons. Where they are follows from what
the calibration says of each layer, and the calibration has their SHA-256, with which each is
compared when it is read.

Memory: one factor at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from moepack.atomic import writing_atomically
from moepack.errors import ProfileError
from moepack.feedback import MOST_INPUTS
from moepack.model_spec import ModelSpec
from moepack.records import record
from moepack.second_moments import Factor, factor_bytes, factor_from_bytes
from moepack.units import GIB

#: The file in a model's folder.
FACTORS_FILE = "second_moments.bin"

#: What the second moments of a model may take.
MOST_BYTES = 2 * GIB

#: Neighbours that stay together: groups of INT4 divide it.
_TOGETHER = 64


@record
class Kept:
    """What is kept of a layer.

    Attributes
    ----------
    by_expert : bool
        Whether every expert has factors of its own inputs; else there are those of the layer's.
    hidden, neurons : int
        Widths of blocks of inputs of gate and up, and of down; 0: nothing is kept.
    """

    by_expert: bool
    hidden: int
    neurons: int


class Sizes(NamedTuple):
    """Of a layer: how many experts, inputs of gate and up, inputs of down."""

    experts: int
    hidden: int
    neurons: int


class Place(NamedTuple):
    """Where a factor is."""

    offset_bytes: int
    inputs: int
    width: int

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return factor_bytes(self.inputs, self.width)


class Places:
    """Where every factor is, of layers that are kept so."""

    def __init__(self, layers: Mapping[int, tuple[Sizes, Kept]]) -> None:
        self._layers = layers
        self._begins: dict[int, int] = {}
        self.size_bytes = 0
        for layer in sorted(layers):
            self._begins[layer] = self.size_bytes
            self.size_bytes += layer_bytes(*layers[layer])

    def hidden(self, layer: int, expert: int) -> Place | None:
        """Of the inputs of gate and up."""
        sizes, kept = self._layers[layer]
        if not kept.hidden:
            return None
        before = expert * factor_bytes(sizes.hidden, kept.hidden) if kept.by_expert else 0
        return Place(self._begins[layer] + before, sizes.hidden, kept.hidden)

    def neurons(self, layer: int, expert: int) -> Place | None:
        """Of the inputs of down."""
        sizes, kept = self._layers[layer]
        if not kept.neurons:
            return None
        before = layer_bytes(sizes, Kept(kept.by_expert, kept.hidden, 0))
        before += expert * factor_bytes(sizes.neurons, kept.neurons)
        return Place(self._begins[layer] + before, sizes.neurons, kept.neurons)


def layer_bytes(sizes: Sizes, kept: Kept) -> int:
    """What the factors of a layer take."""
    total = 0
    if kept.hidden:
        count = sizes.experts if kept.by_expert else 1
        total += count * factor_bytes(sizes.hidden, kept.hidden)
    if kept.neurons:
        total += sizes.experts * factor_bytes(sizes.neurons, kept.neurons)
    return total


def sizes_of(spec: ModelSpec) -> dict[int, Sizes]:
    """Of every layer that has experts."""
    return {
        layer: Sizes(
            spec.moe(layer).num_experts, spec.hidden_size, spec.moe(layer).intermediate_size
        )
        for layer in spec.moe_layers
    }


def choose(sizes: Iterable[Sizes], most_bytes: int = MOST_BYTES) -> list[Kept]:
    """What is kept of each layer, as the module says."""
    layers = list(sizes)
    whole = [Kept(True, each.hidden, each.neurons) for each in layers]
    within = all(max(each.hidden, each.neurons) <= MOST_INPUTS for each in layers)
    if within and sum(map(layer_bytes, layers, whole)) <= most_bytes:
        return whole
    inputs = sum(each.hidden for each in layers)
    hidden = [_width(each.hidden, most_bytes, inputs) for each in layers]
    kept = [Kept(False, width, 0) for width in hidden]
    left = most_bytes - sum(map(layer_bytes, layers, kept))
    inputs = sum(each.experts * each.neurons for each in layers)
    neurons = [_width(each.neurons, left, inputs) for each in layers]
    return [Kept(False, *widths) for widths in zip(hidden, neurons, strict=True)]


def may_be_kept(inputs: int, width: int) -> bool:
    """Whether blocks of these inputs may be so wide; 0: none is kept."""
    whole = width == inputs or (width > 0 and inputs % width == 0 and width % _TOGETHER == 0)
    return width == 0 or (whole and width <= MOST_INPUTS)


def _width(inputs: int, most_bytes: int, all_inputs: int) -> int:
    """The widest blocks for these inputs, where all of them may take so much; 0 for none."""
    widest = most_bytes // max(1, all_inputs) - factor_bytes(1, 0)
    widths = (inputs // parts for parts in range(1, inputs + 1) if inputs % parts == 0)
    return next((each for each in widths if each <= widest and may_be_kept(inputs, each)), 0)


class FactorFile:
    """Factors at their places; reading from several threads at once is fine.

    Whoever opens one closes it, at the end of a ``with``.

    Parameters
    ----------
    file
        Open for what is done with it.
    what
        How messages name it.
    """

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self._what = what
        self._lock = threading.Lock()

    @classmethod
    def temporary(cls, scratch: Path | None = None) -> FactorFile:
        """One without a name, to be kept by :meth:`save`; in this folder, or the system's."""
        return cls(tempfile.TemporaryFile(dir=scratch), "second moments")

    @classmethod
    def open(cls, folder: Path, remedy: str) -> FactorFile:
        """The one that :meth:`save` wrote.

        Raises
        ------
        ProfileError
            When there is none.
        """
        path = folder / FACTORS_FILE
        try:
            return cls(path.open("rb"), f"second moments {path}")
        except OSError as failure:
            raise ProfileError(f"second moments {path}: {failure.strerror}; {remedy}") from None

    def write(self, place: Place, factor: Factor) -> bytes:
        """Put a factor at its place; its SHA-256."""
        content = factor.to_bytes()
        assert len(content) == place.size_bytes, place
        with self._lock:
            self._file.seek(place.offset_bytes)
            self._file.write(content)
        return hashlib.sha256(content).digest()

    def read(self, place: Place, digest: bytes, remedy: str) -> Factor:
        """The factor at a place.

        Raises
        ------
        ProfileError
            When it is another one.
        """
        with self._lock:
            self._file.seek(place.offset_bytes)
            content = self._file.read(place.size_bytes)
        if hashlib.sha256(content).digest() != digest:
            raise ProfileError(
                f"{self._what}: {place.size_bytes} bytes from {place.offset_bytes} are not those "
                f"of the calibration; {remedy}"
            )
        try:
            return factor_from_bytes(content, place.inputs)
        except ValueError as failure:
            raise ProfileError(f"{self._what}: {failure}; {remedy}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def save(self, folder: Path) -> None:
        """Write :data:`FACTORS_FILE`, atomically."""
        with self._lock, writing_atomically(folder / FACTORS_FILE) as out:
            self._file.seek(0, os.SEEK_SET)
            shutil.copyfileobj(self._file, out)
