"""In what the routed experts of the GGUF files are that are written here."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple


class Kind(NamedTuple):
    """What the routed experts of a file are stored in; everything else is as in ``BF16``.

    Attributes
    ----------
    name : str
        As ggml calls the type of a tensor.
    file : str
        What llama.cpp calls such a file.
    ours : bool
        Whether gguf's writer can round to it; llama.cpp's program does the others.
    """

    name: str
    file: str
    ours: bool = True


BF16 = Kind("BF16", "BF16")

KINDS = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            BF16,
            Kind("Q8_0", "Q8_0"),
            Kind("Q4_0", "Q4_0"),
            Kind("Q4_K", "Q4_K_S", ours=False),
        )
    }
)
