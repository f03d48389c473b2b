"""Second moments while they are measured: each in its file as soon as it is known.

What is used to round an expert is what will be read from the file, not what it was made from: so
damage is measured of the very codes that packing makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moepack.calibration import Calibration, LayerFactors, LayerMoments
from moepack.damage_inputs import Inputs, Seen, factor_of, layer_factor
from moepack.factor_file import FactorFile, Kept, Place, Places, choose, sizes_of
from moepack.feedback import Moments
from moepack.quantise import Importance

if TYPE_CHECKING:
    from moepack.model_spec import ModelSpec
    from moepack.second_moments import Factor


class SecondMoments:
    """Of a model; layers are measured one after the other.

    Parameters
    ----------
    file
        Where they go.
    """

    def __init__(self, spec: ModelSpec, file: FactorFile) -> None:
        sizes = sizes_of(spec)
        kept = dict(zip(sizes, choose(sizes.values()), strict=True))
        self._kept = kept
        self._places = Places({layer: (sizes[layer], kept[layer]) for layer in sizes})
        self._file = file
        self._layers: dict[int, LayerSecond] = {}

    def of_layer(self, layer: int, seen: Seen) -> LayerSecond:
        """For what a layer's experts see."""
        self._layers[layer] = LayerSecond(layer, self._kept[layer], self._places, self._file, seen)
        return self._layers[layer]

    def calibration(self, moments: Mapping[int, LayerMoments]) -> Calibration:
        """All of it, once every layer has been measured."""
        lists = {layer: found.factors() for layer, found in self._layers.items()}
        return Calibration.of(moments, lists, self._file)


class LayerSecond:
    """Of one layer."""

    def __init__(
        self, layer: int, kept: Kept, places: Places, file: FactorFile, seen: Seen
    ) -> None:
        self._layer, self._kept, self._places, self._file = layer, kept, places, file
        self._hidden: list[bytes] = []
        self._neurons: list[bytes] = []
        self._shared: Moments | None = None
        place = places.hidden(layer, 0)
        if place is not None and not kept.by_expert:
            self._shared = self._keep(place, layer_factor(seen, place.width), self._hidden)

    def importance(self, expert: int, inputs: Inputs, means: Importance) -> Importance:
        """What an expert's rounding is weighed by; experts come in their order."""
        of_hidden, of_neurons = self._shared, None
        place = self._places.hidden(self._layer, expert)
        if place is not None and self._kept.by_expert:
            factor = factor_of(inputs.hidden, inputs.counts, place.width)
            of_hidden = self._keep(place, factor, self._hidden)
        place = self._places.neurons(self._layer, expert)
        if place is not None:
            factor = factor_of(inputs.neurons, inputs.counts, place.width)
            of_neurons = self._keep(place, factor, self._neurons)
        return means._replace(of_hidden=of_hidden, of_neurons=of_neurons)

    def factors(self) -> LayerFactors:
        """What was kept."""
        return LayerFactors.of(self._kept, self._hidden, self._neurons)

    def _keep(self, place: Place, factor: Factor, digests: list[bytes]) -> Moments:
        digests.append(self._file.write(place, factor))
        return Moments.of(factor)
