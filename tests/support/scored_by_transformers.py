"""Perplexity, divergence and agreement as the transformers library has them: the oracle of eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers


class Span(NamedTuple):
    """A stretch of a text, and the place of the first of its tokens that counts."""

    begin: int
    first: int
    end: int


class Figures(NamedTuple):
    """Of some tokens, means over them."""

    tokens: int
    perplexity: float
    exact_perplexity: float
    kl: float
    top1_agreement: float


def load(folder: Path) -> torch.nn.Module:
    """A checkpoint in float32, with attention and experts in their plainest form."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def figures(
    found: torch.nn.Module,
    exact: torch.nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[Span]]],
    *,
    prefix: Sequence[int] = (),
) -> Figures:
    """All spans of all texts together; each span is a sequence of its own, behind ``prefix``."""
    nll, exact_nll, kl, agrees = [], [], [], []
    for ids, spans in texts:
        for begin, first, end in spans:
            inputs = torch.tensor([[*prefix, *ids[begin:end]]])
            q = found(inputs).logits[0].double().log_softmax(-1)
            p = exact(inputs).logits[0].double().log_softmax(-1)
            for place in range(first, end):
                row = len(prefix) + place - begin - 1
                nll.append(-q[row, ids[place]].item())
                exact_nll.append(-p[row, ids[place]].item())
                kl.append(
                    torch.nn.functional.kl_div(
                        q[row], p[row], log_target=True, reduction="sum"
                    ).item()
                )
                agrees.append(float(q[row].argmax() == p[row].argmax()))

    def mean(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).mean()

    return Figures(
        len(nll),
        mean(nll).exp().item(),
        mean(exact_nll).exp().item(),
        mean(kl).item(),
        mean(agrees).item(),
    )
