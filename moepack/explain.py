"""What limits a machine under a plan, and what one would gain from another machine.

Every sentence is made from numbers that stand beside it: the plan replayed on *test* as it is, with
a perfect prediction, with transfers that cost nothing beside their bytes; and new plans for more
memory, a faster link, a faster processor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from moepack.compute import ComputeProfile
from moepack.cost import LinkSeconds
from moepack.margin import generation_s
from moepack.passes import Oracle
from moepack.plan import Plan
from moepack.planner import Planner
from moepack.progress import NO_PROGRESS, Progress
from moepack.records import record
from moepack.replay import Replayer
from moepack.replayed import Replayed
from moepack.units import GIB, format_duration, format_rate, format_size, short_size
from moepack.variants import contender_of, is_resident, without_transfer_cost
from moepack.what_if import SAME, WhatIf, times, what_if

Topic = Literal["link", "disk", "compute", "prediction", "capacity", "transfers", "prompt"]


@record
class TokenTime:
    """Where the time of one decoded token goes.

    Attributes
    ----------
    compute_s, wait_s : float
        Computing, and waiting for transfers: together ``tpot_s``.
    link_s : float
        The link's own work for it, part of it behind computing.
    link_bytes : float
        Over the link, of which ``wasted_bytes`` were fetched ahead in vain.
    disk_s, disk_bytes : float
        The disk's work for it, and what of it RAM did not hold.
    """

    tpot_s: float
    compute_s: float
    wait_s: float
    link_s: float
    link_bytes: float
    wasted_bytes: float
    disk_s: float = 0.0
    disk_bytes: float = 0.0


@record
class Finding:
    """One sentence, and what it is about."""

    about: Topic
    text: str


@record
class Explanation:
    """What limits a machine under a plan.

    Attributes
    ----------
    limit : {"link", "disk", "compute"}
        What takes the larger part of a token: waiting for transfers, or computing. Of three tiers
        the disk is to blame for waiting where it works longer for a token than the link does.
    """

    limit: Literal["link", "disk", "compute"]
    token: TokenTime
    findings: tuple[Finding, ...]
    what_if: tuple[WhatIf, ...]


def explain(planner: Planner, plan: Plan, progress: Progress = NO_PROGRESS) -> Explanation:
    """Explain a plan that this planner has made; plans several more to do so."""
    request = planner.request
    now = planner.price(contender_of(request, plan), "test")
    wait_s = float(now.layer_wait_s.sum())
    token = TokenTime(
        tpot_s=now.tpot_s,
        compute_s=now.tpot_s - wait_s,
        wait_s=wait_s,
        link_s=now.link_s,
        link_bytes=now.link_bytes_per_token,
        wasted_bytes=now.ahead_wasted_bytes,
        disk_s=now.disk_s,
        disk_bytes=now.disk_bytes,
    )
    others = tuple(what_if(planner, plan, progress))
    sentences = (
        _about_link(plan, token),
        _about_disk(planner, plan, token),
        _about_compute(token),
        _about_prediction(planner, plan, now),
        _about_capacity(plan, others),
        _about_transfers(planner, plan, now),
        _about_prompt(planner, plan),
    )
    slower: Literal["link", "disk"] = "disk" if token.disk_s > token.link_s else "link"
    return Explanation(
        limit=slower if token.wait_s > token.compute_s else "compute",
        token=token,
        findings=tuple(finding for finding in sentences if finding is not None),
        what_if=others,
    )


def _about_link(plan: Plan, token: TokenTime) -> Finding:
    if not token.link_bytes:
        why = ": all experts are resident" if is_resident(plan) else " on the test part"
        return Finding("link", f"nothing crosses the link while decoding{why}")
    text = (
        f"busy for {token.link_s / token.tpot_s:.0%} of a token: {format_size(token.link_bytes)} "
        f"in {format_duration(token.link_s)}, of which "
    )
    if token.wait_s < SAME * token.tpot_s:
        return Finding("link", f"{text}all but {format_duration(token.wait_s)} behind computing")
    return Finding("link", f"{text}{format_duration(token.wait_s)} are waited for")


def _about_disk(planner: Planner, plan: Plan, token: TokenTime) -> Finding | None:
    """What RAM does not hold, and what it would be worth if it did."""
    host = plan.placement.host
    if host is None or not host.bounces:
        return None
    contender = contender_of(planner.request, plan)
    ample = contender._replace(placement=replace(contender.placement, host=None))
    held = planner.price(ample, "test")
    return Finding(
        "disk",
        f"RAM holds {host.held_bytes / plan.prediction.slow_bytes:.0%} of the experts; for the "
        f"rest the disk is busy for {token.disk_s / token.tpot_s:.0%} of a token: "
        f"{format_size(token.disk_bytes)} in {format_duration(token.disk_s)}; with all of them in "
        f"RAM a token would take {format_duration(held.tpot_s)}"
        f"{times(token.tpot_s, held.tpot_s)}",
    )


def _about_compute(token: TokenTime) -> Finding:
    share = token.compute_s / token.tpot_s
    return Finding(
        "compute",
        f"{format_duration(token.compute_s)} of a token's {format_duration(token.tpot_s)} "
        f"({share:.0%})",
    )


def _about_prediction(planner: Planner, plan: Plan, now: Replayed) -> Finding | None:
    if not now.link_bytes_per_token:
        return None
    if not any(place.prefetch_depth for place in plan.placement.layers):
        if planner.request.engine.max_prefetch_depth:
            return Finding("prediction", "not used: no candidate that fetches ahead was faster")
        return Finding("prediction", "not used: this engine fetches nothing ahead")
    perfect = _replayed(planner, plan, oracle="prediction")
    in_vain = now.ahead_wasted_bytes / now.link_bytes_per_token
    return Finding(
        "prediction",
        f"{now.ready_rate:.1%} of the experts are whole when their routing is known, "
        f"{now.hit_rate:.1%} would be found without fetching ahead; {in_vain:.0%} of the bytes "
        f"over the link are fetched in vain; a perfect prediction would give "
        f"{format_duration(perfect.tpot_s)} a token{times(now.tpot_s, perfect.tpot_s)}",
    )


def _about_capacity(plan: Plan, others: tuple[WhatIf, ...]) -> Finding:
    forecast = plan.prediction
    if is_resident(plan):
        return Finding("capacity", "every expert is resident; more memory gains nothing")
    slots = short_size(plan.placement.memory.slots_bytes)
    parts = [f"{forecast.hit_rate:.1%} of the activated experts are found in {slots} of slots"]
    parts += [
        f"with a budget of {short_size(row.fast_budget_bytes)} {row.hit_rate:.1%}"
        for row in others
        if row.change == "memory"
    ]
    if "belady" in plan.baselines:
        bound = plan.baselines["belady"]
        parts.append(
            "caches of whole experts, as large in every layer, that know the future would find "
            f"{bound.hit_rate:.1%} in this memory and, with a perfect prediction, take "
            f"{format_duration(bound.tpot_s)} a token"
        )
    return Finding("capacity", "; ".join(parts))


def _about_transfers(planner: Planner, plan: Plan, now: Replayed) -> Finding | None:
    """What transfers cost beside their bytes: their latency, and the computing thread's share."""
    if not now.link_bytes_per_token:
        return None
    sizes = [point.size_bytes for point in planner.request.hardware.link.points]
    best_bytes_per_s = max(size / planner.link(size) for size in [*sizes, GIB])
    reached = now.link_bytes_per_token / now.link_s
    free = _replayed(
        planner,
        plan,
        link=lambda size: size / best_bytes_per_s,
        compute=without_transfer_cost(planner.request.compute),
    )
    return Finding(
        "transfers",
        f"reach {format_rate(reached)} where the link's best is {format_rate(best_bytes_per_s)}; "
        f"if only bytes cost, a token would take {format_duration(free.tpot_s)}"
        f"{times(now.tpot_s, free.tpot_s)}",
    )


def _about_prompt(planner: Planner, plan: Plan) -> Finding:
    placement, forecast = plan.placement, plan.prediction
    total_s = generation_s(forecast, placement.new_tokens)
    resident = _replayed(planner, plan, link=lambda _: 0.0)
    return Finding(
        "prompt",
        f"the first token of {placement.prompt_tokens} takes {format_duration(forecast.ttft_s)}, "
        f"{forecast.ttft_s / total_s:.0%} of a generation of {placement.new_tokens}; computing "
        f"alone {format_duration(resident.ttft_s)}",
    )


def _replayed(
    planner: Planner,
    plan: Plan,
    *,
    link: LinkSeconds | None = None,
    compute: ComputeProfile | None = None,
    oracle: Oracle = "none",
) -> Replayed:
    """The plan as it is, on *test*, with something about the machine changed."""
    request = planner.request
    replayer = Replayer(
        request.spec,
        compute or request.compute,
        planner.tables,
        link or planner.link,
        prompt_tokens=request.prompt_tokens,
        part="test",
        disk=request.hardware.disk.seconds,
    )
    as_ready = contender_of(request, plan).as_ready
    return replayer.replay(plan.layout, plan.placement, as_ready=as_ready, oracle=oracle)
