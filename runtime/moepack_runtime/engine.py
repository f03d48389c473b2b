"""The engine: load, prefill, decode.

How tokens go through the layers is in :mod:`moepack_runtime.forward`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from typing import Self

import torch

from moepack.errors import RunError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Placement
from moepack_runtime.capabilities import require_fit
from moepack_runtime.device import prepare_device
from moepack_runtime.experts import ExpertMemory
from moepack_runtime.forward import Forward
from moepack_runtime.kv_cache import KvCache
from moepack_runtime.layer_loop import Hidden, LayerLoop
from moepack_runtime.live_routing import Replan, Replanning
from moepack_runtime.look_ahead import LookAhead
from moepack_runtime.memory import peak_resident_bytes, refusals_named
from moepack_runtime.model import Decoder
from moepack_runtime.observers import Observer, PassObserver, Timeline
from moepack_runtime.predict import NextRouter, Predictor
from moepack_runtime.progress import NO_PROGRESS, Progress
from moepack_runtime.rearranging import rearrange, require_same_slots
from moepack_runtime.sampling import Sampler
from moepack_runtime.stats import Meter, RunStats
from moepack_runtime.store import CheckMode, SegmentStore
from moepack_runtime.token_graphs import TokenGraphs
from moepack_runtime.transfer import LinkStatistics, Transfer


class Engine:
    """A model in execution: its trunk and cache, its slots, and the loop.

    Peak memory: what :func:`moepack.budget.memory_breakdown` says, allocated here and nowhere
    else. After an error inside a pass the engine must be opened again: its slots may hold
    anything.

    Parameters
    ----------
    store, transfer
        Where segments come from, and what moves them. The engine closes both.
    layout, placement
        What exists and what happens with it.
    check
        Whether the trunk is compared with its checksums; the transfer has its own.
    predictor
        Guesses the next layer's experts where the plan fetches ahead; default: its router.
    progress
        Of the loading.

    Raises
    ------
    CapabilityError, BudgetTooSmallError, PlanMismatchError, DeviceError
        Before anything is allocated.
    OutOfMemoryError
        When the device does not give what is planned; a step may raise it, too.
    TransferError, DamagedSegmentError
        When the trunk or a segment does not arrive whole.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        placement: Placement,
        *,
        store: SegmentStore,
        transfer: Transfer,
        check: CheckMode = CheckMode.FIRST,
        predictor: Predictor | None = None,
        process_base_bytes: int = 0,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        require_fit(spec, layout, placement)
        self.spec = spec
        self._placement = placement
        self._transfer = transfer
        self._process_base_bytes = process_base_bytes
        self.device = torch.device(placement.device)
        with refusals_named(self.device, placement.memory.total_bytes):
            recording = None
            if self.device.type == "cuda":
                recording = prepare_device(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                self._others_bytes = torch.cuda.memory_allocated(self.device)
            self.kv = KvCache.allocate(
                spec,
                context_tokens=placement.context_tokens,
                block_tokens=layout.prefill_block_tokens,
                device=self.device,
            )
            self.decoder = Decoder(spec, store.load_trunk(check, self.device, progress), self.kv)
            self._experts = ExpertMemory(
                spec,
                layout,
                placement.layers,
                staging_experts=placement.staging_experts,
                transfer=transfer,
                pool=placement.pool,
                on_miss=placement.on_miss,
            )
            self._experts.warm(progress)
            self._predictor = predictor or NextRouter(self.decoder.layers)
            look_ahead = LookAhead(spec, placement, self._experts, self._predictor)
            self.token_graphs: TokenGraphs | None = None
            if recording is not None:
                self._experts.prepare(spec)
                self.token_graphs = TokenGraphs(
                    spec, self.decoder, self.kv, recording, look_ahead.recordable()
                )
        meter = Meter(0, transfer.statistics)
        self._loop = LayerLoop(
            spec, self.decoder, self.kv, self._experts, look_ahead, meter, self.token_graphs
        )
        self._forward = Forward(spec, layout, placement, self.decoder, self.kv, self._loop)
        self._replanning: Replanning | None = None
        self._drawn: int | None = None  # behind what is in the cache: drawn, and not yet run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the transfer's readers and let go of the files."""
        self._transfer.close()

    def observe(self, observer: Observer | None) -> None:
        """Show every routing decision to ``observer`` from now on."""
        self._loop.watching.routing = observer

    def observe_passes(self, observer: PassObserver | None) -> None:
        """Show what every pass finds to ``observer`` from now on."""
        self._loop.watching.passes = observer

    def observe_time(self, timeline: Timeline | None) -> None:
        """Show ``timeline`` from now on when things happen."""
        self._loop.watching.time = timeline
        self._experts.observe_time(timeline)

    def replan_every(self, tokens: int, replan: Replan) -> None:
        """Every so many tokens, between two generations, ask for better layers and take them.

        Prompts count as well. What is remembered of the routing, 2 bytes an activation, is
        allocated here and is no part of the fast tier.
        """
        self._replanning = Replanning(self.spec, replan, tokens)
        self._loop.watching.live = self._replanning.window

    def rearrange(self, layers: Sequence[LayerPlacement]) -> int:
        """Let the layers have other numbers of slots, between two passes.

        Memory changes hands and none is allocated; what comes is loaded and waited for. The bits
        of what is generated stay the same.

        Parameters
        ----------
        layers
            The placement's, but for slots, budgets and hot rankings.

        Returns
        -------
        int
            Bytes of the slots that a layer has and did not have before.

        Raises
        ------
        PlanMismatchError
            When anything else would change, or all layers share their slots.
        BudgetTooSmallError
            When there are not so many slots of one size; nothing has changed then.
        TransferError, DamagedSegmentError
            When a segment does not arrive whole; the engine must then be opened again.
        """
        self._forward.require_whole()
        require_same_slots(self._placement, self._experts, layers)
        self._forward.broken = True  # until all has been loaded
        moved_bytes = rearrange(self._experts, layers)
        self._forward.broken = False
        self._placement = replace(self._placement, layers=tuple(layers))
        self._loop.look_ahead = LookAhead(
            self.spec, self._placement, self._experts, self._predictor
        )
        return moved_bytes

    @property
    def placement(self) -> Placement:
        """What is carried out; its layers are those of the last rearrangement."""
        return self._placement

    @property
    def process_base_bytes(self) -> int:
        """What the process took of host memory before the engine was opened."""
        return self._process_base_bytes

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self.kv.length

    @property
    def link(self) -> LinkStatistics:
        """What went over the link since the engine was opened."""
        return self._transfer.statistics

    def reset(self) -> None:
        """Forget the sequence; what is cached of the experts stays."""
        self._forward.reset()
        self._drawn = None

    def stats(self) -> RunStats:
        """Of the last (or current) generation."""
        return self._loop.meter.stats(
            self._transfer.statistics,
            peak_fast_bytes=self._peak_fast_bytes(),
            peak_process_bytes=peak_resident_bytes(),
            process_base_bytes=self._process_base_bytes,
            replaces=self._placement.on_miss is not None,
        )

    def _peak_fast_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._others_bytes
        memory = self._placement.memory
        # Slots, frames and cache are what was allocated; hidden states and temporaries live inside
        # their reservation.
        held = self._experts.allocated_bytes + self.kv.size_bytes + memory.trunk_bytes
        return held + memory.hidden_bytes + memory.workspace_bytes

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        stop_ids: Collection[int] = (),
        progress: Progress = NO_PROGRESS,
    ) -> Generator[int]:
        """Yield new tokens as they are drawn; a stop token ends the text and is yielded last.

        Parameters
        ----------
        max_new_tokens
            One or more.
        progress
            Of the prompt.

        Raises
        ------
        ValueError
            When no new token is asked for.
        ContextLengthError
            When prompt and new tokens exceed the planned context.
        RunError
            When the prompt has a token that the model does not know.
        TransferError, DamagedSegmentError
            When a segment does not arrive whole.
        """
        if max_new_tokens < 1:
            raise ValueError(f"{max_new_tokens} new tokens; expected at least one")
        self._forward.require_room(len(prompt), max_new_tokens)
        self._plan_again()
        self.reset()
        meter = self._loop.meter = Meter(len(prompt), self._transfer.statistics)
        meter.begin(self._transfer.statistics)
        token = self._drawn = sampler.draw(self.prefill(prompt, progress))
        meter.first_token()
        yield token
        if token not in stop_ids:
            yield from self._go_on(max_new_tokens - 1, sampler, stop_ids)

    def resume(
        self, *, max_new_tokens: int, sampler: Sampler, stop_ids: Collection[int] = ()
    ) -> Generator[int]:
        """Go on with a generation that was stopped, from the cache as it is.

        The tokens are those that it would have drawn, if the sampler is the same one.

        Raises
        ------
        RunError
            When there is nothing to go on with: no generation, or one that ended inside a step.
        ContextLengthError
            When the new tokens exceed the planned context.
        TransferError, DamagedSegmentError
            When a segment does not arrive whole.
        """
        if self._drawn is None:
            raise RunError(
                "there is no generation to go on with: expected one that was stopped between two "
                "tokens; generate"
            )
        self._forward.require_room(self.kv.length + 1, max_new_tokens)
        yield from self._go_on(max_new_tokens, sampler, stop_ids)

    def _plan_again(self) -> None:
        better = None if self._replanning is None else self._replanning.ask()
        if better is not None:
            self.rearrange(better)

    def _go_on(
        self, new_tokens: int, sampler: Sampler, stop_ids: Collection[int]
    ) -> Generator[int]:
        for _ in range(new_tokens):
            token = self._drawn
            assert token is not None
            self._loop.meter.begin(self._transfer.statistics)
            token = self._drawn = sampler.draw(self.decode(token))
            self._loop.meter.next_token(self._transfer.statistics)
            yield token
            if token in stop_ids:
                return

    def prefill(self, tokens: Sequence[int], progress: Progress = NO_PROGRESS) -> torch.Tensor:
        """Run tokens behind what is in the cache.

        Returns
        -------
        Tensor
            float32 [vocab]: the logits after the last token.
        """
        return self.forward(tokens, progress=progress)[-1]

    def decode(self, token: int) -> torch.Tensor:
        """Run one token. Returns the logits after it, float32 [vocab]."""
        return self.forward([token])[-1]

    def forward(
        self,
        tokens: Sequence[int],
        *,
        all_logits: bool = False,
        progress: Progress = NO_PROGRESS,
    ) -> torch.Tensor:
        """Run tokens behind what is in the cache; see :meth:`Forward.forward`."""
        self._drawn = None  # it is in the cache from here on, or the pass fails
        return self._forward.forward(tokens, all_logits=all_logits, progress=progress)

    def last_state(self, tokens: Sequence[int]) -> torch.Tensor:
        """The same without the head: [1, hidden] of the last token, for :meth:`logits`."""
        self._drawn = None
        return self._forward.last_state(tokens)

    def survey(
        self, sequences: Sequence[Sequence[int]], progress: Progress = NO_PROGRESS
    ) -> list[Hidden]:
        """Run many sequences at once; see :meth:`Forward.survey`. The cache is empty afterwards."""
        self._drawn = None
        return self._forward.survey(sequences, progress)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What final norm and head make of [tokens, hidden]; see :meth:`Forward.logits`."""
        return self._forward.logits(hidden)
