"""What this runtime can execute. Imports no torch, so that planning can ask."""

from __future__ import annotations

from moepack.errors import CapabilityError
from moepack.plan import EngineCapabilities, Placement

CAPABILITIES = EngineCapabilities(policies=("lru",), devices=("cpu", "cuda"), max_prefetch_depth=0)


def require_capable(placement: Placement) -> None:
    """Refuse a placement that asks for more than this engine does.

    Raises
    ------
    CapabilityError
        Naming the layer, what it asks for and what there is.
    """
    for layer in placement.layers:
        if layer.policy not in CAPABILITIES.policies:
            raise CapabilityError(
                f"layer {layer.layer} wants the policy {layer.policy!r}; this engine has "
                f"{', '.join(CAPABILITIES.policies)}; plan again with this moepack"
            )
        if layer.prefetch_depth > CAPABILITIES.max_prefetch_depth:
            raise CapabilityError(
                f"layer {layer.layer} wants {layer.prefetch_depth} experts fetched ahead; this "
                f"engine does {CAPABILITIES.max_prefetch_depth}; plan again with this moepack"
            )
