"""The optimiser's candidates for a request: profiles in, contenders out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moepack.budget import fixed_bytes
from moepack.cost import LayerTimes, LinkSeconds, distinct_experts
from moepack.fixed_times import fixed_times
from moepack.layer_problem import (
    Cuts,
    DiskProblem,
    LayerProblem,
    PromptTimes,
    cut_options,
    kept_cut,
)
from moepack.layer_tables import Choice, LayerTable, tabulate_all
from moepack.layouts import PREFILL_BLOCK_TOKENS, cut_layout
from moepack.optimiser import Optimum, fixed_point_split, optimise
from moepack.placements import free_bytes, placement
from moepack.plan import EngineCapabilities, LayerPlacement, Layout
from moepack.plan_request import PlanRequest
from moepack.prompts import block_lengths
from moepack.routing_tables import RoutingTables
from moepack.strategies import FULL_ENGINE, Contender, Strategies
from moepack.tier_chances import TierChances

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
        kept = request.keep_layout
        self._encodings = request.encodings
        block_tokens = PREFILL_BLOCK_TOKENS if kept is None else kept.prefill_block_tokens
        self._blocks = block_lengths(request.prompt_tokens, block_tokens)
        self._digest = request.spec.digest
        self._token = fixed_times(request.spec, request.compute, (1,))
        self._prompt = fixed_times(request.spec, request.compute, self._blocks)
        self._chances = TierChances(request, tables)
        self._priced: dict[_Staged, list[LayerTable]] = {}

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
        the cuts are to stay what they are.
        """
        if request.keep_layout is not None:
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

    def _cuts(self) -> list[Cuts]:
        """What each layer may be cut at: as it is to be kept, or anywhere."""
        kept = self._request.keep_layout
        if kept is not None:
            return [kept_cut(self._request.spec, cut) for cut in kept.layers]
        return [self._cut_options(index) for index in range(len(self._encodings))]

    def _cut_options(self, index: int) -> Cuts:
        spec = self._request.spec
        return cut_options(spec, spec.moe_layers[index], self._encodings[index])

    def _fixed_points(self, share_bytes: int) -> list[Cuts]:
        """The one interior cut of each layer that is nearest to MoEpic's fixed point."""
        spec, found = self._request.spec, []
        curves = self._tables.fit_curves("lcp")
        for index, layer in enumerate(spec.moe_layers):
            options, moe = self._cut_options(index), spec.moe(layer)
            whole_bytes = int(options.top_bytes[0])
            window_share = self._window_s(index) / (moe.top_k * self._link(whole_bytes))
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

    def _window_s(self, index: int) -> float:
        """MoEpic's prefetch window: from the routing of the layer before to this layer's.

        ``W_i = T_moe(i - 1) + T_attn(i)``; before the first layer lies the last, a token earlier.
        """
        before = self._tables.layers[index - 1]
        entry = self._request.compute.layer(before.layer)
        expert = entry.expert_times(self._encodings[index - 1], cut=True)
        moe_s = before.top_k * expert.at(1) + float(self._token.after_s[index - 1])
        return moe_s + self._gap_s(index)

    def _price(self, asked: Sequence[_Staged], top_k: int) -> None:
        """Tabulate what has not been yet; amounts of staging that are ample all at once."""
        missing = [each for each in asked if each not in self._priced]
        # Where something is read from the disk, a prompt's price depends on the frames themselves.
        enough = max(2, top_k) if self._chances.places is None else math.inf
        ample = [each for each in missing if each[0] >= enough]
        for some in (ample, *([each] for each in missing if each not in ample)):
            if some:
                tables = self._tabulate(some, self._cuts())
                self._priced.update(zip(some, map(list, zip(*tables, strict=True)), strict=True))

    def _tabulate(
        self, asked: Sequence[_Staged], cuts: Sequence[Cuts]
    ) -> Iterator[list[LayerTable]]:
        """Of each layer a table for every amount of staging and what it lets an engine do."""
        for index, cut in enumerate(cuts):
            yield tabulate_all([self._problem(index, cut, *each) for each in asked])

    def _problem(
        self, index: int, cuts: Cuts, staging: int, engine: EngineCapabilities
    ) -> LayerProblem:
        """One layer with everything that decides its price."""
        request, tables = self._request, self._tables
        shape, entry = tables.layers[index], request.compute.layer(tables.layers[index].layer)
        stored = self._encodings[index]
        whole, split = (entry.expert_times(stored, cut=cut) for cut in (False, True))
        curves = {
            policy: tables.fit_curves(policy)[index, : shape.num_experts + 1]
            for policy in engine.policies
        }
        shares = tables.shares[index]
        hot = np.array(tables.hot[index])
        used = distinct_experts(shares, request.prompt_tokens, shape.top_k)[hot]
        # The shared expert hides behind the link as the others do.
        whole_s = split_s = float(self._prompt.after_s[index])
        for tokens in self._blocks:
            distinct = float(distinct_experts(shares, tokens, shape.top_k).sum())
            each = tokens * shape.top_k / distinct
            whole_s += distinct * whole.at(each)
            split_s += distinct * split.at(each)
        ahead = engine.max_prefetch_depth > 0
        ranks = 2 * shape.top_k if ahead else 0
        return LayerProblem(
            layer=shape.layer,
            top_k=shape.top_k,
            cuts=cuts,
            link=self._link,
            token=LayerTimes(
                float(self._token.before_s[index]),
                whole.at(1),
                entry.transfer_s,
                float(self._token.after_s[index]),
                entry.burst_s,
            ),
            split_s=split.at(1),
            prompt=PromptTimes(float(self._prompt.before_s[index]), whole_s, split_s),
            used=used,
            new_tokens=request.new_tokens,
            hits=curves,
            staging_experts=staging,
            engine=engine,
            gap_s=self._gap_s(index),
            guess_s=entry.guess_s(1),
            accuracy=tables.accuracy[index, :ranks],
            predicted_held={
                policy: tables.fit_cached(policy)[index, :ranks, : shape.num_experts + 1]
                for policy in (engine.policies if ahead else ())
            },
            disk=self._disk(index, engine),
        )

    def _disk(self, index: int, engine: EngineCapabilities) -> DiskProblem | None:
        """What of a layer RAM does not hold."""
        chances = self._chances
        if chances.places is None:
            return None
        shares = {policy: chances.shares(index, policy) for policy in engine.policies}
        return DiskProblem(
            self._request.hardware.disk.seconds,
            chances.bounces,
            chances.places[index],
            {policy: activated for policy, (activated, _) in shares.items()},
            {policy: predicted for policy, (_, predicted) in shares.items()},
        )

    def _gap_s(self, index: int) -> float:
        """Compute between the experts of the layer before and this layer's routing."""
        tail_s = self._token.tail_s if index == 0 else 0.0
        return float(self._token.before_s[index]) + tail_s

    def _contender(
        self, name: str, request: PlanRequest, optimum: Optimum, staging: int
    ) -> Contender:
        spec, kept = request.spec, request.keep_layout
        layout = kept or Layout(
            self._digest,
            tuple(
                cut_layout(spec, choice.layer, choice.split, stored)
                for choice, stored in zip(optimum.choices, self._encodings, strict=True)
            ),
            PREFILL_BLOCK_TOKENS,
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


def _spare_bytes(request: PlanRequest, tables: Sequence[LayerTable], staging: int) -> int:
    """What is left for slots beside staging for the largest expert, however it is cut."""
    frame_bytes = max(table.full_bytes // table.problem.num_experts for table in tables)
    fixed = fixed_bytes(
        request.spec,
        request.context_tokens,
        PREFILL_BLOCK_TOKENS
        if request.keep_layout is None
        else request.keep_layout.prefill_block_tokens,
        threads=request.compute.threads,
        encodings=frozenset(request.encodings),
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
    )
