"""What the inputs of experts' weights are like: what rounding weighs its errors by.

The error of a rounded weight counts in a layer's output by the square of what the weight is
multiplied with. So for each expert there are two lists of *moments*, means over the tokens of a
calibration text that use it: of x^2 for each input of gate and up, and of the same for each neuron,
the inputs of down. A token counts by the square of the router's weight over that of the norm of the
residual stream, which the next norm divides by: a few tokens of most models are hundreds of times
as large as others. Only ratios within an expert matter to :func:`moepack.quantise.quantise_expert`.

A calibration is measured by ``moepack profile --bits`` and lies beside the model's other profiles.
A layout that is rounded with it names its digest, so equal layouts stay equal bytes.

Memory: of one layer, 4 bytes for each input of each expert (0.8 MB for OLMoE, 9 MB for
DeepSeek-V3), and of what has just been measured all layers'.

Source: derived; weighing by mean squared inputs is llama.cpp's importance matrix.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moepack.atomic import writing_atomically
from moepack.errors import PlanMismatchError, ProfileError
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


class Calibration:
    """The moments of every layer that has experts.

    Parameters
    ----------
    arrays
        ``LAYER.hidden`` and ``LAYER.neurons`` for each; looked up when they are needed.
    what
        How messages name it.

    Attributes
    ----------
    digest : str
        Identity of all moments, lower-case hex.

    Raises
    ------
    ProfileError
        When an array is missing, or not what it should be.
    """

    def __init__(self, arrays: Mapping[str, Floats], what: str = "calibration") -> None:
        self._arrays = arrays
        self._what = what
        self._recent: tuple[int, LayerMoments] | None = None
        digest = hashlib.sha256(b"moepack calibration\n")
        for layer in self.layers:
            for name, values in self.moments(layer)._asdict().items():
                digest.update(f"{layer}.{name} {values.shape}\n".encode())
                digest.update(np.ascontiguousarray(values, "<f4").data)
        self.digest = digest.hexdigest()

    @classmethod
    def of(cls, layers: Mapping[int, LayerMoments]) -> Calibration:
        """From the moments of every layer."""
        return cls(
            {
                f"{layer}.{name}": values
                for layer, moments in layers.items()
                for name, values in moments._asdict().items()
            }
        )

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
        return Importance(hidden[expert], neurons[expert])

    def save(self, folder: Path) -> None:
        """Write :data:`CALIBRATION_FILE`, atomically."""
        names = [name for layer in self.layers for name in self._names(layer)]
        arrays: dict[str, Any] = {name: self._array(name) for name in names}
        with writing_atomically(folder / CALIBRATION_FILE) as out:
            np.savez(out, **arrays)

    @staticmethod
    def _names(layer: int) -> tuple[str, str]:
        return f"{layer}.hidden", f"{layer}.neurons"

    def _array(self, name: str) -> Floats:
        try:
            values = self._arrays[name]
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as failure:
            raise ProfileError(f"{self._what}: {name}: {failure}; {_REMEDY}") from None
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
    return Calibration(found, f"calibration {path}")


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
