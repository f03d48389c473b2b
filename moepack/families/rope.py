"""Rotary embeddings: both spellings of the configuration, to :class:`RopeSpec`.

Old configs have ``rope_theta`` beside ``rope_scaling`` (whose kind is ``type`` or ``rope_type``);
new ones have everything in ``rope_parameters``. Defaults are resolved here, so that the runtime
has nothing to guess.
"""

from __future__ import annotations

import math
from typing import Any

from moepack.families.config import Config
from moepack.model_spec import RopeKind, RopeSpec

#: The keys of each kind, beside theta, the kind itself and the rotated fraction.
_KEYS: dict[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "mscale",
            "mscale_all_dim",
        }
    ),
    "llama3": frozenset(
        {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    ),
    "longrope": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "short_factor",
            "long_factor",
            "short_mscale",
            "long_mscale",
        }
    ),
}
_COMMON = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})


def read_rope(config: Config, *, interleaved: bool = False) -> RopeSpec:
    """The rotary embedding of a model.

    Raises
    ------
    UnsupportedModelError
        For a kind, or a parameter of a kind, that is not implemented.
    DamagedCheckpointError
        For a parameter that is missing or is not what its key calls for.
    """
    rope = _section(config)
    kind = _kind(rope)
    unknown = rope.keys - _COMMON - _KEYS[kind]
    if unknown:
        key = min(unknown)
        raise rope.unsupported(key, rope.value(key), f"no such key for rope type {kind!r}")

    theta = rope.positive("rope_theta")
    context = config.integer("max_position_embeddings")
    original = config.optional_integer("original_max_position_embeddings")
    original = original or rope.optional_integer("original_max_position_embeddings") or context
    if kind == "default":
        return RopeSpec(theta=theta, interleaved=interleaved)
    if kind == "linear":
        return RopeSpec(theta, kind, interleaved, factor=rope.positive("factor"))
    if kind == "dynamic":
        factor = rope.positive("factor")
        return RopeSpec(theta, kind, interleaved, factor=factor, original_context=context)
    if kind == "llama3":
        return RopeSpec(
            theta,
            kind,
            interleaved,
            factor=rope.positive("factor"),
            original_context=original,
            low_freq_factor=rope.positive("low_freq_factor"),
            high_freq_factor=rope.positive("high_freq_factor"),
        )
    factor = context / original if rope.value("factor") is None else rope.positive("factor")
    if kind == "yarn":
        return _yarn(rope, theta, interleaved, factor, original)
    return _longrope(rope, theta, interleaved, factor, original)


def rotary_fraction(config: Config) -> float:
    """The fraction of each head that is rotated, for the families that implement one."""
    own = config.number("partial_rotary_factor")
    nested = _section(config).optional_number("partial_rotary_factor")
    return own if nested is None else nested


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature (arXiv 2309.00071, section 3.4): ``0.1 m ln(factor) + 1``."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _section(config: Config) -> Config:
    """The rotary parameters, wherever they are; theta and the kind's defaults come from beside."""
    defaults: dict[str, Any] = {"rope_theta": config.number("rope_theta"), "truncate": True}
    key = "rope_scaling" if config.value("rope_scaling") else "rope_parameters"
    return config.section(key, defaults)


def _kind(rope: Config) -> RopeKind:
    name = rope.value("rope_type")
    if name is None:
        name = rope.value("type")
    if name is None:
        nested = [key for key in sorted(rope.keys) if isinstance(rope.value(key), dict)]
        if nested:
            raise rope.unsupported(nested[0], rope.value(nested[0]), "one embedding for all layers")
        name = "default"
    for kind in _KEYS:
        if name == kind:
            return kind
    raise rope.unsupported("rope_type", name, ", ".join(_KEYS))


def _yarn(rope: Config, theta: float, interleaved: bool, factor: float, original: int) -> RopeSpec:
    mscale = rope.optional_number("mscale")
    mscale_all_dim = rope.optional_number("mscale_all_dim")
    attention_factor = rope.optional_number("attention_factor")
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor, 1.0)
    return RopeSpec(
        theta,
        "yarn",
        interleaved,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        truncate=rope.flag("truncate"),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _longrope(
    rope: Config, theta: float, interleaved: bool, factor: float, original: int
) -> RopeSpec:
    attention_factor = rope.optional_number("attention_factor")
    if attention_factor is None:
        growth = math.log(factor) / math.log(original) if factor > 1.0 else 0.0
        attention_factor = math.sqrt(1.0 + growth)
    return RopeSpec(
        theta,
        "longrope",
        interleaved,
        factor=factor,
        original_context=original,
        attention_factor=attention_factor,
        short_factor=rope.numbers("short_factor"),
        long_factor=rope.numbers("long_factor"),
        short_mscale=rope.optional_number("short_mscale"),
        long_mscale=rope.optional_number("long_mscale"),
    )
