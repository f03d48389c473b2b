"""What the inputs of experts' weights are like: what rounding weighs its errors by.

The error of a rounded weight counts in a layer's output by the square of what the weight is
multiplied with. So for each expert there are two lists of *moments*, means over the tokens of a
calibration text that use it: of x^2 for each input of gate and up, and of the same for each neuron,
the inputs of down. A token counts by the square of the router's weight over that of the norm of the
residual stream, which the next norm divides by: a few tokens of most models are hundreds of times
as large as others. Only ratios within an expert matter to :func:`moepack.quantise.quantise_expert`.

Beside them are the *second* moments, of the products of two inputs, by which the error of one
weight is made good by others (:mod:`moepack.second_moments`). They are large, so that of some
models only some are kept (:mod:`moepack.factor_file`), in a file of their own. A calibration of
before there were any has none, and weighs errors by its moments alone, as then.

A calibration is measured by ``moepack profile --bits`` and lies beside the model's other profiles.
A layout that is rounded with it names its digest, so equal layouts stay equal bytes.

Memory: of one layer, 4 bytes for each input of each expert (0.8 MB for OLMoE, 9 MB for
DeepSeek-V3), and of what has just been measured all layers'; of second moments, a layer's inputs
and an expert's neurons, three times (OLMoE: 12 MiB and 3 MiB).

Source: derived; weighing by mean squared inputs is llama.cpp's importance matrix.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from moepack.atomic import writing_atomically
from moepack.errors import PlanMismatchError, ProfileError
from moepack.factor_file import (
    FactorFile,
    Kept,
    Place,
    Places,
    Sizes,
    layer_bytes,
    may_be_kept,
)
from moepack.feedback import Moments
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.quantise import Importance
from moepack.rounding import Floats

#: The file in a model's folder.
CALIBRATION_FILE = "calibration.npz"

_REMEDY = "measure it again with moepack profile --bits"


class LayerMoments(NamedTuple):
    """Of one layer: ``hidden`` float32 [experts, hidden], ``neurons`` float32 [experts, F]."""

    hidden: Floats
    neurons: Floats


class LayerFactors(NamedTuple):
    """Which second moments of a layer there are.

    ``kept`` int64 [3]: as :class:`moepack.factor_file.Kept` has it. ``hidden``, ``neurons`` uint8
    [factors, 32]: the SHA-256 of each.
    """

    kept: npt.NDArray[np.int64]
    hidden: npt.NDArray[np.uint8]
    neurons: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, kept: Kept, hidden: Sequence[bytes], neurons: Sequence[bytes]) -> LayerFactors:
        """From the digests in their order."""
        each = (
            np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32) for found in (hidden, neurons)
        )
        return cls(np.array([kept.by_expert, kept.hidden, kept.neurons], np.int64), *each)

    def checked(self, sizes: Sizes) -> Kept:
        """What is kept.

        Raises
        ------
        ValueError
            When there cannot be such factors of a layer of these sizes.
        """
        by_expert, *widths = map(int, self.kept)
        for inputs, width in zip(sizes[1:], widths, strict=True):
            if not may_be_kept(inputs, width):
                raise ValueError(f"blocks of {width} of {inputs} inputs")
        hidden = (sizes.experts if by_expert else 1) if widths[0] else 0
        neurons = sizes.experts if widths[1] else 0
        if self.hidden.shape != (hidden, 32) or self.neurons.shape != (neurons, 32):
            raise ValueError(f"digests of shapes {self.hidden.shape}, {self.neurons.shape}")
        return Kept(bool(by_expert), *widths)


class Calibration:
    """The moments of every layer that has experts.

    Parameters
    ----------
    arrays
        ``LAYER.hidden`` and ``LAYER.neurons`` for each; where there are second moments, of each
        also ``LAYER.factors.kept`` and so on; looked up when they are needed.
    what
        How messages name it.
    factors
        Opens the file of the second moments.

    Attributes
    ----------
    digest : str
        Identity of all moments, lower-case hex.

    Raises
    ------
    ProfileError
        When an array is missing, or not what it should be.
    """

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        what: str = "calibration",
        factors: Callable[[], AbstractContextManager[FactorFile]] | None = None,
    ) -> None:
        self._files = ExitStack()
        if isinstance(arrays, NpzFile):
            self._files.enter_context(arrays)
        self._arrays = arrays
        self._what = what
        self._recent: tuple[int, LayerMoments] | None = None
        # Of a layer's inputs: once for all its experts.
        self._recent_hidden: tuple[Place, Moments] | None = None
        self._open_factors = factors
        self._factors: FactorFile | None = None
        self._lists: dict[int, LayerFactors] = {}
        digest = hashlib.sha256(b"moepack calibration\n")
        layers: dict[int, tuple[Sizes, Kept]] = {}
        for layer in self.layers:
            moments = self.moments(layer)
            for name, values in moments._asdict().items():
                digest.update(f"{layer}.{name} {values.shape}\n".encode())
                digest.update(np.ascontiguousarray(values, "<f4").data)
            found = self._list(layer)
            if found is None:
                continue
            experts, hidden = moments.hidden.shape
            sizes = Sizes(experts, hidden, moments.neurons.shape[1])
            try:
                layers[layer] = sizes, found.checked(sizes)
            except ValueError as failure:
                raise ProfileError(
                    f"{what}: second moments of layer {layer}: {failure}; {_REMEDY}"
                ) from None
            self._lists[layer] = found
            digest.update(f"{layer}.factors {found.kept.tolist()}\n".encode())
            digest.update(found.hidden.tobytes() + found.neurons.tobytes())
        self._kept = layers
        self._places = Places(layers)
        self.digest = digest.hexdigest()

    @classmethod
    def of(
        cls,
        layers: Mapping[int, LayerMoments],
        factors: Mapping[int, LayerFactors] = MappingProxyType({}),
        file: FactorFile | None = None,
    ) -> Calibration:
        """From the moments of every layer, and which second ones are in a file.

        The file stays the caller's.
        """
        arrays = {
            f"{layer}.{name}": values
            for layer, moments in layers.items()
            for name, values in moments._asdict().items()
        }
        arrays |= {
            f"{layer}.factors.{name}": values
            for layer, found in factors.items()
            for name, values in found._asdict().items()
        }
        return cls(arrays, factors=None if file is None else lambda: nullcontext(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def kept(self) -> dict[int, Kept]:
        """Of every layer that has second moments, which."""
        return {layer: kept for layer, (_, kept) in self._kept.items()}

    @property
    def second_bytes(self) -> int:
        """What the second moments take."""
        return sum(layer_bytes(*found) for found in self._kept.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that there are, ascending."""
        names = (name.partition(".")[0] for name in self._arrays)
        return tuple(sorted({int(number) for number in names if number.isdecimal()}))

    def moments(self, layer: int) -> LayerMoments:
        """Those of one layer.

        Raises
        ------
        ProfileError
            When they are not there, or are not finite and 0 or more.
        """
        if self._recent is None or self._recent[0] != layer:
            self._recent = layer, LayerMoments(*map(self._array, self._names(layer)))
        return self._recent[1]

    def importance(self, layer: int, expert: int) -> Importance:
        """What rounding weighs the errors of one expert by.

        Raises
        ------
        ProfileError
            As :meth:`moments`.
        """
        hidden, neurons = self.moments(layer)
        found = Importance(hidden[expert], neurons[expert])
        if layer not in self._lists:
            return found
        lists = self._lists[layer]
        of_hidden = self._places.hidden(layer, expert)
        of_neurons = self._places.neurons(layer, expert)
        which = expert if self._kept[layer][1].by_expert else 0
        if of_hidden is not None:
            if self._recent_hidden is None or self._recent_hidden[0] != of_hidden:
                self._recent_hidden = of_hidden, self._second(of_hidden, lists.hidden[which])
            found = found._replace(of_hidden=self._recent_hidden[1])
        if of_neurons is not None:
            found = found._replace(of_neurons=self._second(of_neurons, lists.neurons[expert]))
        return found

    def _second(self, place: Place, digest: npt.NDArray[np.uint8]) -> Moments:
        if self._factors is None:
            if self._open_factors is None:
                raise ProfileError(f"{self._what}: without its second moments; {_REMEDY}")
            self._factors = self._files.enter_context(self._open_factors())
        return Moments.of(self._factors.read(place, digest.tobytes(), _REMEDY))

    def save(self, folder: Path) -> None:
        """Write :data:`CALIBRATION_FILE`, and before it the second moments; each atomically."""
        names = [name for layer in self.layers for name in self._names(layer)]
        arrays: dict[str, Any] = {name: self._array(name) for name in names}
        for layer, found in self._lists.items():
            arrays |= {f"{layer}.factors.{name}": each for name, each in found._asdict().items()}
        if self._lists and self._open_factors is not None:
            with self._open_factors() as file:
                file.save(folder)
        with writing_atomically(folder / CALIBRATION_FILE) as out:
            np.savez(out, **arrays)

    def _list(self, layer: int) -> LayerFactors | None:
        """Which second moments of a layer there are; None: it has none."""
        names = [f"{layer}.factors.{name}" for name in LayerFactors._fields]
        if names[0] not in self._arrays:
            return None
        found = LayerFactors(*map(self._raw, names))
        forms = [(values.dtype.name, values.ndim) for values in found]
        if forms != [("int64", 1), ("uint8", 2), ("uint8", 2)] or len(found.kept) != 3:
            raise ProfileError(f"{self._what}: {names[0]}: no list of second moments; {_REMEDY}")
        return found

    @staticmethod
    def _names(layer: int) -> tuple[str, str]:
        return f"{layer}.hidden", f"{layer}.neurons"

    def _raw(self, name: str) -> npt.NDArray[Any]:
        try:
            return self._arrays[name]
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as failure:
            raise ProfileError(f"{self._what}: {name}: {failure}; {_REMEDY}") from None

    def _array(self, name: str) -> Floats:
        values = self._raw(name)
        if values.dtype != np.float32 or values.ndim != 2:
            raise ProfileError(
                f"{self._what}: {name} is {values.dtype} of shape {values.shape}, expected float32 "
                f"[experts, inputs]; {_REMEDY}"
            )
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ProfileError(
                f"{self._what}: {name} holds numbers below 0, or not finite; {_REMEDY}"
            )
        return values


def load_calibration(folder: Path) -> Calibration:
    """Read what :meth:`Calibration.save` wrote, and check all of it.

    Raises
    ------
    ProfileError
        When it is missing, or is not what it should be.
    """
    path = folder / CALIBRATION_FILE
    try:
        found = np.load(path, allow_pickle=False)  # arrays as they are asked for
    except OSError as failure:
        raise ProfileError(f"calibration {path}: {failure.strerror}; {_REMEDY}") from None
    except (ValueError, zipfile.BadZipFile) as failure:
        raise ProfileError(f"calibration {path}: not one ({failure}); {_REMEDY}") from None
    if not isinstance(found, NpzFile):
        raise ProfileError(f"calibration {path}: not one (a single array); {_REMEDY}")
    try:
        return Calibration(
            found, f"calibration {path}", functools.partial(FactorFile.open, folder, _REMEDY)
        )
    except BaseException:
        found.close()
        raise


def calibration_for(
    spec: ModelSpec, layout: Layout, found: Calibration | None
) -> Calibration | None:
    """What the experts of a layout are rounded by: what it names, or nothing.

    Raises
    ------
    PlanMismatchError
        When it names a calibration that is not this one, or this one is of other experts.
    """
    if not layout.calibration:
        return None
    if found is None or found.digest != layout.calibration:
        has = "there is none" if found is None else f"the model has {found.digest[:12]}"
        raise PlanMismatchError(
            f"the plan rounds experts by calibration {layout.calibration[:12]}, {has}; plan again"
        )
    for number in spec.moe_layers:
        moe = spec.moe(number)
        shapes = tuple(values.shape for values in found.moments(number))
        expected = tuple((moe.num_experts, n) for n in (spec.hidden_size, moe.intermediate_size))
        if shapes != expected:
            raise PlanMismatchError(
                f"the calibration of layer {number} is of shapes {shapes}, expected {expected}; "
                f"{_REMEDY}"
            )
    return found
