"""What a placement takes of each tier: of the fast one, and of a device's host."""

from __future__ import annotations

from moepack.records import record


@record
class MemoryBreakdown:
    """Every byte of the fast tier that a placement takes."""

    trunk_bytes: int
    kv_bytes: int
    hidden_bytes: int
    workspace_bytes: int
    staging_bytes: int
    slots_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum: what must not exceed the budget."""
        return (
            self.trunk_bytes
            + self.kv_bytes
            + self.hidden_bytes
            + self.workspace_bytes
            + self.staging_bytes
            + self.slots_bytes
        )


@record
class HostTier:
    """What of a device's slow tier the host's RAM holds; see :mod:`moepack.ram_tier`.

    Attributes
    ----------
    pinned_bytes : int
        What may be pinned: the bound on host memory less the process.
    held_bytes : int
        Of segments that RAM holds. The others are read from the disk each time.
    bounces, bounce_bytes : int
        Pieces of pinned memory that those pass through, and the size of each; 0 where RAM holds
        everything.
    shares : tuple of float
        By layer with experts, what share of its experts' bytes RAM holds.
    """

    pinned_bytes: int
    held_bytes: int
    bounces: int
    bounce_bytes: int
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = (self.pinned_bytes, self.held_bytes, self.bounces, self.bounce_bytes)
        if min(sizes) < 0 or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError("what RAM holds is negative, or more than there is")

    @property
    def total_bytes(self) -> int:
        """All that is pinned."""
        return self.held_bytes + self.bounces * self.bounce_bytes
