"""What the logits of one model, or of two, say of the tokens that came; for a few tokens at a time.

A vocabulary of 150,000 makes 600 KB of float32 logits a token, so those of a text are never there
together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moepack.quality import Floats, TokenScores

if TYPE_CHECKING:
    import torch

#: Memory of :func:`score_rows`, bytes for each token and entry of the vocabulary: log-probabilities
#: of one model in float64; of the other logits in float32, once more in float64, and their
#: log-probabilities.
BYTES_PER_LOGIT = 28

#: More rows make no product faster.
_MOST_ROWS = 512

#: A kernel's tile of rows.
_ROW_MULTIPLE = 16


def rows_within(memory_bytes: int, vocab_size: int) -> int:
    """How many tokens' logits :func:`score_rows` can take at once; one at least."""
    rows = min(_MOST_ROWS, memory_bytes // (BYTES_PER_LOGIT * vocab_size))
    return max(1, rows - rows % _ROW_MULTIPLE if rows > _ROW_MULTIPLE else rows)


def score_rows(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    exact_hidden: torch.Tensor | None = None,
    exact_head: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> TokenScores:
    """Score tokens by the states that they are predicted from.

    All in float64, since the divergence of two good models is a small difference. Both models go
    through a head in batches of one shape, so equal states give a divergence of exactly 0 where
    they share it.

    Parameters
    ----------
    head
        From [rows, hidden] to float32 logits [rows, vocab], of both models, unless there is
        ``exact_head``, of the exact one.
    hidden, exact_hidden
        [rows, hidden], what the last layer leaves before each token.
    targets
        int64 [rows], the tokens.
    """
    import torch

    with torch.inference_mode():
        found = _log_probabilities(head(hidden))
        nll = _at(found, targets)
        if exact_hidden is None:
            return TokenScores(_array(nll))
        best = found.argmax(dim=-1)
        exact = _log_probabilities((exact_head or head)(exact_hidden))
        exact_nll = _at(exact, targets)
        agrees = (best == exact.argmax(dim=-1)).double()
        difference = found.neg_().add_(exact)
        # Never below 0 but for rounding.
        kl = exact.exp_().mul_(difference).sum(dim=-1).clamp_(min=0.0)
        return TokenScores(_array(nll), _array(exact_nll), _array(kl), _array(agrees))


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.log_softmax(logits, dim=-1, dtype=torch.float64)


def _at(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1).neg_()


def _array(column: torch.Tensor) -> Floats:
    array: Floats = column.cpu().numpy()
    return array
