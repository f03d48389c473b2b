"""What a run measured, in the fields that a plan predicts."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from moepack.records import record
from moepack_runtime.experts import LayerCounts
from moepack_runtime.transfer import LinkStatistics


@record
class RunStats:
    """One generation.

    Attributes
    ----------
    ttft_s : float
        From the prompt's tokens to the first new token.
    tpot_s : float or None
        Mean time of each further token; None where there was none.
    hit_rate, ready_rate : float or None
        Of the experts activated while decoding: those whose cached part was resident, and those
        that were whole in the fast tier when needed.
    link_bytes_per_token : float or None
        Bytes over the link per decoded token; ``demand_bytes_per_token`` is the part that was
        asked for after routing.
    link_busy_fraction : float or None
        Part of the decoding time during which the link had work.
    link_bytes_per_s : float or None
        Bytes over the time during which the link had work, over the whole generation.
    mean_read_bytes : float or None
        Mean size of one transfer.
    wait_s : float or None
        Time during which the compute waited for the link while decoding; None on a GPU, which
        waits by itself.
    peak_fast_bytes : int
        The most of the fast tier that the model took. On CUDA as its allocator counted it; on a
        processor slots, frames and cache as allocated, and hidden states and temporaries as
        reserved (the tests hold every step to that reservation).
    process_base_bytes : int
        Resident memory of the interpreter and its libraries before the model was loaded.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    tokens_per_s: float | None
    prefill_tokens_per_s: float
    hit_rate: float | None
    ready_rate: float | None
    link_bytes_per_token: float | None
    demand_bytes_per_token: float | None
    link_busy_fraction: float | None
    link_bytes_per_s: float | None
    mean_read_bytes: float | None
    wait_s: float | None
    peak_fast_bytes: int
    process_base_bytes: int


@dataclass
class Meter:
    """Accumulates one generation; :meth:`stats` reads it off."""

    prompt_tokens: int
    link_at_start: LinkStatistics
    link_at_first: LinkStatistics | None = None
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decoded: int = 0
    activations: int = 0
    hits: int = 0
    ready: int = 0
    wait_s: float = 0.0
    _began_s: float = 0.0

    def begin(self) -> None:
        """Start the clock of one forward pass."""
        self._began_s = perf_counter()

    def first_token(self, link: LinkStatistics) -> None:
        """The prompt is done and its token drawn."""
        self.ttft_s = perf_counter() - self._began_s
        self.link_at_first = link
        self.activations = self.hits = self.ready = 0
        self.wait_s = 0.0

    def next_token(self) -> None:
        """One further token is drawn."""
        self.decode_s += perf_counter() - self._began_s
        self.decoded += 1

    def count(self, counts: LayerCounts) -> None:
        """Add one pass over one layer."""
        self.activations += counts.activations
        self.hits += counts.hits
        self.ready += counts.ready

    def stats(
        self,
        link: LinkStatistics,
        *,
        processor_waits: bool,
        peak_fast_bytes: int,
        process_base_bytes: int,
    ) -> RunStats:
        """What has been measured so far.

        Parameters
        ----------
        processor_waits
            Whether the link is waited for by the processor, whose clock this is.
        """
        first = self.link_at_first or link
        decoded = self.decoded
        decode_bytes = link.bytes - first.bytes
        total_bytes = link.bytes - self.link_at_start.bytes
        total_busy_s = link.busy_s - self.link_at_start.busy_s
        total_reads = link.reads - self.link_at_start.reads
        per_token = decode_bytes / decoded if decoded else None
        return RunStats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=decoded + (self.ttft_s > 0),
            ttft_s=self.ttft_s,
            tpot_s=self.decode_s / decoded if decoded else None,
            tokens_per_s=decoded / self.decode_s if decoded else None,
            prefill_tokens_per_s=self.prompt_tokens / self.ttft_s if self.ttft_s else 0.0,
            hit_rate=self.hits / self.activations if decoded and self.activations else None,
            ready_rate=self.ready / self.activations if decoded and self.activations else None,
            link_bytes_per_token=per_token,
            demand_bytes_per_token=per_token,
            link_busy_fraction=(link.busy_s - first.busy_s) / self.decode_s if decoded else None,
            link_bytes_per_s=total_bytes / total_busy_s if total_busy_s else None,
            mean_read_bytes=total_bytes / total_reads if total_reads else None,
            wait_s=self.wait_s if processor_waits else None,
            peak_fast_bytes=peak_fast_bytes,
            process_base_bytes=process_base_bytes,
        )
