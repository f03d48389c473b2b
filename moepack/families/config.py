"""Typed reading of a ``config.json``: the border where foreign keys become numbers.

A value that is not what its key calls for is a damaged config; a value that asks for something
moepack does not do is refused by name. Nothing that changes the arithmetic is ignored: see
:data:`NEUTRAL`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moepack.errors import DamagedCheckpointError, UnsupportedModelError

#: Larger than any real model's sizes; a config beyond it is damaged, and must not make us loop.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000

#: Keys that change the arithmetic, and the value at which they do not. A family that implements
#: one reads it; any other family refuses another value.
NEUTRAL: dict[str, object] = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "attention_multiplier": None,
    "clip_qkv": None,
    "embedding_multiplier": None,
    "final_logit_softcapping": None,
    "layer_types": None,
    "logit_scale": None,
    "logits_scaling": None,
    "lm_head_bias": False,
    "mlp_bias": False,
    "mlp_only_layers": None,
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "qkv_bias": False,
    "residual_multiplier": None,
    "rope_interleave": False,
    "sliding_window": None,
    "swiglu_limit": None,
    "use_qk_norm": False,
}


class Config:
    """A ``config.json`` with its family's defaults: an absent key has the default's value.

    Parameters
    ----------
    data
        The parsed JSON object.
    defaults
        What transformers' configuration class of the architecture assumes.
    what
        How messages name the document.
    """

    def __init__(
        self, data: Mapping[str, Any], defaults: Mapping[str, Any], what: str = "config.json"
    ) -> None:
        self._data = data
        self._defaults = defaults
        self._read: set[str] = set()
        self.what = what

    def value(self, key: str) -> Any:
        """The raw value: the config's, even where it is null, else the default, else None."""
        self._read.add(key)
        return self._data[key] if key in self._data else self._defaults.get(key)

    def alias(self, *keys: str) -> str:
        """The one of several spellings of a key that the config uses (the first when none)."""
        present = [key for key in keys if self._data.get(key) is not None]
        if len({self._data[key] for key in present}) > 1:
            found = ", ".join(f"{key} = {self._data[key]!r}" for key in present)
            raise self.damaged(found, "two names of one number to agree")
        return present[0] if present else keys[0]

    def integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """A whole number within [low, high]."""
        value = self.optional_integer(key, low=low, high=high)
        if value is None:
            raise self.damaged(f"{key} is missing", "an integer")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """A whole number within [low, high], or None where the config says null."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.damaged(f"{key} = {value!r}", f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.optional_number(key)
        if value is None:
            raise self.damaged(f"{key} is missing", "a number")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where the config says null."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.damaged(f"{key} = {value!r}", "a number")
        if not math.isfinite(value):
            raise self.damaged(f"{key} = {value!r}", "a finite number")
        return float(value)

    def positive(self, key: str) -> float:
        """A finite number above zero."""
        value = self.number(key)
        if value <= 0:
            raise self.damaged(f"{key} = {value!r}", "a number above zero")
        return value

    def flag(self, key: str) -> bool:
        """True or false; null counts as false."""
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.damaged(f"{key} = {value!r}", "true or false")
        return bool(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; one alone counts as a list, null as an empty one."""
        value = self.value(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.damaged(f"{key} = {value!r}", "integers")
        return tuple(items)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """A list of texts, or None where there is none."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.damaged(f"{key} = {value!r}", "a list of texts")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.value(key)
        if not isinstance(value, list) or not all(
            isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item)
            for item in value
        ):
            raise self.damaged(f"{key} = {value!r}", "a list of numbers")
        return tuple(float(item) for item in value)

    def section(self, key: str, defaults: Mapping[str, Any]) -> Config:
        """A nested object, empty where the config has none or null."""
        value = self.value(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.damaged(f"{key} = {value!r}", "an object")
        return Config(value or {}, defaults, f"{self.what}: {key}")

    @property
    def keys(self) -> frozenset[str]:
        """The keys that the config itself has, with a value."""
        return frozenset(key for key, value in self._data.items() if value is not None)

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse a value that is not implemented."""
        value = self.value(key)
        if value not in allowed:
            raise self.unsupported(key, value, " or ".join(map(repr, allowed)))

    def refuse_unread(self) -> None:
        """Refuse the keys of :data:`NEUTRAL` that this family does not implement."""
        for key, neutral in NEUTRAL.items():
            value = self._data.get(key)
            if key in self._read or value is None or value == neutral:
                continue
            if key == "layer_types" and set(value) == {"full_attention"}:
                continue
            if key == "mlp_only_layers" and value == []:
                continue
            raise self.unsupported(key, value, f"{neutral!r}, or no such key")

    def damaged(self, got: str, expected: str) -> DamagedCheckpointError:
        """An error that says what was found and what was expected."""
        got = got if len(got) <= 120 else f"{got[:117]}..."
        return DamagedCheckpointError(
            f"{self.what}: {got}; expected {expected}; download the model again or correct it"
        )

    def unsupported(self, key: str, value: object, expected: str) -> UnsupportedModelError:
        """An error that names a feature which is not implemented."""
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        return UnsupportedModelError(
            f"{self.what}: {key} = {shown} is not implemented; expected {expected}; this model"
            " cannot be run by this version of moepack"
        )
