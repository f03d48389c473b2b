"""Requests for plans of small models: routing drawn at random, a machine from a preset."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moepack.hardware import find_hardware
from moepack.model_spec import ModelSpec
from moepack.plan_request import PlanRequest
from moepack.roofline import derive_compute
from moepack.routing import RoutingProfile, TextSource, make_profile
from moepack.strategies import FULL_ENGINE
from moepack.trace import Trace, part_of_tokens
from moepack.units import GIB

TOKENS = 240


def drawn_routing(spec: ModelSpec) -> RoutingProfile:
    """A trace with some skew, some reuse, and fair predictions."""
    rng = np.random.default_rng(3)
    numbers = spec.moe_layers
    experts, top_k = spec.moe(numbers[0]).num_experts, spec.moe(numbers[0]).top_k
    shape = (TOKENS, len(numbers), experts)
    liking = 1.5 * rng.gumbel(size=(1, *shape[1:])) + rng.gumbel(size=shape)
    liking[1:] += 0.7 * liking[:-1]
    guess = liking + 0.5 * rng.gumbel(size=shape)
    ids, predicted = (np.argsort(-scores, axis=2).astype(np.uint16) for scores in (liking, guess))
    trace = Trace(
        ids=ids[:, :, :top_k],
        weights=np.full((TOKENS, len(numbers), top_k), 1 / top_k, dtype=np.float16),
        predicted=predicted[:, :, : 2 * top_k],
        sequence=np.zeros(TOKENS, dtype=np.uint32),
        part=part_of_tokens(TOKENS),
    )
    return make_profile(
        trace,
        model_name=spec.name,
        model_digest=spec.digest,
        recorded_utc="2026-01-01T00:00:00+00:00",
        how="drawn at random",
        sources=(TextSource("none", "0" * 64, TOKENS),),
        layers=tuple((number, experts, top_k) for number in numbers),
    )


def plan_request(spec: ModelSpec, routing: RoutingProfile, **changes: Any) -> PlanRequest:
    """For an engine that can do everything, on a machine without a GPU, unless changed."""
    hardware = changes.get("hardware", find_hardware("cpu-nvme4"))
    made = PlanRequest(
        spec=spec,
        hardware=hardware,
        hardware_is_this_machine=False,
        compute=derive_compute(spec, hardware),
        routing=routing,
        engine=FULL_ENGINE,
        device=hardware.device,
        fast_budget_bytes=GIB,
        context_tokens=256,
        prompt_tokens=64,
        new_tokens=32,
    )
    return dataclasses.replace(made, **changes)
