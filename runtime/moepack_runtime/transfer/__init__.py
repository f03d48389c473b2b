"""Moving segments: disk to RAM, RAM to VRAM. The only place that knows threads, streams, events.

:class:`Transfer` is the seam and states the contract; each twin is a file of its own.
"""

from __future__ import annotations

from moepack_runtime.transfer.base import LinkStatistics, Priority, Ticket, Transfer
from moepack_runtime.transfer.cuda import CudaTransfer
from moepack_runtime.transfer.host import HostTransfer
from moepack_runtime.transfer.hostile import HostileTransfer
from moepack_runtime.transfer.throttled import ThrottledTransfer

__all__ = [
    "CudaTransfer",
    "HostTransfer",
    "HostileTransfer",
    "LinkStatistics",
    "Priority",
    "ThrottledTransfer",
    "Ticket",
    "Transfer",
]
