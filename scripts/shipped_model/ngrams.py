"""Baselines that a trained model must beat: unigram, and interpolated Kneser-Ney bigram."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint16]
DISCOUNTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class Ngrams:
    """Counts of single tokens and of pairs, and the losses of the models they give.

    Parameters
    ----------
    streams
        Training token streams; pairs do not span two of them.
    vocab_size
        Number of token ids. The table of pairs takes 8 bytes times its square.
    """

    def __init__(self, streams: list[Ids], vocab_size: int) -> None:
        pairs = np.zeros(vocab_size * vocab_size, dtype=np.int64)
        for ids in streams:
            flat = ids[:-1].astype(np.int64) * vocab_size + ids[1:]
            pairs += np.bincount(flat, minlength=len(pairs))
        self._pairs = pairs.reshape(vocab_size, vocab_size)
        self._totals = self._pairs.sum(1)
        self._followers = (self._pairs > 0).sum(1)
        self._predecessors = (self._pairs > 0).sum(0)
        counts = self._pairs.sum(0) + 1.0
        self._unigram = counts / counts.sum()

    def unigram_loss(self, ids: Ids) -> float:
        """Return the mean loss in nats on all tokens but the first; smoothing is add-one."""
        return -float(np.log(self._unigram[ids[1:]]).mean())

    def bigram_loss(self, ids: Ids, discount: float) -> float:
        """Return the mean loss in nats on all tokens but the first.

        Interpolated Kneser-Ney (Chen & Goodman 1999, section 2.7): the lower order counts how many
        different tokens precede a token; it is discounted likewise, down to a uniform share.
        """
        last, following = ids[:-1].astype(np.int64), ids[1:].astype(np.int64)
        vocab = len(self._totals)
        lower = np.maximum(self._predecessors - discount, 0.0)
        lower += discount * np.count_nonzero(self._predecessors) / vocab
        lower /= self._predecessors.sum()
        totals = np.maximum(self._totals[last], 1)
        rest = discount * self._followers[last] / totals
        rest[self._totals[last] == 0] = 1.0
        seen = np.maximum(self._pairs[last, following] - discount, 0.0) / totals
        return -float(np.log(seen + rest * lower[following]).mean())

    def best_discount(self, streams: list[Ids]) -> float:
        """Return the discount with the lowest mean loss over development streams."""

        def mean_loss(discount: float) -> float:
            return float(np.mean([self.bigram_loss(ids, discount) for ids in streams]))

        return min(DISCOUNTS, key=mean_loss)
