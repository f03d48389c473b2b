"""Training: data-parallel processes of one thread each, to a wall-clock end.

One thread for each process and one exchange of gradients for each step lose little when the
machine is shared; threads that meet at every operation wait for the slowest each time.

The schedule follows *progress*, not steps: progress grows by the share of the remaining time that
a step took, so that the learning rate reaches zero at the given end whatever the machine's speed,
and time during which the processes were stopped does not move it.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from shipped_model.model import ModelConfig, MoEModel, balance_loss
from shipped_model.optimizer import make_optimizers
from shipped_model.tokenizer import load_tokens


@dataclass(frozen=True)
class TrainingOptions:
    """How to train; what is not here is in `ModelConfig`."""

    domains: tuple[str, ...]
    domain_weights: tuple[float, ...]
    seed: int
    end_s: float  # Unix time at which the schedule completes
    processes: int = 2
    sequence_length: int = 512
    sequences_per_process: int = 10
    # From this progress on: half as many sequences, twice as long, and a lighter balance loss.
    second_phase_from: float = 0.7
    second_phase_balance_weight: float = 5e-4
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    balance_weight: float = 3e-3
    warmup_steps: int = 40
    constant_until: float = 0.2
    checkpoint_every_s: float = 240.0
    evaluate_every_steps: int = 200


@dataclass
class Progress:
    """Where a training run is; saved with every checkpoint."""

    step: int = 0
    fraction: float = 0.0
    tokens: int = 0
    training_s: float = 0.0


class Batches:
    """Random windows of the token streams; which domain, by fixed weights."""

    def __init__(self, folder: Path, options: TrainingOptions, seed: int) -> None:
        self._streams = [load_tokens(folder, name, "train") for name in options.domains]
        self._weights = np.array(options.domain_weights) / sum(options.domain_weights)
        self._random = np.random.default_rng(seed)

    def draw(self, count: int, length: int) -> Tensor:
        """Return [count, length + 1] token ids: inputs and, shifted by one, targets."""
        rows = []
        for domain in self._random.choice(len(self._streams), size=count, p=self._weights):
            stream = self._streams[domain]
            start = self._random.integers(0, len(stream) - length)
            rows.append(stream[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def windows(ids: np.ndarray[tuple[int], np.dtype[np.uint16]], length: int) -> Tensor:
    """Cut a token stream into rows [count, length + 1] that overlap by the one token shared."""
    count = (len(ids) - 1) // length
    rows = [ids[i * length : (i + 1) * length + 1] for i in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def evaluate(model: MoEModel, folder: Path, domain: str, part: str, length: int) -> float:
    """Return the mean loss in nats per token over one part of a domain."""
    total, rows = 0.0, windows(load_tokens(folder, domain, part), length)
    for batch in torch.split(rows, 16):
        total += model.loss(batch[:, :-1], batch[:, 1:])[0].item() * len(batch)
    return total / len(rows)


def learning_rate_factor(progress: Progress, options: TrainingOptions) -> float:
    """Trapezoid: linear warm-up by steps, constant, linear decay to zero by progress."""
    warmup = min(1.0, (progress.step + 1) / options.warmup_steps)
    decay = (1.0 - progress.fraction) / (1.0 - options.constant_until)
    return min(warmup, decay, 1.0)


def advance(progress: Progress, step_s: float, typical_s: float, end_s: float) -> None:
    """Count one step; a step far longer than usual was a pause and counts as a usual one."""
    counted_s = min(step_s, 4.0 * typical_s)
    left_s = max(end_s - time.time(), 0.0) + counted_s
    progress.step += 1
    progress.training_s += counted_s
    progress.fraction += (1.0 - progress.fraction) * min(1.0, counted_s / left_s)
    if left_s < 1.5 * typical_s:
        progress.fraction = 1.0


class Trainer:
    """One process's part of a training run."""

    def __init__(self, folder: Path, options: TrainingOptions, rank: int) -> None:
        self._folder, self._options, self._rank = folder, options, rank
        torch.manual_seed(options.seed)
        self.model = MoEModel(ModelConfig())
        self._optimizers = make_optimizers(
            self.model, options.muon_lr, options.adam_lr, options.weight_decay
        )
        self.progress = Progress()
        self._resume()
        seed = options.seed * 1_000_003 + self.progress.step * options.processes + rank
        self._batches = Batches(folder, options, seed)
        self._log = folder / "training.jsonl"

    def _resume(self) -> None:
        path = self._folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.progress = Progress(**state["progress"])

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "progress": asdict(self.progress),
            "options": asdict(self._options),
        }
        partial = self._folder / "checkpoint.pt.partial"
        torch.save(state, partial)
        partial.replace(self._folder / "checkpoint.pt")

    def _exchange_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self._options.processes
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def _step(self) -> tuple[float, float]:
        """Train on one batch; return its loss and the least used expert's share of uniform."""
        options = self._options
        second_phase = self.progress.fraction >= options.second_phase_from
        longer = 2 if second_phase else 1
        ids = self._batches.draw(
            options.sequences_per_process // longer, options.sequence_length * longer
        )
        loss, trace = self.model.loss(ids[:, :-1], ids[:, 1:])
        balance = torch.stack([balance_loss(routing) for routing in trace.routings]).sum()
        balance_weight = (
            options.second_phase_balance_weight if second_phase else options.balance_weight
        )
        torch.autograd.backward(loss + balance_weight * balance)
        self._exchange_gradients()
        factor = learning_rate_factor(self.progress, options)
        for optimizer, peak in zip(
            self._optimizers, (options.muon_lr, options.adam_lr), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        experts = self.model.config.experts
        used = [torch.bincount(r.ids.flatten(), minlength=experts) for r in trace.routings]
        least = min(float(u.min() / u.sum()) * experts for u in used)
        return loss.item(), least

    def _share_progress(self, step_s: float, typical_s: float) -> None:
        """Let the first process decide how far the run is, so that all agree on the schedule."""
        if self._rank == 0:
            advance(self.progress, step_s, typical_s, self._options.end_s)
        numbers = torch.tensor(list(asdict(self.progress).values()), dtype=torch.float64)
        dist.broadcast(numbers, src=0)
        step, fraction, _, training_s = numbers.tolist()
        options = self._options
        tokens = options.processes * options.sequences_per_process * options.sequence_length
        self.progress = Progress(int(step), fraction, self.progress.tokens + tokens, training_s)

    def _report(self, loss: float, least: float, typical_s: float) -> None:
        row = {**asdict(self.progress), "loss": round(loss, 4), "least_used": round(least, 3)}
        row["step_s"] = round(typical_s, 3)
        if self.progress.step % self._options.evaluate_every_steps == 0:
            length = self._options.sequence_length
            row["dev"] = {
                name: round(evaluate(self.model, self._folder, name, "dev", length), 4)
                for name in self._options.domains
            }
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def run(self) -> None:
        """Train until progress is complete."""
        recent: list[float] = []
        smooth_loss, saved_at = 0.0, time.monotonic()
        while self.progress.fraction < 1.0:
            started = time.monotonic()
            loss, least = self._step()
            step_s = time.monotonic() - started
            recent = [*recent[-20:], step_s]
            typical_s = float(np.median(recent))
            self._share_progress(step_s, typical_s)
            smooth_loss = loss if smooth_loss == 0.0 else 0.9 * smooth_loss + 0.1 * loss
            if self._rank == 0 and self.progress.step % 10 == 0:
                self._report(smooth_loss, least, typical_s)
            if self._rank == 0 and time.monotonic() - saved_at > self._options.checkpoint_every_s:
                self._save()
                saved_at = time.monotonic()
        if self._rank == 0:
            self._save()


def _process(rank: int, folder: Path, options: TrainingOptions) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    meeting = f"file://{folder.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    Trainer(folder, options, rank).run()
    dist.barrier()
    dist.destroy_process_group()


def train(folder: Path, options: TrainingOptions) -> None:
    """Train or resume until ``options.end_s``; leaves ``checkpoint.pt`` and ``training.jsonl``."""
    (folder / "meeting").unlink(missing_ok=True)
    spawn(  # type: ignore[no-untyped-call]
        _process, args=(folder, options), nprocs=options.processes
    )
