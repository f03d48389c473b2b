"""From a model, a machine and a budget to a plan that cannot lose.

Three sources of candidates: the optimiser (:mod:`moepack.optimiser`: per-layer budgets, splits,
policies and prefetching by the closed form, fitted on *fit*), every strategy that peers use
(:mod:`moepack.strategies`), and the same two at smaller budgets, so that more memory never makes a
plan slower. All are replayed on *select* (:mod:`moepack.replay`) for ``TTFT + (new tokens - 1) *
TPOT``, and the best that this engine can run is the plan. What is reported, of the plan and of
every strategy, is replayed on *test*, which nothing was chosen by; near ties may turn there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moepack.budget import slow_bytes
from moepack.cost import LinkSeconds, throttled
from moepack.errors import BudgetTooSmallError
from moepack.forecast import Baseline, PlannerReport, Prediction, Provenance
from moepack.low_copies import with_low_copies, without_low_copies
from moepack.optimised import Optimised
from moepack.optimiser import Optimum
from moepack.plan import PLAN_VERSION, Plan
from moepack.plan_request import (
    PlanRequest,
    max_context_tokens,
    require_budget,
    require_host_memory,
    require_matching,
    with_calibration,
    within_device,
)
from moepack.progress import NO_PROGRESS, Progress
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.routing_tables import RoutingTables
from moepack.strategies import Contender, Strategies
from moepack.trace import RoutingPart
from moepack.units import format_size

#: Factor within which measured times are expected on a quiet machine, by where the compute times
#: come from; it widens by the spread that was seen while they were measured.
MEASURED_BAND = 1.35
DERIVED_BAND = 2.0

#: By what factor the closed form must find a smaller budget dearer for it to be left out.
CLEARLY_DEARER = 1.25


def make_plan(request: PlanRequest, progress: Progress = NO_PROGRESS) -> Plan:
    """Make the best plan for a request.

    Raises
    ------
    BudgetTooSmallError
        When not even one expert in flight fits, naming the missing bytes; or when the plan does
        not fit the host's memory.
    PlanMismatchError
        When a profile or a layout is another model's.
    """
    return Planner(request).plan(request.fast_budget_bytes, progress)


class Planner:
    """Plans for one model on one machine, at any budget; the routing is tabulated once.

    Parameters
    ----------
    request
        Its budget is what :meth:`plan` is given.
    tables
        Those of ``request.routing`` where they are known already.

    Raises
    ------
    PlanMismatchError
        When a profile or a layout is another model's.
    """

    def __init__(self, request: PlanRequest, tables: RoutingTables | None = None) -> None:
        require_matching(request)
        self.request = request
        self.tables = tables or RoutingTables(request.routing)
        link: LinkSeconds = request.hardware.link_seconds
        self.link = link if request.link is None else throttled(link, *request.link)
        self._optimised = Optimised(without_low_copies(request), self.tables, self.link)
        self._replayers: dict[RoutingPart, Replayer] = {}
        self._prices: dict[tuple[object, ...], Replayed] = {}
        self._events = 0

    def price(self, contender: Contender, part: RoutingPart) -> Replayed:
        """Replay a contender on a part of the trace."""
        placed = replace(contender.placement, fast_budget_bytes=0)
        key = (contender.layout, placed, contender.as_ready, contender.oracle, part)
        if key not in self._prices:
            if part not in self._replayers:
                self._replayers[part] = Replayer(
                    self.request.spec,
                    self.request.compute,
                    self.tables,
                    self.link,
                    prompt_tokens=self.request.prompt_tokens,
                    part=part,
                    disk=self.request.hardware.disk.seconds,
                )
            found = self._replayers[part].replay(
                contender.layout,
                contender.placement,
                as_ready=contender.as_ready,
                oracle=contender.oracle,
            )
            self._prices[key] = found
            self._events += found.events
        return self._prices[key]

    def plan(self, fast_budget_bytes: int, progress: Progress = NO_PROGRESS) -> Plan:
        """The best plan for a budget.

        Raises
        ------
        BudgetTooSmallError
            As :func:`make_plan`.
        """
        began_s, began_events = time.perf_counter(), self._events
        request = within_device(replace(self.request, fast_budget_bytes=fast_budget_bytes))
        require_budget(request)
        whole, request = request, without_low_copies(request)
        strategies = list(Strategies(request, self.tables).all())
        strategies += filter(None, [self._optimised.moepic(request)])
        resident = next(each for each in strategies if each.name == "resident")
        # Nothing beats having everything there.
        search = bool(resident.why_not)
        optimised, optimum = self._optimised.contenders(request) if search else ([], None)
        below = [] if optimum is None else list(self._below(request, optimum))
        # Of equals the first: the resident one before those that hold everything as well.
        able = [each for each in (*reversed(strategies), *optimised, *below) if not each.why_not]
        able = _within_ram(able) or able
        if request.is_mixed:
            mixed = self.tables.classes(request.whole_layout.layers)
            mixed.step(each.placement.layers for each in able)
        progress.start("replay what could be planned", len(able), "items")
        try:
            for contender in able:
                self.price(contender, "select")
                progress.advance(1)
        finally:
            progress.done()
        best = self._fastest(able)
        return self._plan(
            whole,
            fast_budget_bytes,
            best,
            self._baselines(strategies),
            PlannerReport(
                seconds=time.perf_counter() - began_s,
                chosen=best.name,
                gap_to_exact=None if optimum is None else optimum.in_quanta.gap_to_exact,
                replayed_events=self._events - began_events,
            ),
        )

    def strategies(self, fast_budget_bytes: int) -> dict[str, Plan]:
        """Every strategy that this engine can run within a budget, as a plan of its own.

        Raises
        ------
        BudgetTooSmallError
            As :func:`make_plan`.
        """
        request = within_device(replace(self.request, fast_budget_bytes=fast_budget_bytes))
        require_budget(request)
        bare = without_low_copies(request)
        able = [each for each in Strategies(bare, self.tables).all() if not each.why_not]
        found = {}
        for name, variants in _by_name(able).items():
            report = PlannerReport(0.0, name, None, 0)
            chosen = self._fastest(variants)
            found[name] = self._plan(request, fast_budget_bytes, chosen, {}, report)
        return found

    def _plan(
        self,
        request: PlanRequest,
        asked_bytes: int,
        chosen: Contender,
        baselines: dict[str, Baseline],
        report: PlannerReport,
    ) -> Plan:
        """A contender with its low copies, and its forecast on *test*."""
        chosen = with_low_copies(request, chosen)
        placement = replace(chosen.placement, fast_budget_bytes=request.fast_budget_bytes)
        shortage = require_host_memory(request, placement)
        return Plan(
            version=PLAN_VERSION,
            model_name=request.spec.name,
            model_digest=request.spec.digest,
            max_context_tokens=max_context_tokens(request),
            layout=with_calibration(request, chosen.layout),
            placement=placement,
            prediction=_prediction(request, chosen, self.price(chosen, "test")),
            baselines=baselines,
            provenance=_provenance(request, asked_bytes, shortage),
            planner=report,
            assumed_engine=request.assumed_engine,
            link=request.link,
        )

    def _fastest(self, contenders: Sequence[Contender]) -> Contender:
        """By the price on *select*, which one that is alone is not asked for."""
        if len(contenders) == 1:
            return contenders[0]
        return min(contenders, key=lambda each: self.total_s(self.price(each, "select")))

    def total_s(self, price: Replayed) -> float:
        """What is minimised: the time of the whole generation."""
        return price.ttft_s + (self.request.new_tokens - 1) * price.tpot_s

    def _below(self, request: PlanRequest, best: Optimum) -> Iterator[Contender]:
        """What would be considered at the rungs below this budget, but for shared pools.

        What a pool holds, a larger one of the same policy holds too, so its passes never end later
        on an engine that loads on demand. The ladder ends where the closed form is dearer than
        here by far more than it errs.
        """
        for rung_bytes in rungs_below(request.fast_budget_bytes):
            smaller = replace(request, fast_budget_bytes=rung_bytes)
            try:
                require_budget(smaller)
            except BudgetTooSmallError:
                return
            optimised, there = self._optimised.contenders(smaller)
            if there is None or there.seconds > CLEARLY_DEARER * best.seconds:
                return
            yield from optimised
            for contender in Strategies(smaller, self.tables).layered():
                if not contender.why_not:
                    yield contender

    def _baselines(self, strategies: Sequence[Contender]) -> dict[str, Baseline]:
        """Of each strategy the best variant, as it does on *test*."""
        found = {}
        for name, variants in _by_name(strategies).items():
            chosen = self._fastest(variants)
            price = self.price(chosen, "test")
            found[name] = Baseline(
                price.ttft_s,
                price.tpot_s,
                price.hit_rate,
                price.link_bytes_per_token,
                eligible=not chosen.why_not,
                why_not=chosen.why_not,
            )
        return found


def _within_ram(contenders: Sequence[Contender]) -> list[Contender]:
    """Those whose host memory suffices: whole experts need larger bounces than cut ones."""
    hosts = [(each, each.placement.host) for each in contenders]
    return [each for each, host in hosts if host is None or host.total_bytes <= host.pinned_bytes]


def _by_name(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    """The variants of each strategy."""
    found: dict[str, list[Contender]] = {}
    for contender in contenders:
        found.setdefault(contender.name, []).append(contender)
    return found


def rungs_below(budget_bytes: int) -> Iterator[int]:
    """The fixed ladder below a budget, from the top: powers of two and one and a half times them.

    What is considered at a rung is considered at all larger budgets too, as far down as
    :data:`CLEARLY_DEARER` lets the ladder go. So among rungs a larger budget is never priced
    slower, and any budget never slower than the rungs below it.
    """
    rung_bytes = 1 << max(0, budget_bytes.bit_length())
    while rung_bytes > 1:
        for rung in (rung_bytes * 3 // 2, rung_bytes):
            if rung < budget_bytes:
                yield rung
        rung_bytes //= 2


def _prediction(request: PlanRequest, chosen: Contender, price: Replayed) -> Prediction:
    measured = request.compute.source == "measured" and not request.routing_is_assumed
    return Prediction(
        ttft_s=price.ttft_s,
        tpot_s=price.tpot_s,
        tokens_per_s=1.0 / price.tpot_s,
        hit_rate=price.hit_rate,
        ready_rate=price.ready_rate,
        link_bytes_per_token=price.link_bytes_per_token,
        fast_bytes=chosen.placement.memory.total_bytes,
        slow_bytes=slow_bytes(request.spec, chosen.layout),
        band=(MEASURED_BAND if measured else DERIVED_BAND) * (1.0 + request.compute.spread),
        disk_bytes_per_token=price.disk_bytes,
        yardstick_s=request.compute.yardstick_s,
        # Differences of times: rounding leaves less than nothing where nothing is waited for.
        ttft_wait_s=max(0.0, float(price.prompt_wait_s)),
        tpot_wait_s=max(0.0, float(price.layer_wait_s.sum())),
    )


def _provenance(request: PlanRequest, asked_bytes: int, shortage: str | None) -> Provenance:
    compute = request.compute
    assumptions = []
    if asked_bytes > request.fast_budget_bytes:
        assumptions.append(
            f"of the {format_size(asked_bytes)} asked for, {request.hardware.name} has "
            f"{format_size(request.fast_budget_bytes)} left for a model"
        )
    if shortage is not None:
        assumptions.append(shortage)
    if compute.source == "derived":
        assumptions.append("compute times are derived from the hardware profile by a roofline")
    if request.prompt_tokens > compute.context_tokens:
        assumptions.append(
            f"attention is priced behind {compute.context_tokens} tokens of context, the prompt "
            f"has {request.prompt_tokens}"
        )
    if request.routing_is_assumed:
        assumptions.append(f"how the model routes: {request.routing.summary.how}")
    if request.assumed_engine:
        assumptions.append("an engine that is not here yet: moepack run will refuse this plan")
    return Provenance(
        hardware=request.hardware.name,
        hardware_is_this_machine=request.hardware_is_this_machine,
        compute=f"{compute.source}, {compute.how}",
        routing=request.routing.summary.how,
        assumptions=tuple(assumptions),
    )
