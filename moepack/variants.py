"""Other machines than the one at hand: with more memory, another link, a faster processor.

A variant is an ordinary request; what is planned for it says what one would gain.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from moepack.budget import slow_bytes
from moepack.compute import ComputeProfile
from moepack.compute_rounds import at_pace
from moepack.placements import free_bytes
from moepack.plan import Plan
from moepack.plan_request import CUBLAS_BYTES, DEFAULT_RAM_SHARE, PlanRequest
from moepack.rates import LinkCurve
from moepack.strategies import Contender


def contender_of(request: PlanRequest, plan: Plan) -> Contender:
    """A finished plan, ready to be replayed again."""
    as_ready = request.engine.as_ready
    return Contender(plan.planner.chosen, plan.layout, plan.placement, as_ready)


def is_resident(plan: Plan) -> bool:
    """Whether the fast tier holds every expert whole."""
    placement = plan.placement
    if placement.pool is not None:
        return placement.pool.slots >= sum(len(place.hot) for place in placement.layers)
    return all(
        (place.top_slots == len(place.hot) or not cut.split)
        and (place.bottom_slots == len(place.hot) or cut.split == cut.width)
        for cut, place in zip(plan.layout.layers, placement.layers, strict=True)
    )


def resident_bytes(request: PlanRequest) -> int:
    """What the fast tier would hold with every expert resident: no plan gains from more."""
    layout = request.keep_layout or request.whole_layout
    fixed = -free_bytes(replace(request, fast_budget_bytes=0), layout, 1)
    return fixed + slow_bytes(request.spec, layout)


def with_memory(request: PlanRequest, fast_bytes: int) -> PlanRequest:
    """A machine that has at least so much fast memory for a model."""
    hardware = request.hardware
    base_bytes = hardware.process_base_bytes
    if request.device == "cuda" and hardware.vram_bytes is not None:
        vram_bytes = fast_bytes + hardware.device_base_bytes + CUBLAS_BYTES
        hardware = replace(hardware, vram_bytes=max(hardware.vram_bytes, vram_bytes))
        return replace(request, hardware=hardware, fast_budget_bytes=fast_bytes)
    ram_bytes = math.ceil((fast_bytes + base_bytes) / DEFAULT_RAM_SHARE)
    limit_bytes = request.ram_budget_bytes
    return replace(
        request,
        hardware=replace(hardware, ram_bytes=max(hardware.ram_bytes, ram_bytes)),
        ram_budget_bytes=limit_bytes and max(limit_bytes, fast_bytes + base_bytes),
        fast_budget_bytes=fast_bytes,
    )


def with_link(request: PlanRequest, factor: float) -> PlanRequest:
    """A link on which every transfer takes ``1 / factor`` of its time."""
    hardware = request.hardware
    link = request.link and (request.link[0] * factor, request.link[1] / factor)
    return replace(
        request,
        hardware=replace(
            hardware,
            disk=_faster(hardware.disk, factor),
            bus=hardware.bus and _faster(hardware.bus, factor),
        ),
        link=link,
    )


def with_ram(request: PlanRequest, factor: float) -> PlanRequest:
    """A host with so much more memory for the process."""
    hardware = request.hardware
    ram_bytes = round(hardware.ram_bytes * factor)
    limit_bytes = request.ram_budget_bytes
    return replace(
        request,
        hardware=replace(hardware, ram_bytes=ram_bytes),
        ram_budget_bytes=limit_bytes and round(limit_bytes * factor),
    )


def with_disk(request: PlanRequest, factor: float) -> PlanRequest:
    """A disk behind RAM that takes ``1 / factor`` of the time for every read."""
    disk = _faster(request.hardware.disk, factor)
    return replace(request, hardware=replace(request.hardware, disk=disk))


def with_compute(request: PlanRequest, factor: float) -> PlanRequest:
    """A processor that takes ``1 / factor`` of the time for everything."""
    return replace(request, compute=at_pace(request.compute, 1.0 / factor))


def without_transfer_cost(compute: ComputeProfile) -> ComputeProfile:
    """Transfers that cost the computing thread nothing beside the link's own time."""
    of = ("", "ahead_", "prompt_")
    free: dict[str, Any] = {f"{each}{cost}_s": 0.0 for each in of for cost in ("transfer", "burst")}
    return replace(
        compute,
        layers=tuple(replace(entry, **free) for entry in compute.layers),
    )


def _faster(link: LinkCurve, factor: float) -> LinkCurve:
    return replace(
        link,
        latency_s=link.latency_s / factor,
        points=tuple(
            replace(point, bytes_per_s=point.bytes_per_s * factor) for point in link.points
        ),
    )
