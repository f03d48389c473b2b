"""What the optimiser sees of each layer of a request: profiles in, problems out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moepack.class_division import class_bytes
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
from moepack.layouts import PREFILL_BLOCK_TOKENS
from moepack.mixed_tables import MixedProblem
from moepack.plan import EngineCapabilities
from moepack.plan_request import PlanRequest
from moepack.prompts import block_lengths
from moepack.routing_tables import RoutingTables
from moepack.tier_chances import TierChances


class Problems:
    """Every layer of one request, for any amount of staging.

    Attributes
    ----------
    chances : TierChances
    cuts : tuple of LayerLayout
        Of every layer what its experts are stored in: as it is kept, or uncut.
    """

    def __init__(self, request: PlanRequest, tables: RoutingTables, link: LinkSeconds) -> None:
        kept = request.keep_layout
        self._request = request
        self._tables = tables
        self._link = link
        self.cuts = request.whole_layout.layers if kept is None else kept.layers
        block_tokens = PREFILL_BLOCK_TOKENS if kept is None else kept.prefill_block_tokens
        self._blocks = block_lengths(request.prompt_tokens, block_tokens)
        self._token = fixed_times(request.spec, request.compute, (1,))
        self._prompt = fixed_times(request.spec, request.compute, self._blocks)
        self.chances = TierChances(request, tables)

    def options(self, index: int) -> Cuts:
        """Where a layer may be cut: where it is, if that is to be kept, or anywhere."""
        cut = self.cuts[index]
        if self._request.keep_layout is not None or cut.encodings:
            return kept_cut(self._request.spec, cut)
        return cut_options(self._request.spec, cut.layer, cut.encoding)

    def problem(
        self, index: int, cuts: Cuts, staging: int, engine: EngineCapabilities
    ) -> LayerProblem:
        """A layer whose experts are stored alike, with everything that decides its price."""
        shape = self._tables.layers[index]
        found = self._common(index, cuts, staging, engine)
        ranks = len(found.accuracy)
        return replace(
            found,
            hits={
                policy: self._tables.fit_curves(policy)[index, : shape.num_experts + 1]
                for policy in engine.policies
            },
            predicted_held={
                policy: self._tables.fit_cached(policy)[index, :ranks, : shape.num_experts + 1]
                for policy in (engine.policies if ranks else ())
            },
        )

    def mixed(self, index: int, staging: int, engine: EngineCapabilities) -> MixedProblem:
        """A layer whose experts are stored in several encodings."""
        cut, tables = self.cuts[index], self._tables
        classes = tables.classes(self.cuts)
        classes.prepare(engine.policies)
        layer = self._common(index, self.options(index), staging, engine)
        of_class = cut.class_of(len(cut.encodings))
        used = [
            [
                chance
                for chance, expert in zip(layer.used, tables.hot[index], strict=True)
                if of_class[expert] == its
            ]
            for its in range(len(cut.classes))
        ]
        return MixedProblem(
            layer=layer,
            in_top=cut.split > 0,
            slot_bytes=tuple(class_bytes(self._request.spec, cut)),
            curves={policy: classes.curves(index, policy) for policy in engine.policies},
            used=tuple(np.array(chances) for chances in used),
        )

    def window_s(self, index: int) -> float:
        """MoEpic's prefetch window: from the routing of the layer before to this layer's.

        ``W_i = T_moe(i - 1) + T_attn(i)``; before the first layer lies the last, a token earlier.
        """
        before = self._tables.layers[index - 1]
        entry = self._request.compute.layer(before.layer)
        expert = entry.expert_times(self.cuts[index - 1].encoding, cut=True)
        moe_s = before.top_k * expert.at(1) + float(self._token.after_s[index - 1])
        return moe_s + self._gap_s(index)

    def _common(
        self, index: int, cuts: Cuts, staging: int, engine: EngineCapabilities
    ) -> LayerProblem:
        """What does not depend on what slots hit."""
        request, tables = self._request, self._tables
        shape, entry = tables.layers[index], request.compute.layer(tables.layers[index].layer)
        shares = tables.shares[index]
        hot = np.array(tables.hot[index])
        used = distinct_experts(shares, request.prompt_tokens, shape.top_k)[hot]
        whole_s, split_s = self._prompt_s(index, two=False), self._prompt_s(index, two=True)
        ranks = 2 * shape.top_k if engine.max_prefetch_depth > 0 else 0
        return LayerProblem(
            layer=shape.layer,
            top_k=shape.top_k,
            cuts=cuts,
            link=self._link,
            token=LayerTimes(
                float(self._token.before_s[index]),
                self._expert_s(index, two=False),
                entry.transfer_s,
                float(self._token.after_s[index]),
                entry.burst_s,
                *entry.of_ahead,
            ),
            split_s=self._expert_s(index, two=True),
            prompt=PromptTimes(float(self._prompt.before_s[index]), whole_s, split_s),
            used=used,
            new_tokens=request.new_tokens,
            hits={},
            staging_experts=staging,
            engine=engine,
            gap_s=self._gap_s(index),
            guess_s=entry.guess_s(1),
            accuracy=tables.accuracy[index, :ranks],
            disk=self._disk(index, engine),
            in_pieces=request.compute.device == "cpu",
        )

    def _expert_s(self, index: int, *, two: bool) -> float:
        """One token through one expert; where they differ, on average over how they are used."""
        cut = self.cuts[index]
        entry = self._request.compute.layer(cut.layer)
        seconds = [entry.expert_times(name, cut=two).at(1) for name in cut.classes]
        if len(seconds) == 1:
            return seconds[0]
        shares = self._tables.shares[index]
        each = np.array(seconds)[list(cut.class_of(len(shares)))]
        return float((shares * each).sum())

    def _prompt_s(self, index: int, *, two: bool) -> float:
        """The prompt through all routed experts."""
        cut, shape = self.cuts[index], self._tables.layers[index]
        entry = self._request.compute.layer(cut.layer)
        curves = [entry.expert_times(name, cut=two) for name in cut.classes]
        of_class = np.array(cut.class_of(shape.num_experts))
        # The shared expert hides behind the link as the others do.
        seconds = float(self._prompt.after_s[index])
        for tokens in self._blocks:
            chances = distinct_experts(self._tables.shares[index], tokens, shape.top_k)
            each = tokens * shape.top_k / float(chances.sum())
            for its, curve in enumerate(curves):
                seconds += float(chances[of_class == its].sum()) * curve.at(each)
        return seconds

    def _disk(self, index: int, engine: EngineCapabilities) -> DiskProblem | None:
        """What of a layer RAM does not hold."""
        chances = self.chances
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
