"""What a placement costs on given profiles: the bridge from profiles to the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moepack.budget import stored_bytes
from moepack.compute import ComputeProfile, Curve, LayerCompute
from moepack.cost import (
    Held,
    LayerTimes,
    LinkSeconds,
    Parts,
    distinct_experts,
    missing_after,
    prefill_layer_s,
)
from moepack.decode_cost import decode_layer_s
from moepack.model_spec import ModelSpec
from moepack.plan import LayerLayout, LayerPlacement, Layout
from moepack.routing import RoutingProfile
from moepack.segments import PARTS
from moepack.trace import RoutingPart


class Price(NamedTuple):
    """Expected time to the first token, time per further token, and what is behind them."""

    ttft_s: float
    tpot_s: float
    hit_rate: float
    ready_rate: float
    link_bytes_per_token: float


class LayerRouting(NamedTuple):
    """What is known of one layer's routing.

    Attributes
    ----------
    hot : tuple of int
        Experts, hottest first.
    shares : tuple of float
        Share of all activations, by expert id.
    hits : dict
        Hit rate over the cache size, float [experts + 1], on each part of the trace.
    """

    hot: tuple[int, ...]
    shares: tuple[float, ...]
    hits: dict[RoutingPart, npt.NDArray[np.floating]]


def layer_routing(spec: ModelSpec, profile: RoutingProfile | None) -> dict[int, LayerRouting]:
    """Routing by decoder layer; without a profile every expert is equally likely."""
    known: dict[int, LayerRouting] = {}
    for number in spec.moe_layers:
        experts = spec.moe(number).num_experts
        if profile is None:
            even = np.arange(experts + 1) / experts
            ids = tuple(range(experts))
            hits: dict[RoutingPart, npt.NDArray[np.floating]] = {"select": even, "test": even}
            known[number] = LayerRouting(ids, (1 / experts,) * experts, hits)
            continue
        counts = profile.counts(number) + 1.0  # add-one smoothing: nothing is impossible
        known[number] = LayerRouting(
            hot=profile.hot_ranking(number),
            shares=tuple((counts / counts.sum()).tolist()),
            hits={
                "select": profile.hit_curve(number, "select"),
                "test": profile.hit_curve(number, "test"),
            },
        )
    return known


class Pricer:
    """Prices placements of one model on one machine for one length of prompt.

    Parameters
    ----------
    link
        Seconds of one transfer of so many bytes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        compute: ComputeProfile,
        routing: dict[int, LayerRouting],
        link: LinkSeconds,
        *,
        prompt_tokens: int,
    ) -> None:
        self._spec = spec
        self._compute = compute
        self._routing = routing
        self._link = link
        self._prompt_tokens = prompt_tokens

    def price(
        self,
        layout: Layout,
        layers: Sequence[LayerPlacement],
        *,
        staging_experts: int,
        part: RoutingPart,
    ) -> Price:
        """Price a placement on one part of the routing trace."""
        ttft_s = tpot_s = self._compute.head_s
        activations = hits = ready = link_bytes = 0.0
        placed = {
            place.layer: (cut, place) for cut, place in zip(layout.layers, layers, strict=True)
        }
        blocks = _blocks(self._prompt_tokens, layout.prefill_block_tokens)
        for number in range(len(self._spec.layers)):
            entry = self._compute.layer(number)
            ttft_s += sum(entry.around_s(tokens) for tokens in blocks)
            tpot_s += entry.around_s(1)
            if number not in placed:
                continue
            cut, place = placed[number]
            top_k = self._spec.moe(number).top_k
            sizes = tuple(stored_bytes(self._spec, cut, name) for name in PARTS)
            held = self._held(cut, place, part)
            ttft_s += self._prefill_s(entry, cut, place, blocks, staging_experts)
            times = LayerTimes(0.0, _expert_curve(entry, cut).at(1), entry.transfer_s)
            tpot_s += decode_layer_s(
                times, top_k, self._parts(cut), held, staging_experts=staging_experts
            ).item()
            activations += top_k
            hits += top_k * float(held.top if sizes[0] else held.bottom)
            ready += top_k * float(min(held.top, held.bottom))
            link_bytes += top_k * float(
                (1.0 - held.top) * sizes[0] + (1.0 - held.bottom) * sizes[1]
            )
        return Price(ttft_s, tpot_s, hits / activations, ready / activations, link_bytes)

    def _parts(self, cut: LayerLayout) -> Parts:
        top_s, bottom_s = (
            self._link(size) if (size := stored_bytes(self._spec, cut, name)) else 0.0
            for name in PARTS
        )
        return Parts(top_s, bottom_s, cut.split_ratio)

    def _held(self, cut: LayerLayout, place: LayerPlacement, part: RoutingPart) -> Held:
        curve = self._routing[cut.layer].hits[part]
        return Held(
            top=float(curve[place.top_slots]) if cut.split else 1.0,
            bottom=float(curve[place.bottom_slots]) if cut.split < cut.width else 1.0,
        )

    def _prefill_s(
        self,
        entry: LayerCompute,
        cut: LayerLayout,
        place: LayerPlacement,
        blocks: Sequence[int],
        staging_experts: int,
    ) -> float:
        top_k = self._spec.moe(cut.layer).top_k
        shares = np.array(self._routing[cut.layer].shares)
        used = distinct_experts(shares, sum(blocks), top_k)
        curve = _expert_curve(entry, cut)
        compute_s = 0.0
        for tokens in blocks:
            distinct = float(distinct_experts(shares, tokens, top_k).sum())
            compute_s += distinct * curve.at(tokens * top_k / distinct)
        missing = missing_after(used[list(place.hot)])
        tops, bottoms = missing[place.top_slots], missing[place.bottom_slots]
        return prefill_layer_s(
            0.0,
            compute_s,
            entry.transfer_s,
            self._parts(cut),
            (tops if cut.split else 0.0, bottoms if cut.split < cut.width else 0.0),
            staging_experts=staging_experts,
        ).item()


def _blocks(tokens: int, block_tokens: int) -> list[int]:
    """Lengths of the blocks that ``tokens`` are run in."""
    whole, rest = divmod(tokens, block_tokens)
    return [block_tokens] * whole + ([rest] if rest else [])


def _expert_curve(entry: LayerCompute, cut: LayerLayout) -> Curve:
    curve = entry.expert if cut.split in (0, cut.width) else entry.expert_split
    assert curve is not None, f"layer {cut.layer} has experts, its compute profile has none"
    return curve
