"""Drawing the next token from the logits."""

from __future__ import annotations

import math

import torch

from moepack.errors import RunError
from moepack.records import record

#: A smaller one draws what greedy takes, or makes infinities of logits.
LEAST_TEMPERATURE = 1e-6


@record
class SamplingParams:
    """How tokens are drawn.

    Attributes
    ----------
    temperature : float
        What logits are divided by, :data:`LEAST_TEMPERATURE` or more; 0 takes the likeliest token
        and draws nothing.
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
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature {self.temperature}: expected 0 (greedy), or {LEAST_TEMPERATURE} and "
                "more"
            )
        if self.top_k < 0:
            raise ValueError(f"top-k {self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top-p {self.top_p}: expected more than 0, and 1 (all tokens) at most"
            )
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}: expected 0 to 2**63 - 1")


def _require_number(value: float) -> None:
    if not math.isfinite(value):
        raise RunError(
            f"the model gives its next token the value {value}, expected a finite one; check the "
            "pack with moepack verify, and the checkpoint that it was made from"
        )


class Sampler:
    """Draws tokens with a generator of its own, on the host whatever the device."""

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        self._generator = torch.Generator().manual_seed(self.params.seed)

    def draw(self, logits: torch.Tensor) -> int:
        """The next token, from float32 [vocab].

        Raises
        ------
        RunError
            When the logits are no numbers to choose by: what computed them is damaged.
        """
        if self.params.temperature == 0:
            token = int(logits.argmax())
            _require_number(float(logits[token]))  # NaN where any is: it counts as the largest
            return token
        probabilities = self.probabilities(logits.cpu())
        _require_number(float(probabilities[0]))  # NaN where the largest logit is no number
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
