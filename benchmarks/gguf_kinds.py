"""In what the matrices of the GGUF files are that are written here."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple


class Kind(NamedTuple):
    """What the routed experts of a file are stored in, and what its other large matrices are.

    Norms, biases and routers are float32 in every kind.

    Attributes
    ----------
    name : str
        As ggml calls the type of a tensor.
    file : str
        What llama.cpp calls such a file.
    ours : bool
        Whether gguf's writer can round to it; llama.cpp's program does the others.
    trunk : str
        What the embeddings, the head, attention and shared experts are in, one of :data:`TRUNKS`.
    """

    name: str
    file: str
    ours: bool = True
    trunk: str = "BF16"

    @property
    def told(self) -> str:
        """Its name, with the trunk where that is rounded."""
        return self.name if self.trunk == "BF16" else f"{self.name} (trunk {self.trunk})"

    def with_trunk(self, trunk: str) -> Kind:
        """The same experts, in another trunk."""
        return self._replace(trunk=trunk)


#: As ggml calls the types of tensors.
TRUNKS = ("BF16", "Q8_0")

BF16 = Kind("BF16", "BF16")

#: By the name of their experts; the trunk of each is not rounded.
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
