"""The layout: which bytes a pack holds. Records alone; :mod:`moepack.layouts` makes them."""

from __future__ import annotations

from dataclasses import replace

from moepack import records
from moepack.records import added, record


@record
class LayerLayout:
    """How the experts of one layer are cut: ``split`` neurons of ``width`` go to the top.

    Attributes
    ----------
    encoding : str
        How they are stored, by its name in :mod:`moepack.encodings`: the model's dtype, as
        safetensors spells it, or a quantised one.
    encodings : tuple of str
        In a *mixed* layer the encoding of every expert, by its id, and ``encoding`` is the one that
        takes most bytes. Empty where all are stored alike: a layer can be said in one way only.
    """

    layer: int
    split: int
    width: int
    granularity: int
    encoding: str
    encodings: tuple[str, ...] = added(default=())

    def __post_init__(self) -> None:
        if self.encodings and (len(self.classes) == 1 or self.encoding != self.classes[0]):
            raise ValueError(
                f"layer {self.layer} is {self.encoding} and its experts {', '.join(self.classes)}, "
                "expected the one that takes most bytes, and experts that differ"
            )

    @property
    def split_ratio(self) -> float:
        """The fraction in the top segment, theta."""
        return self.split / self.width

    @property
    def classes(self) -> tuple[str, ...]:
        """The encodings that its experts have, from most bytes to fewest."""
        if not self.encodings:
            return (self.encoding,)
        # Deferred: most layers are not mixed, and encodings need numpy.
        from moepack.encodings import ENCODINGS

        order = tuple(ENCODINGS)  # behind them what this moepack does not know
        return tuple(
            sorted(
                set(self.encodings),
                key=lambda name: (order.index(name) if name in ENCODINGS else len(order), name),
            )
        )

    def encoding_of(self, expert: int) -> str:
        """What one expert is stored in."""
        return self.encodings[expert] if self.encodings else self.encoding

    def class_sizes(self, num_experts: int) -> dict[str, int]:
        """How many experts have each encoding, in the order of :attr:`classes`."""
        if not self.encodings:
            return {self.encoding: num_experts}
        return {name: self.encodings.count(name) for name in self.classes}

    def class_of(self, num_experts: int) -> tuple[int, ...]:
        """Of every expert, the place of its encoding in :attr:`classes`."""
        if not self.encodings:
            return (0,) * num_experts
        places = {name: place for place, name in enumerate(self.classes)}
        return tuple(places[name] for name in self.encodings)


@record
class Layout:
    """Which bytes a pack holds. Equal layouts of one model give equal packs.

    ``prefill_block_tokens`` belongs here: the shape of a batch decides the bits of its result.

    Attributes
    ----------
    low : str
        What the low copy of every expert is stored in, beside the expert itself and cut as it is;
        empty where there are none.
    calibration : str
        Digest of what the rounding of its experts is weighed by (:mod:`moepack.calibration`);
        empty where every weight counts the same, or none is rounded.
    trunk : str
        What the trunk's large matrices are stored in (:mod:`moepack.trunk`); empty: as the
        checkpoint has them.
    """

    model_digest: str
    layers: tuple[LayerLayout, ...]
    prefill_block_tokens: int = 512
    low: str = added(default="")
    calibration: str = added(default="")
    trunk: str = added(default="")

    @property
    def digest(self) -> str:
        """Identity of the layout, lower-case hex."""
        return records.digest(self)

    @property
    def encodings(self) -> frozenset[str]:
        """Those of its layers, and of their low copies."""
        low = (self.low,) if self.low else ()
        return frozenset((*low, *(name for layer in self.layers for name in layer.classes)))

    @property
    def is_rounded(self) -> bool:
        """Whether any expert is stored in a quantised encoding."""
        # Deferred: encodings need numpy.
        from moepack.encodings import ENCODINGS

        return any(name in ENCODINGS and ENCODINGS[name].quantised for name in self.encodings)

    @property
    def low_layers(self) -> tuple[LayerLayout, ...]:
        """The layers as their low copies are stored; empty where there are none."""
        if not self.low:
            return ()
        return tuple(replace(cut, encoding=self.low, encodings=()) for cut in self.layers)
