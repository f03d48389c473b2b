"""What a run measured, in the fields that a plan predicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import add
from time import perf_counter

from moepack.records import record
from moepack_runtime.pass_report import NO_PASS, PassReport, total
from moepack_runtime.transfer import LinkStatistics


@record
class LayerStats:
    """One layer with experts, over the decoded tokens.

    Attributes
    ----------
    hit_rate, ready_rate, recall : float
        As in :class:`RunStats`.
    wait_s_per_token : float
        Mean time of a token during which the processor waited for this layer's segments.
    """

    layer: int
    hit_rate: float
    ready_rate: float
    recall: float | None
    wait_s_per_token: float


@record
class RunStats:
    """One generation. What says nothing else is of its decoding: of every token but the first.

    Bytes belong to the token that they were fetched for. So what was fetched ahead for the second
    token counts, even if it crossed the link while the prompt was still being computed; what was
    fetched ahead for a token that was never asked for does not.

    Attributes
    ----------
    ttft_s : float
        From the prompt's tokens to the first new token.
    tpot_s : float or None
        Mean time of each further token; None where there was none.
    hit_rate, ready_rate : float or None
        Of the experts activated: those whose cached part was resident, and those that were whole in
        the fast tier when the routing was known, fetched ahead or not.
    recall : float or None
        Of the experts activated, those that the prediction named, to the depth that the plan looks
        at; None where nothing was predicted.
    link_bytes_per_token : float or None
        Bytes over the link, the sum of ``demand_bytes_per_token`` (asked for after routing) and,
        where there were predictions, of what was fetched ahead and then used, or not.
    link_busy_fraction : float or None
        Part of the decoding time during which the link had work.
    link_bytes_per_s : float or None
        Bytes over the time during which the link had work, prompt included.
    mean_read_bytes : float or None
        Mean size of one transfer, prompt included.
    wait_s : float or None
        Time during which the processor waited for the link. A GPU may have been at work on what
        it had been given before: there it is an upper bound of what the link has cost.
    layers : tuple of LayerStats
        Of each layer with experts; empty where nothing was decoded.
    peak_fast_bytes : int
        The most of the fast tier that the model took. On CUDA as its allocator counted it; on a
        processor slots, frames and cache as allocated, and hidden states and temporaries as
        reserved (the tests hold every step to that reservation).
    peak_process_bytes : int or None
        The most RAM that the process occupied since the model began to load, shared libraries
        included (since it began at all, where the kernel does not let it be reset).
    process_base_bytes : int
        Resident memory of the interpreter and its libraries before the model was loaded.
    substituted_per_token, skipped_per_token : float or None
        Experts that were missing and were replaced by their low copies, or left out; None where the
        plan does neither.
    substituted_rate, skipped_rate : float or None
        The same of the experts activated.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_s: float | None
    tokens_per_s: float | None
    prefill_tokens_per_s: float
    hit_rate: float | None
    ready_rate: float | None
    recall: float | None
    link_bytes_per_token: float | None
    demand_bytes_per_token: float | None
    ahead_used_bytes_per_token: float | None
    ahead_wasted_bytes_per_token: float | None
    link_busy_fraction: float | None
    link_bytes_per_s: float | None
    mean_read_bytes: float | None
    wait_s: float | None
    layers: tuple[LayerStats, ...]
    peak_fast_bytes: int
    peak_process_bytes: int | None
    process_base_bytes: int
    substituted_per_token: float | None = None
    skipped_per_token: float | None = None
    substituted_rate: float | None = None
    skipped_rate: float | None = None


@dataclass
class Meter:
    """Accumulates one generation; :meth:`stats` reads it off.

    A token that was begun and not drawn (an interrupt, an error) leaves no trace in it, nor do
    passes that are run for other ends than to generate.
    """

    prompt_tokens: int
    link_at_start: LinkStatistics
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decoded: int = 0
    _busy_s: float = 0.0  # of the link, while decoding
    _layers: dict[int, PassReport] = field(default_factory=dict)  # of the tokens decoded
    _began_s: float | None = None  # of the forward pass under way
    _busy_at_begin_s: float = 0.0
    _token: list[tuple[int, PassReport]] = field(default_factory=list)  # of the same pass

    def begin(self, link: LinkStatistics) -> None:
        """Start the clock of one forward pass."""
        self._token.clear()
        self._busy_at_begin_s = link.busy_s
        self._began_s = perf_counter()

    def count(self, layer: int, report: PassReport) -> None:
        """Add one pass over one layer."""
        if self._began_s is not None:
            self._token.append((layer, report))

    def first_token(self) -> None:
        """The prompt is done and its token drawn."""
        self.ttft_s = self._end()

    def next_token(self, link: LinkStatistics) -> None:
        """One further token is drawn."""
        self.decode_s += self._end()
        self.decoded += 1
        self._busy_s += link.busy_s - self._busy_at_begin_s
        for layer, report in self._token:
            self._layers[layer] = PassReport(*map(add, self._layers.get(layer, NO_PASS), report))

    def _end(self) -> float:
        """How long the pass took that ends here."""
        assert self._began_s is not None, "a token without a pass"
        seconds = perf_counter() - self._began_s
        self._began_s = None
        return seconds

    def stats(
        self,
        link: LinkStatistics,
        *,
        peak_fast_bytes: int,
        peak_process_bytes: int | None,
        process_base_bytes: int,
        replaces: bool = False,
    ) -> RunStats:
        """What has been measured so far; ``replaces``: missing experts may be, or be left out."""
        decoded = self.decoded
        whole = total(list(self._layers.values()))
        ahead_bytes = whole.ahead_used_bytes + whole.ahead_wasted_bytes
        ahead = whole.predicted > 0 or ahead_bytes > 0
        total_bytes = link.bytes - self.link_at_start.bytes
        total_busy_s = link.busy_s - self.link_at_start.busy_s
        total_reads = link.reads - self.link_at_start.reads
        return RunStats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=decoded + (self.ttft_s > 0),
            ttft_s=self.ttft_s,
            tpot_s=self.decode_s / decoded if decoded else None,
            tokens_per_s=decoded / self.decode_s if decoded else None,
            prefill_tokens_per_s=self.prompt_tokens / self.ttft_s if self.ttft_s else 0.0,
            hit_rate=_share(whole.hits, whole.activations),
            ready_rate=_share(whole.ready, whole.activations),
            recall=_share(whole.recalled, whole.predicted),
            link_bytes_per_token=_share(whole.demand_bytes + ahead_bytes, decoded),
            demand_bytes_per_token=_share(whole.demand_bytes, decoded),
            ahead_used_bytes_per_token=_share(whole.ahead_used_bytes, decoded * ahead),
            ahead_wasted_bytes_per_token=_share(whole.ahead_wasted_bytes, decoded * ahead),
            link_busy_fraction=self._busy_s / self.decode_s if decoded else None,
            link_bytes_per_s=_share(total_bytes, total_busy_s) if total_bytes else None,
            mean_read_bytes=_share(total_bytes, total_reads) if total_bytes else None,
            wait_s=whole.wait_s if decoded else None,
            layers=tuple(
                LayerStats(
                    layer=layer,
                    hit_rate=report.hits / report.activations,
                    ready_rate=report.ready / report.activations,
                    recall=_share(report.recalled, report.predicted),
                    wait_s_per_token=report.wait_s / decoded,
                )
                for layer, report in sorted(self._layers.items())
            ),
            peak_fast_bytes=peak_fast_bytes,
            peak_process_bytes=peak_process_bytes,
            process_base_bytes=process_base_bytes,
            substituted_per_token=_share(whole.substituted, decoded * replaces),
            skipped_per_token=_share(whole.skipped, decoded * replaces),
            substituted_rate=_share(whole.substituted, whole.activations * replaces),
            skipped_rate=_share(whole.skipped, whole.activations * replaces),
        )


def _share(part: float, whole: float) -> float | None:
    """None where there is nothing to have a share of."""
    return part / whole if whole else None
