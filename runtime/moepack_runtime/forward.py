"""Tokens through all layers: behind what is in the cache, or many sequences at once.

Layer by layer over the whole prompt: every block of a layer is computed before the next layer
begins, so each missing segment crosses the link once per prompt. The block length is the layout's,
never the budget's, because the shape of a batch decides the bits of its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from moepack.errors import ContextLengthError, RunError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import Placement
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.layer_loop import Hidden, LayerLoop
from moepack_runtime.memory import refusals_named
from moepack_runtime.model import Decoder
from moepack_runtime.progress import NO_PROGRESS, Progress


class Forward:
    """Runs tokens through a decoder, and knows the sequence that its cache holds.

    Attributes
    ----------
    broken : bool
        Whether slots may hold anything, since something failed that was writing into them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        placement: Placement,
        decoder: Decoder,
        kv: KvCache,
        loop: LayerLoop,
    ) -> None:
        self._block_tokens = layout.prefill_block_tokens
        self._context_tokens = placement.context_tokens
        self._planned_bytes = placement.memory.total_bytes
        self._device = torch.device(placement.device)
        self._switch_tokens = spec.rope.switch_tokens
        self._vocab_size = spec.vocab_size
        self._decoder = decoder
        self._kv = kv
        self._loop = loop
        self._tokens: list[int] = []  # what is in the cache
        self.broken = False

    def reset(self) -> None:
        """Forget the sequence."""
        self._kv.truncate(0)
        self._tokens.clear()

    def require_whole(self) -> None:
        """Refuse to go on after a failure, with a RunError."""
        if self.broken:
            raise RunError("the engine failed in an earlier step; open it again")

    def require_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse what does not fit the planned context, with a ContextLengthError."""
        context = self._context_tokens
        if prompt_tokens == 0:
            raise ContextLengthError("the prompt has no tokens; expected at least one")
        if prompt_tokens + new_tokens > context:
            raise ContextLengthError(
                f"prompt of {prompt_tokens} tokens and {new_tokens} new ones exceed the planned "
                f"context of {context}; plan with --context {prompt_tokens + new_tokens} or more"
            )

    def forward(
        self,
        tokens: Sequence[int],
        *,
        all_logits: bool = False,
        progress: Progress = NO_PROGRESS,
    ) -> torch.Tensor:
        """Run tokens behind what is in the cache, layer by layer.

        Returns
        -------
        Tensor
            float32 [1, vocab] for the last token, or [tokens, vocab] with ``all_logits``.
        """
        blocks = self._run_behind(tokens, progress)
        with torch.inference_mode(), self._refusals_named():
            if not all_logits:
                return self._loop.logits(blocks[-1].hidden[-1:])
            hidden = torch.cat([block.hidden for block in blocks])
            return self._loop.logits(hidden[-len(tokens) :])

    def last_state(self, tokens: Sequence[int]) -> torch.Tensor:
        """The same without the head: [1, hidden] of the last token, for :meth:`logits`."""
        return self._run_behind(tokens, NO_PROGRESS)[-1].hidden[-1:].clone()

    def _run_behind(self, tokens: Sequence[int], progress: Progress) -> list[Hidden]:
        """All layers over tokens behind what is in the cache, which they join."""
        start = self._kv.length
        self.require_room(start + len(tokens), 0)
        self._require_known(tokens)
        run: Sequence[int] = tokens
        switch = self._switch_tokens
        if switch is not None and 0 < start <= switch < start + len(tokens):
            # Beyond this length every position has another angle, those in the cache included.
            run, start = [*self._tokens, *tokens], 0
            self.reset()
        blocks = self._run([(start, run)], progress)
        self._kv.advance(len(run))
        self._tokens.extend(run)
        return blocks

    def survey(
        self, sequences: Sequence[Sequence[int]], progress: Progress = NO_PROGRESS
    ) -> list[Hidden]:
        """Run many sequences at once, for what the observer sees of them, or for their logits.

        Layer by layer over all of them, so that each expert is fetched once for the lot. Each
        sequence begins at position 0 and must fit the planned context; the cache is empty
        afterwards. The hidden states of all sequences are held: keep their number of tokens
        within what the placement's ``hidden_bytes`` were planned for, or plan them apart. Where
        the rotary embedding switches at a length, all must be on one side of it.

        Returns
        -------
        list of Hidden
            What the last layer leaves, for :meth:`logits`: each sequence's blocks in order, from
            position 0 on. Of two tokens or more, a sequence's bits are the same whatever runs
            beside it.
        """
        for tokens in sequences:
            self.require_room(len(tokens), 0)
            self._require_known(tokens)
        self.reset()  # the angles are those of the length, the cache's included
        stream = self._run([(0, tokens) for tokens in sequences], progress)
        self.reset()
        return stream

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What final norm and head make of [tokens, hidden]: float32 [tokens, vocab].

        Memory: 4 bytes a logit, and once more what they take in the model's dtype meanwhile. The
        plan holds room for one token's.
        """
        with torch.inference_mode(), self._refusals_named():
            return self._loop.logits(hidden)

    @torch.inference_mode()
    def _run(
        self, sequences: Sequence[tuple[int, Sequence[int]]], progress: Progress = NO_PROGRESS
    ) -> list[Hidden]:
        """All layers over all blocks of (first position, tokens); the residual stream of each."""
        self.require_whole()
        self.broken = True  # until the pass has gone through: an error leaves slots half-written
        with self._refusals_named():
            stream = self._loop.run(self._embed(sequences), progress)
        self.broken = False
        if self._loop.watching.live is not None:
            self._loop.watching.live.advance(sum(len(tokens) for _, tokens in sequences))
        return stream

    def _embed(self, sequences: Sequence[tuple[int, Sequence[int]]]) -> list[Hidden]:
        """The residual stream before the first layer, block by block."""
        stream = []
        for start, tokens in sequences:
            embedded = self._decoder.embed(torch.tensor(tokens, device=self._device))
            for offset in range(0, len(tokens), self._block_tokens):
                # A copy: a view would keep the embeddings of the whole prompt.
                block = embedded[offset : offset + self._block_tokens].clone()
                stream.append(Hidden(start + offset, block))
            del embedded
        return stream

    def _require_known(self, tokens: Sequence[int]) -> None:
        """Refuse what has no embedding, before anything is touched: a device does not survive it.

        Raises
        ------
        ContextLengthError
            When there are none.
        RunError
            Naming the token.
        """
        if not tokens:
            raise ContextLengthError("there are no tokens to run; expected at least one")
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self._vocab_size:
                raise RunError(
                    f"there is a token {token}, the model has 0 to {self._vocab_size - 1}; put the "
                    "model's own tokenizer.json beside it and pack again"
                )

    def _refusals_named(self) -> AbstractContextManager[None]:
        return refusals_named(self._device, self._planned_bytes)
