"""Muon for matrices, AdamW for the rest.

Muon replaces the momentum of a matrix by its nearest orthogonal matrix, found with a few
Newton-Schulz iterations (Jordan et al. 2024). In a short training it needs far fewer tokens than
AdamW for the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Quintic coefficients of Jordan et al.: fast, to within about 30 % of orthogonal.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return about the nearest (semi-)orthogonal matrix of each, [..., rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result.float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for parameters [..., rows, columns].

    A stacked gate-and-up tensor is split into its two matrices: ``parts`` of a group says how many
    matrices lie above each other in a parameter.
    """

    def __init__(self, groups: list[dict[str, object]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "parts": 1})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, float]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(buffer, group["momentum"])
        rows, columns = parameter.shape[-2] // int(group["parts"]), parameter.shape[-1]
        update = orthogonalise(nesterov.reshape(-1, rows, columns)).view_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for projections and experts, AdamW for embedding, routers and norms."""
    stacked, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up"):
            stacked.append(parameter)
        elif name.endswith(("_proj", "down")):
            matrices.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, object]] = [
        {"params": stacked, "parts": 2, "weight_decay": weight_decay},
        {"params": matrices, "weight_decay": weight_decay},
    ]
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(groups, lr=muon_lr), adam]
