"""In what both sides store a model: what moepack is told, and the kinds of GGUF beside it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, NamedTuple

from benchmarks.gguf_kinds import KINDS, Kind
from moepack.precision import QualityName

TrunkName = Literal["exact", "int8"]

#: What moepack may be told to store the trunk in, and in what the peer has it then.
TRUNKS: MappingProxyType[TrunkName, str] = MappingProxyType({"exact": "BF16", "int8": "Q8_0"})


class Asked(NamedTuple):
    """What moepack is told to store the routed experts in, and the trunk."""

    quality: QualityName
    trunk: TrunkName = "exact"

    @property
    def options(self) -> tuple[str, ...]:
        """Of ``moepack plan``."""
        trunk = () if self.trunk == "exact" else ("--trunk", self.trunk)
        return ("--quality", self.quality, *trunk)

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.quality}{suffix_of(self.trunk)}"

    @property
    def stored_trunk(self) -> str:
        """The trunk as a layout spells it (:mod:`moepack.trunk`)."""
        return "" if self.trunk == "exact" else self.trunk.upper()


def suffix_of(trunk: TrunkName) -> str:
    """What the names of files get where it is rounded."""
    return "" if trunk == "exact" else f"-trunk-{trunk}"


class Precision(NamedTuple):
    """What moepack is asked for, and the kinds of GGUF that move about as many bytes."""

    asked: Asked
    kinds: tuple[Kind, ...]

    @property
    def told(self) -> str:
        """The trunk in words, where it is rounded."""
        trunk = self.asked.trunk
        return "" if trunk == "exact" else f", trunk {trunk} and {TRUNKS[trunk]}"


#: The same by bits of an expert's weight; the trunk of none is rounded.
_PRECISIONS = MappingProxyType(
    {
        16: Precision(Asked("exact"), (KINDS["BF16"],)),
        8: Precision(Asked("int8"), (KINDS["Q8_0"],)),
        4: Precision(Asked("int4"), (KINDS["Q4_0"], KINDS["Q4_K"])),
    }
)

#: Bits that can be asked for, and those of them whose trunk may be rounded as well: what that alone
#: loses is not measured.
BITS = tuple(_PRECISIONS)
ROUNDED_BITS = tuple(
    bits for bits, precision in _PRECISIONS.items() if precision.asked.quality != "exact"
)


def precision(bits: int, trunk: TrunkName) -> Precision:
    """Both sides at so many bits, with such a trunk."""
    asked, kinds = _PRECISIONS[bits]
    rounded = tuple(kind.with_trunk(TRUNKS[trunk]) for kind in kinds)
    return Precision(asked._replace(trunk=trunk), rounded)
