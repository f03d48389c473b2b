"""One link and one compute queue, event by event: an obvious oracle for the latency model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StackOfLayers:
    """Layers that are all alike, with caches and routing drawn anew for each.

    Seconds of the link for a top and a bottom (0: there is none), and of the compute for an expert,
    of which ``top_share`` is the top's. ``accuracy`` is by rank; its length is the depth that is
    asked for.
    """

    experts: int
    top_k: int
    tops: int
    bottoms: int
    top_s: float
    bottom_s: float
    top_share: float
    expert_s: float
    gap_s: float
    accuracy: Sequence[float] = ()
    bottoms_only: bool = False
    as_ready: bool = False

    def mean_s(self, layers: int, rng: random.Random) -> float:
        """Mean seconds of one layer."""
        now_s = link_s = routed_s = 0.0
        for _ in range(layers):
            active, predicted = self._route(rng)
            hot = rng.sample(range(self.experts), self.experts)
            held = {(expert, "top") for expert in (hot[: self.tops] if self.top_s else hot)}
            held |= {
                (expert, "bottom") for expert in (hot[: self.bottoms] if self.bottom_s else hot)
            }
            # Asked for when the layer before was routed; begun behind what that layer demanded.
            asked_s, routed_s = routed_s, now_s + self.gap_s
            clock_s, arrives_s = max(link_s, asked_s), {}
            for segment in self._asked_ahead(predicted, held):
                if clock_s >= routed_s:
                    break  # the routing is known: what is queued is dropped
                clock_s += self._seconds(segment)
                arrives_s[segment] = clock_s
            link_s = max(link_s, clock_s) if arrives_s else link_s
            queue = []
            for expert in sorted(active):
                for segment in ((expert, "top"), (expert, "bottom")):
                    if segment not in held and segment not in arrives_s:
                        link_s = max(link_s, routed_s) + self._seconds(segment)
                        arrives_s[segment] = link_s
                    queue.append((arrives_s.get(segment, 0.0), self._compute_s(segment[1])))
            if self.as_ready:
                queue.sort(key=lambda item: max(item[0], routed_s))
            now_s = routed_s
            for arrival_s, compute_s in queue:
                now_s = max(now_s, arrival_s if compute_s else 0.0) + compute_s
        return now_s / layers

    def _route(self, rng: random.Random) -> tuple[list[int], list[int]]:
        shuffled = rng.sample(range(self.experts), self.experts)
        active, others = shuffled[: self.top_k], shuffled[self.top_k :]
        left = list(active)
        predicted = [
            (left if left and rng.random() < accuracy else others).pop()
            for accuracy in self.accuracy
        ]
        return active, predicted

    def _asked_ahead(
        self, predicted: list[int], held: set[tuple[int, str]]
    ) -> list[tuple[int, str]]:
        return [
            (expert, part)
            for expert in predicted
            if not self.bottoms_only or (expert, "top") in held
            for part in ("top", "bottom")
            if (expert, part) not in held
        ]

    def _seconds(self, segment: tuple[int, str]) -> float:
        return self.top_s if segment[1] == "top" else self.bottom_s

    def _compute_s(self, part: str) -> float:
        return self.expert_s * (self.top_share if part == "top" else 1.0 - self.top_share)
