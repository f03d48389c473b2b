"""Drawing the next token from the logits."""

from __future__ import annotations

import math

import torch

from moepack.records import record


@record
class SamplingParams:
    """How tokens are drawn.

    Attributes
    ----------
    temperature : float
        What logits are divided by; 0 takes the likeliest token and draws nothing.
    top_k : int
        Draw among this many likeliest tokens; 0 for all.
    top_p : float
        Then among the fewest likeliest whose probabilities reach this sum; 1 for all.
    seed : int
        Equal seeds and equal logits draw equal tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top-p {self.top_p}: expected more than 0, and 1 (all tokens) at most"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: expected 0 to 2**63 - 1")


class Sampler:
    """Draws tokens with a generator of its own, on the host whatever the device."""

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        self._generator = torch.Generator().manual_seed(self.params.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, from float32 [vocab]."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits.cpu())
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What :meth:`draw` draws from, float32 [vocab] (for a temperature above 0).

        Temperature, then top-k, then top-p over what is left, as in the transformers library.
        """
        logits = logits / self.params.temperature
        if 0 < self.params.top_k < logits.shape[0]:
            least = logits.topk(self.params.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.params.top_p < 1:
            ascending, order = logits.sort()
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - self.params.top_p
            unlikely[-1] = False
            logits = logits.masked_fill(unlikely.scatter(0, order, unlikely), -torch.inf)
        return logits.softmax(-1)
