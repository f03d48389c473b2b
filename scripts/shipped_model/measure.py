"""What the model card states: quality against n-grams, and how the model routes.

Everything is computed in float32 from the exported bfloat16 weights, on the shipped held-out
texts, each cut into windows without regard to document ends.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from shipped_model.corpus import load_part
from shipped_model.export import GENERATION, check_against_transformers, load_exported
from shipped_model.model import DecoderLayer, MoEModel, Trace
from shipped_model.ngrams import Ngrams
from shipped_model.tokenizer import load, load_tokens

LONG_WINDOW = 2048
POSITION_BOUNDS = (0, 256, 512, 1024, 2048)
SAMPLE_PROMPT_TOKENS = 24
SAMPLE_NEW_TOKENS = 56


@dataclass(frozen=True)
class DomainQuality:
    """Perplexity per token on one domain's held-out text."""

    name: str
    tokens: int
    bytes_per_token: float
    model: float
    bigram_own_domain: float
    bigram: float
    unigram: float


@dataclass(frozen=True)
class Measurements:
    """Everything that the card shows; per-layer lists run over the decoder's layers."""

    window: int
    qualities: list[DomainQuality]
    bigram_discount: float
    perplexity_by_position: list[float]  # of the ranges between POSITION_BOUNDS
    usage: dict[str, list[list[float]]]  # domain -> layer -> share of each expert
    top_weight: list[float]  # per layer: mean weight of the first expert
    recall_at_4: list[float]  # of layer i + 1 predicted from layer i
    recall_at_8: list[float]
    logits_difference: float
    samples: dict[str, tuple[str, str]]  # domain -> prompt, continuation


def held_out_text(folder: Path, domain: str) -> str:
    """Return a domain's held-out passages as they are shipped, a blank line between documents."""
    return "\n".join(document.text for document in load_part(folder, domain, "test"))


def _windows(ids: list[int], length: int) -> Tensor:
    count = (len(ids) - 1) // length
    rows = [ids[i * length : (i + 1) * length + 1] for i in range(count)]
    return torch.tensor(rows, dtype=torch.int64).view(count, length + 1)


def _token_losses(model: MoEModel, rows: Tensor) -> tuple[Tensor, list[Trace]]:
    """Return the loss of every target, [rows, length], and the traces, a few rows at a time."""
    losses, traces = [], []
    for batch in torch.split(rows, 4):
        trace = model(batch[:, :-1])
        logits = model.logits(trace.hidden).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(batch), -1))
        traces.append(trace)
    return torch.cat(losses), traces


class _RoutingCounts:
    """Sums over traces of what the routers did."""

    def __init__(self, model: MoEModel) -> None:
        self._model = model
        config = model.config
        self.used = torch.zeros(config.layers, config.experts)
        self.first_weight = torch.zeros(config.layers)
        self.hits = {depth: torch.zeros(config.layers - 1) for depth in (4, 8)}
        self.tokens = 0

    def add(self, trace: Trace) -> None:
        """Count one trace."""
        experts = self._model.config.experts
        self.tokens += len(trace.routings[0].ids)
        for layer, routing in enumerate(trace.routings):
            self.used[layer] += torch.bincount(routing.ids.flatten(), minlength=experts)
            self.first_weight[layer] += routing.weights[:, 0].sum()
        for layer, residual in enumerate(trace.residuals[:-1]):
            following = cast("DecoderLayer", self._model.layers[layer + 1])
            guess = following.mlp.route(following.post_attention_norm(residual).flatten(0, 1))
            actual = trace.routings[layer + 1].ids
            ranking = guess.probabilities.topk(max(self.hits), dim=-1).indices
            for depth, hits in self.hits.items():
                found = (actual[:, :, None] == ranking[:, None, :depth]).any(-1)
                hits[layer] += found.float().mean(-1).sum()


def _sample(model: MoEModel, prompts: Tensor) -> Tensor:
    """Continue [prompts, length] token ids with the exported generation settings, seed 0."""
    generator = torch.Generator().manual_seed(0)
    ids = prompts
    for _ in range(SAMPLE_NEW_TOKENS):
        logits = model.logits(model(ids).hidden[:, -1]) / GENERATION["temperature"]
        best = logits.topk(int(GENERATION["top_k"]), dim=-1)
        choice = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, best.indices.gather(1, choice)], dim=1)
    return ids[:, prompts.shape[1] :]


@torch.no_grad()
def measure(folder: Path, model_folder: Path, names: list[str], window: int) -> Measurements:
    """Measure an exported model and write ``measurements.json`` into the working folder."""
    model, tokenizer = load_exported(model_folder), load(folder)
    vocab = model.config.vocab_size
    train = {name: load_tokens(folder, name, "train") for name in names}
    dev = {name: load_tokens(folder, name, "dev") for name in names}
    pooled = Ngrams(list(train.values()), vocab)
    discount = pooled.best_discount(list(dev.values()))
    qualities, usage, long_losses = [], {}, []
    whole, prompts = _RoutingCounts(model), []
    for name in names:
        text = held_out_text(folder, name)
        ids = tokenizer.encode(text).ids
        rows = _windows(ids, window)
        losses, traces = _token_losses(model, rows)
        own = _RoutingCounts(model)
        for trace in traces:
            own.add(trace)
            whole.add(trace)
        usage[name] = (own.used / own.used.sum(1, keepdim=True)).tolist()
        scored = np.array(ids[: losses.numel() + 1], dtype=np.uint16)
        domain = Ngrams([train[name]], vocab)
        means = (
            losses.mean().item(),
            domain.bigram_loss(scored, domain.best_discount([dev[name]])),
            pooled.bigram_loss(scored, discount),
            pooled.unigram_loss(scored),
        )
        qualities.append(
            DomainQuality(name, len(ids), len(text.encode()) / len(ids), *np.exp(means).tolist())
        )
        long_losses.append(_token_losses(model, _windows(ids, LONG_WINDOW))[0])
        prompts.append(ids[:SAMPLE_PROMPT_TOKENS])
    samples = {}
    for name, start, new in zip(
        names, prompts, _sample(model, torch.tensor(prompts)).tolist(), strict=True
    ):
        samples[name] = (tokenizer.decode(start), tokenizer.decode(new))
    by_position = torch.cat(long_losses)
    ranges = pairwise(POSITION_BOUNDS)
    result = Measurements(
        window=window,
        qualities=qualities,
        bigram_discount=discount,
        perplexity_by_position=[by_position[:, a:b].mean().exp().item() for a, b in ranges],
        usage=usage,
        top_weight=(whole.first_weight / whole.tokens).tolist(),
        recall_at_4=(whole.hits[4] / whole.tokens).tolist(),
        recall_at_8=(whole.hits[8] / whole.tokens).tolist(),
        logits_difference=check_against_transformers(model_folder, rows[:2, :-1]),
        samples=samples,
    )
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    (folder / "measurements.json").write_text(text + "\n", "utf-8")
    return result
