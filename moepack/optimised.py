"""The optimiser's candidates for a request: profiles in, contenders out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moepack.budget import fixed_bytes
from moepack.cost import LinkSeconds
from moepack.layer_problem import Cuts
from moepack.layer_tables import Choice, LayerTable, tabulate_all
from moepack.layout import Layout
from moepack.layouts import PREFILL_BLOCK_TOKENS, cut_layout
from moepack.mixed_tables import MixedTable, tabulate_mixed
from moepack.optimiser import Optimum, fixed_point_split, optimise
from moepack.placements import free_bytes, placement
from moepack.plan import EngineCapabilities, LayerPlacement
from moepack.plan_request import PlanRequest
from moepack.problems import Problems
from moepack.routing_tables import RoutingTables
from moepack.strategies import FULL_ENGINE, Contender, Strategies

#: Experts in flight, and what an engine can do with them.
_Staged = tuple[int, EngineCapabilities]


class Optimised:
    """Candidates for one model on one machine, at any budget.

    What may be chosen is priced once for each amount of staging; budgets only divide.
    """

    def __init__(self, request: PlanRequest, tables: RoutingTables, link: LinkSeconds) -> None:
        self._request = request
        self._tables = tables
        self._link = link
        self._digest = request.spec.digest
        self._problems = Problems(request, tables, link)
        self._priced: dict[_Staged, list[LayerTable | MixedTable]] = {}

    def contenders(self, request: PlanRequest) -> tuple[list[Contender], Optimum | None]:
        """The best division for every useful amount of staging, and the best of them.

        Returns
        -------
        contenders : list of Contender
        best : Optimum or None
            By the closed form; None where nothing fits.
        """
        strategies = Strategies(request, self._tables)
        found: list[tuple[Optimum, Contender]] = []
        asked = [
            (staging, within_staging(request.engine, staging, strategies.top_k))
            for staging in strategies.staging_amounts()
        ]
        self._price(asked, strategies.top_k)
        for staging, engine in asked:
            tables = self._priced[staging, engine]
            spare_bytes = _spare_bytes(request, tables, staging)
            if spare_bytes >= 0:
                optimum = optimise(tables, spare_bytes)
                contender = self._contender("optimised", request, optimum, staging)
                found.append((optimum, contender))
        best = min((each for each, _ in found), key=lambda each: each.seconds, default=None)
        return [contender for _, contender in found], best

    def moepic(self, request: PlanRequest) -> Contender | None:
        """MoEpic as published (arXiv 2509.08342): LCP, every expert cut, prefetching.

        The split of a layer is the fixed point at its even share, moved to where the kernels can
        cut; budgets are exchanged between layers from there. None where it does not fit, or where
        the cuts are to stay what they are, or experts of a layer are stored in several encodings.
        """
        if request.keep_layout is not None or request.is_mixed:
            return None
        strategies = Strategies(request, self._tables)
        top_k = strategies.top_k
        staging = 2 * top_k
        engine = replace(
            FULL_ENGINE, policies=("lcp",), prefetch=("all",), max_prefetch_depth=top_k
        )
        spare_bytes = free_bytes(request, request.even_layout(1.0), staging)
        if spare_bytes < 0:
            return None
        cuts = self._fixed_points(spare_bytes // len(request.spec.moe_layers))
        tables = [each for (each,) in self._tabulate([(staging, engine)], cuts)]
        spare_bytes = _spare_bytes(request, tables, staging)  # cut experts are padded, so less
        if spare_bytes < 0:
            return None
        made = self._contender("moepic", request, optimise(tables, spare_bytes), staging)
        return made._replace(why_not=strategies.why_not(made.layout, made.placement))

    def _fixed_points(self, share_bytes: int) -> list[Cuts]:
        """The one interior cut of each layer that is nearest to MoEpic's fixed point."""
        spec, found = self._request.spec, []
        curves = self._tables.fit_curves("lcp")
        for index, layer in enumerate(spec.moe_layers):
            options, moe = self._problems.options(index), spec.moe(layer)
            whole_bytes = int(options.top_bytes[0])
            window_share = self._problems.window_s(index) / (moe.top_k * self._link(whole_bytes))
            hits = curves[index, : moe.num_experts + 1]
            ratio = fixed_point_split(window_share, share_bytes / whole_bytes, hits)
            interior = np.flatnonzero(options.interior)
            places = interior if len(interior) else np.arange(1)
            far = np.abs(options.splits[places] - ratio * options.width)
            place = places[far.argmin()]
            found.append(
                Cuts(
                    options.splits[[place]],
                    options.width,
                    options.top_bytes[[place]],
                    options.bottom_bytes[[place]],
                )
            )
        return found

    def _price(self, asked: Sequence[_Staged], top_k: int) -> None:
        """Tabulate what has not been yet; amounts of staging that are ample all at once."""
        missing = [each for each in asked if each not in self._priced]
        # Where something is read from the disk, a prompt's price depends on the frames themselves.
        enough = max(2, top_k) if self._problems.chances.places is None else math.inf
        ample = [each for each in missing if each[0] >= enough]
        for some in (ample, *([each] for each in missing if each not in ample)):
            if some:
                tables = self._tabulate(some)
                self._priced.update(zip(some, map(list, zip(*tables, strict=True)), strict=True))

    def _tabulate(
        self, asked: Sequence[_Staged], cuts: Sequence[Cuts] | None = None
    ) -> Iterator[Sequence[LayerTable | MixedTable]]:
        """Of each layer a table for every amount of staging and what it lets an engine do.

        ``cuts``: where to cut each; None: wherever it may be.
        """
        problems = self._problems
        for index, cut in enumerate(problems.cuts):
            if cut.encodings:
                yield tabulate_mixed([problems.mixed(index, *each) for each in asked])
                continue
            mine = problems.options(index) if cuts is None else cuts[index]
            yield tabulate_all([problems.problem(index, mine, *each) for each in asked])

    def _contender(
        self, name: str, request: PlanRequest, optimum: Optimum, staging: int
    ) -> Contender:
        spec, kept = request.spec, request.keep_layout
        layout = kept or Layout(
            self._digest,
            tuple(
                cut if cut.encodings else cut_layout(spec, cut.layer, choice.split, cut.encoding)
                for choice, cut in zip(optimum.choices, self._problems.cuts, strict=True)
            ),
            PREFILL_BLOCK_TOKENS,
            trunk=request.trunk,
        )
        layers = [
            _place(index, choice, self._tables) for index, choice in enumerate(optimum.choices)
        ]
        made = placement(request, layout, layers, staging_experts=staging)
        return Contender(name, layout, made, request.engine.as_ready)


def within_staging(engine: EngineCapabilities, staging: int, top_k: int) -> EngineCapabilities:
    """What an engine can do with so much staging: experts of two layers share it."""
    depth = max(0, min(engine.max_prefetch_depth, staging - top_k))
    return replace(
        engine,
        prefetch=engine.prefetch if depth else ("off",),
        max_prefetch_depth=depth,
    )


def _spare_bytes(
    request: PlanRequest, tables: Sequence[LayerTable | MixedTable], staging: int
) -> int:
    """What is left for slots beside staging for the largest expert, however it is cut."""
    frame_bytes = max(table.frame_bytes for table in tables)
    fixed = fixed_bytes(
        request.spec,
        request.context_tokens,
        PREFILL_BLOCK_TOKENS
        if request.keep_layout is None
        else request.keep_layout.prefill_block_tokens,
        threads=request.compute.threads,
        encodings=request.encodings,
        trunk=request.trunk,
    )
    return request.fast_budget_bytes - fixed - staging * frame_bytes


def _place(index: int, choice: Choice, tables: RoutingTables) -> LayerPlacement:
    return LayerPlacement(
        layer=choice.layer,
        budget_bytes=choice.budget_bytes,
        top_slots=choice.tops,
        bottom_slots=choice.bottoms,
        policy=choice.policy,
        hot=tables.hot[index],
        prefetch=choice.prefetch,
        prefetch_depth=choice.depth,
        half_life_tokens=tables.half_life(index, choice.policy),
        class_slots=choice.classes,
    )
