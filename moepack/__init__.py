"""moepack: run mixture-of-experts models that are larger than fast memory, to plan."""

from __future__ import annotations

__version__ = "0.1.0"
