"""The model card: everything that was recorded and measured, rendered as Markdown."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

from shipped_model.corpus import SHINGLE_BYTES, DomainRecord, load_part
from shipped_model.export import MAX_POSITIONS
from shipped_model.measure import POSITION_BOUNDS, Measurements
from shipped_model.model import ModelConfig
from shipped_model.tokenizer import load_tokens

FRONT_MATTER = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, fr, de]
tags: [mixture-of-experts, qwen3_moe, moepack]
---
"""


@dataclass(frozen=True)
class TrainingRecord:
    """How the weights came about, as the last checkpoint states it."""

    steps: int
    tokens: int
    training_s: float
    options: dict[str, object]
    hardware: str


def describe_hardware() -> str:
    """Return the processor in words."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text("utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return f"{os.cpu_count()} CPU cores ({model}), no GPU"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Render a Markdown table, numbers right-aligned."""
    numeric = [all(row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def entropy(shares: list[float]) -> float:
    """Return the entropy of a distribution in nats."""
    return -sum(share * math.log(share) for share in shares if share > 0)


def divergence(first: list[float], second: list[float]) -> float:
    """Return the Jensen-Shannon divergence of two distributions in bits, 0 to 1."""
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return (entropy(middle) - (entropy(first) + entropy(second)) / 2) / math.log(2)


def _mean_usage(usage: dict[str, list[list[float]]], layer: int) -> list[float]:
    columns = zip(*(layers[layer] for layers in usage.values()), strict=True)
    return [sum(column) / len(usage) for column in columns]


def _quality_table(measured: Measurements) -> str:
    rows = [
        [
            f"`{q.name}`",
            f"{q.model:.2f}",
            f"{math.log(q.model):.3f}",
            f"{q.bigram_own_domain:.1f}",
            f"{q.bigram:.1f}",
            f"{q.unigram:.0f}",
            f"{math.log2(q.model) / q.bytes_per_token:.2f}",
        ]
        for q in measured.qualities
    ]
    header = [
        "held-out text",
        "this model",
        "its loss (nats)",
        "bigram, own domain",
        "bigram, all domains",
        "unigram",
        "bits per byte",
    ]
    return table(header, rows)


def _routing_table(measured: Measurements) -> str:
    usage, rows = measured.usage, []
    pairs = list(combinations(usage, 2))
    for layer in range(len(measured.top_weight)):
        shares = _mean_usage(usage, layer)
        between = [divergence(usage[a][layer], usage[b][layer]) for a, b in pairs]
        within = [entropy(layers[layer]) / math.log(len(shares)) for layers in usage.values()]
        busiest = sum(sorted(shares)[-len(shares) // 4 :])
        rows.append(
            [
                str(layer),
                f"{entropy(shares) / math.log(len(shares)):.3f}",
                f"{sum(within) / len(within):.3f}",
                f"{100 * busiest:.0f} %",
                f"{min(shares) * len(shares):.2f}",
                f"{sum(between) / len(between):.3f}",
                f"{max(between):.3f}",
                f"{measured.top_weight[layer]:.2f}",
            ]
        )
    header = [
        "layer",
        "usage entropy",
        "within a domain",
        "busiest quarter's share",
        "least used expert",
        "JSD between domains, mean",
        "largest",
        "first expert's weight",
    ]
    return table(header, rows)


def _top_experts_table(measured: Measurements) -> str:
    layers = [0, len(measured.top_weight) // 2, len(measured.top_weight) - 1]
    rows = []
    for name, by_layer in measured.usage.items():
        cells = []
        for layer in layers:
            ranked = sorted(enumerate(by_layer[layer]), key=lambda item: -item[1])[:4]
            cells.append(", ".join(f"{expert} ({100 * s:.0f} %)" for expert, s in ranked))
        rows.append([f"`{name}`", *cells])
    return table(["domain", *(f"layer {layer}" for layer in layers)], rows)


def _prediction_table(measured: Measurements) -> str:
    pairs = zip(measured.recall_at_4, measured.recall_at_8, strict=True)
    rows = [
        [f"{layer} → {layer + 1}", f"{100 * at_4:.1f} %", f"{100 * at_8:.1f} %"]
        for layer, (at_4, at_8) in enumerate(pairs)
    ]
    return table(["layers", "among its first 4", "among its first 8"], rows)


def _corpus_table(folder: Path, records: list[DomainRecord], weights: list[float]) -> str:
    rows = []
    for record, weight in zip(records, weights, strict=True):
        sources = ", ".join(f"{p.name} {p.version}" for p in record.packages)
        tokens = len(load_tokens(folder, record.name, "train"))
        rows.append(
            [
                f"`{record.name}`",
                record.title,
                sources,
                f"{record.documents:,}",
                f"{record.read_bytes:,}",
                f"{record.train_bytes:,}",
                f"{tokens:,}",
                f"{100 * weight / sum(weights):.0f} %",
                f"{record.test_bytes:,}",
                f"{100 * record.test_overlap:.1f} %",
            ]
        )
    header = [
        "domain",
        "what",
        "packages",
        "documents",
        "bytes read",
        "bytes for training",
        "tokens",
        "share of batches",
        "bytes held out",
        "overlap",
    ]
    return table(header, rows)


def _samples(measured: Measurements) -> str:
    parts = []
    for name, (prompt, continuation) in measured.samples.items():
        text = f"{prompt}▮{continuation}".strip("\n")
        parts.append(f"`{name}`\n\n````text\n{text}\n````\n")
    return "\n".join(parts)


def render(
    folder: Path, records: list[DomainRecord], training: TrainingRecord, measured: Measurements
) -> str:
    """Return the whole card."""
    config, options = ModelConfig(), training.options
    weights = [float(weight) for weight in options["domain_weights"]]  # type: ignore[attr-defined]
    length = int(str(options["sequence_length"]))
    sequences = int(str(options["processes"])) * int(str(options["sequences_per_process"]))
    batch_tokens = sequences * length
    positions = [
        [f"{start}-{end - 1}", f"{value:.2f}"]
        for (start, end), value in zip(
            pairwise(POSITION_BOUNDS), measured.perplexity_by_position, strict=True
        )
    ]
    corpus_tokens = sum(len(load_tokens(folder, record.name, "train")) for record in records)
    # Whoever trains may leave a word on what happened: interruptions, changes on the way.
    notes = folder / "notes.txt"
    template = (Path(__file__).parent / "card.md").read_text("utf-8")
    return FRONT_MATTER + template.format(
        layers=config.layers,
        experts=config.experts,
        top_k=config.top_k,
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        length=length,
        long_length=2 * length,
        max_positions=MAX_POSITIONS,
        long_from=f"{100 * float(str(options['second_phase_from'])):.0f} %",
        seed=options["seed"],
        steps=f"{training.steps:,}",
        tokens=f"{training.tokens:,}",
        hours=f"{training.training_s / 3600:.2f}",
        hardware=training.hardware,
        tokens_per_s=f"{training.tokens / training.training_s:,.0f}",
        muon_lr=options["muon_lr"],
        adam_lr=options["adam_lr"],
        balance=options["balance_weight"],
        late_balance=options["second_phase_balance_weight"],
        processes=options["processes"],
        batch_tokens=f"{batch_tokens:,}",
        shingle=SHINGLE_BYTES,
        window=measured.window,
        discount=measured.bigram_discount,
        difference=f"{measured.logits_difference:.1e}",
        corpus_tokens=f"{corpus_tokens:,}",
        notes=notes.read_text("utf-8") if notes.exists() else "",
        corpus=_corpus_table(folder, records, weights),
        quality=_quality_table(measured),
        positions=table(["position in the window", "perplexity"], positions),
        routing=_routing_table(measured),
        top_experts=_top_experts_table(measured),
        prediction=_prediction_table(measured),
        samples=_samples(measured),
    )


def render_texts_readme(folder: Path, records: list[DomainRecord]) -> str:
    """Return the README that goes beside the held-out texts."""
    rows, contents = [], []
    for record in records:
        names = ", ".join(document.name for document in load_part(folder, record.name, "test"))
        contents.append(f"- `{record.name}.txt`: {names}")
        versions = {package.name: package.version for package in record.packages}
        sources = ", ".join(f"{name} {versions[name]}" for name in record.test_packages)
        rows.append([f"`{record.name}.txt`", record.title, sources, record.licence])
    template = (Path(__file__).parent / "texts.md").read_text("utf-8")
    files = table(["file", "what", "package", "licence"], rows)
    return template.format(files=files, contents="\n".join(contents))
