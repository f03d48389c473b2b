"""Everything in the fast tier: moepack's engine beside transformers on the same checkpoint.

    python -m benchmarks.resident --model DIR
    python -m benchmarks.resident --model DIR --llama-cpp PATH --gguf FILE

Same weights, dtype, tokens and threads; both models are in memory at once (peak: twice the model)
and take turns, so ratios are within one round. transformers runs with the implementation of its
experts that a first round found fastest for each phase. Without a model: the one that ships; for
the shape of a published one, ``python -m benchmarks.synthetic`` writes a checkpoint. With llama.cpp
and the same weights as a GGUF (``benchmarks.gguf_export``), its llama-bench takes its turn in every
round, with the file in the page cache (peak: three times the model).

The engine's own overhead is measured on a model whose experts have the least width, as published
ones have it otherwise (16 layers, 8 of 64 experts): what a layer takes from the routing to the sum
over its experts, less their products; and beside it a whole layer, less the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers  # noqa: TID251 - what is compared with
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.engine import Engine
from moepack_runtime.experts import ExpertMemory
from moepack_runtime.ffn import gated_ffn
from moepack_runtime.loading import open_checkpoint, open_transfer
from moepack_runtime.moe import Block, add_experts
from moepack_runtime.router import Routing
from moepack_runtime.weights import TORCH_DTYPE

from benchmarks.llama_bench import LlamaBench, find_llama_bench
from benchmarks.options import at_least
from moepack.budget import memory_breakdown
from moepack.checkpoint import Checkpoint
from moepack.layout import Layout
from moepack.layouts import uniform_layout
from moepack.model_spec import ModelSpec
from moepack.plan import LayerPlacement, Placement
from moepack.shipped import shipped_model

#: moepack's speed over transformers', at least; and microseconds a layer, at most.
DECODE_BAR, PREFILL_BAR, OVERHEAD_BAR_US = 1.5, 1.0, 150.0

#: transformers' ways to compute experts. The third copies the weights of every token's experts.
PREFILL_WAYS = ("eager", "grouped_mm")
DECODE_WAYS = ("eager", "grouped_mm", "batched_mm")

#: Least widths, everything else as in OLMoE.
LEAST: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "eos_token_id": None,
    "pad_token_id": None,
}

Work = Callable[[], object]

#: What runs a prompt, then on from it: tokens per second of both.
Turn = Callable[[], tuple[float, float]]


class Speeds(NamedTuple):
    """Of one contender, tokens per second of each round."""

    prefill: list[float]
    decode: list[float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and end with a line of JSON."""
    args = _parser().parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = shipped_model() if args.model is None else args.model
    checkpoint = Checkpoint.open(folder)
    report: dict[str, Any] = {"model": checkpoint.spec.name, "torch": torch.__version__}
    report["transformers"] = transformers.__version__
    report["runs"] = [_compare(checkpoint, folder, args, threads) for threads in args.threads]
    found = overhead(args.rounds)
    report["overhead_us"], report["layer_us"] = found
    print(f"engine's own overhead a layer: {found.own_us:.0f} us", end=" ")
    print(f"(bar: under {OVERHEAD_BAR_US:.0f}); a whole layer {found.layer_us:.0f} us")
    report["met"] = report["overhead_us"] < OVERHEAD_BAR_US and all(
        run["decode_ratio"] >= DECODE_BAR and run["prefill_ratio"] >= PREFILL_BAR
        for run in report["runs"]
    )
    print(json.dumps(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt", type=at_least(1), default=512, metavar="TOKENS")
    parser.add_argument("--new", type=at_least(1), default=16, metavar="TOKENS")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2])
    where = "llama-bench, or a folder with it (build/bin is looked into)"
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help=where)
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same weights, for it")
    return parser


def _compare(
    checkpoint: Checkpoint, folder: Path, args: argparse.Namespace, threads: int
) -> dict[str, Any]:
    """The engine and transformers in turns, and llama.cpp where it is given."""
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, spec.vocab_size, (args.prompt + args.new,), generator=generator)
    prompt, following = tokens[: args.prompt].tolist(), tokens[args.prompt :].tolist()
    run: dict[str, Any] = {"threads": threads, "prompt": args.prompt, "new": args.new}
    llama = find_llama_bench(args.llama_cpp, args.gguf, threads)
    theirs = Theirs(folder, TORCH_DTYPE[spec.dtype], prompt, following)
    with open_resident(checkpoint, len(tokens) + 1, threads) as engine:
        ours = Ours(engine, prompt, following)
        torch.set_num_threads(threads)
        ways = theirs.fastest_ways()
        turns = {
            "moepack": _timed(ours.prefill, ours.decode, args),
            "transformers": _timed(*theirs.works(ways), args),
        }
        if isinstance(llama, LlamaBench):
            turns["llama_cpp"] = _llama_turn(llama, args)
        else:
            run["llama_cpp_absent"] = llama
        found = {name: Speeds([], []) for name in turns}
        for number in range(args.rounds):
            for name in turns if number % 2 == 0 else reversed(turns):
                prefill, decode = turns[name]()
                found[name].prefill.append(prefill)
                found[name].decode.append(decode)
    run["transformers_experts"] = {"prefill": ways[0], "decode": ways[1]}
    for phase in ("prefill", "decode"):
        for name, speeds in found.items():
            run[f"{name}_{phase}"] = statistics.median(getattr(speeds, phase))
            run[f"{name}_{phase}_rounds"] = getattr(speeds, phase)
        mine, other = (getattr(found[name], phase) for name in ("moepack", "transformers"))
        run[f"{phase}_ratio"] = statistics.median(a / b for a, b in zip(mine, other, strict=True))
    _print(spec, run)
    return run


def _timed(prefill: Work, decode: Work, args: argparse.Namespace) -> Turn:
    return lambda: (args.prompt / seconds(prefill), args.new / seconds(decode))


def _llama_turn(llama: LlamaBench, args: argparse.Namespace) -> Turn:
    return lambda: (llama.prefill(args.prompt), llama.decode(args.prompt, args.new))


def _print(spec: ModelSpec, run: dict[str, Any]) -> None:
    ways = run["transformers_experts"]
    print(f"\n{spec.name}, {spec.dtype}, {run['threads']} threads, ", end="")
    print(f"prompt of {run['prompt']}, {run['new']} new tokens")
    print("| tokens/s | prefill | decode |\n| --- | --- | --- |")
    for name in ("moepack", "transformers", "llama_cpp"):
        if f"{name}_decode" in run:
            print(f"| {name} | {run[f'{name}_prefill']:.1f} | {run[f'{name}_decode']:.2f} |")
    print(f"| moepack over transformers | {run['prefill_ratio']:.2f} ", end="")
    print(f"| {run['decode_ratio']:.2f} |")
    if "llama_cpp_absent" in run:
        print(f"(llama.cpp: {run['llama_cpp_absent']})")
    print(f"(transformers' experts: {ways['prefill']} and {ways['decode']}; ", end="")
    print(f"bars: {PREFILL_BAR:.1f} and {DECODE_BAR:.1f})")


def seconds(work: Work) -> float:
    """What it takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _thread_seconds(work: Work) -> float:
    """What it takes of this thread's time on a processor."""
    began_s = time.thread_time()
    work()
    return time.thread_time() - began_s


class Ours:
    """The engine on a prompt, then on given tokens."""

    def __init__(self, engine: Engine, prompt: list[int], following: list[int]) -> None:
        self._engine, self._prompt, self._following = engine, prompt, following
        self.prefill()

    def prefill(self) -> None:
        """From an empty cache."""
        self._engine.reset()
        self._engine.prefill(self._prompt)

    def decode(self) -> None:
        """Behind the prompt."""
        for token in self._following:
            self._engine.decode(token)


class Theirs:
    """transformers on the same."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, prompt: list[int], following: list[int]
    ) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._prompt = torch.tensor([prompt])
        self._following = [torch.tensor([[token]]) for token in following]
        self._cache: Any = None

    @torch.inference_mode()
    def _prefill(self) -> None:
        found = self._model(self._prompt, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values

    @torch.inference_mode()
    def _decode(self) -> None:
        for token in self._following:
            self._model(token, past_key_values=self._cache, use_cache=True)

    def _by(self, way: str, work: Work) -> Work:
        def run() -> None:
            self._model.set_experts_implementation(way)
            work()

        return run

    def works(self, ways: tuple[str, str]) -> tuple[Work, Work]:
        """Prefill and decode."""
        return self._by(ways[0], self._prefill), self._by(ways[1], self._decode)

    def fastest_ways(self) -> tuple[str, str]:
        """The ways to compute experts that take the least time, each tried after a warm-up."""
        prefill = {way: self._by(way, self._prefill) for way in PREFILL_WAYS}
        decode = {way: self._by(way, self._decode) for way in DECODE_WAYS}
        return _fastest(prefill), _fastest(decode)


def _fastest(works: dict[str, Work]) -> str:
    for work in works.values():
        work()
    times = {way: min(seconds(work) for _ in range(2)) for way, work in works.items()}
    return min(times, key=lambda way: times[way])


def open_resident(checkpoint: Checkpoint, context_tokens: int, threads: int) -> Engine:
    """An engine with a slot for every expert."""
    spec = checkpoint.spec
    layout = uniform_layout(spec, 1.0)
    layers = tuple(
        LayerPlacement(
            layer=cut.layer,
            budget_bytes=0,
            top_slots=spec.moe(cut.layer).num_experts,
            bottom_slots=0,
            policy="lru",
            hot=tuple(range(spec.moe(cut.layer).num_experts)),
        )
        for cut in layout.layers
    )
    memory = memory_breakdown(
        spec,
        layout,
        layers,
        staging_experts=1,
        context_tokens=context_tokens,
        threads=threads,
    )
    placement = Placement(
        device="cpu",
        fast_budget_bytes=memory.total_bytes,
        staging_experts=1,
        context_tokens=context_tokens,
        prompt_tokens=context_tokens // 2,
        new_tokens=context_tokens // 2,
        memory=memory,
        layers=layers,
        threads=threads,
    )
    return open_checkpoint(checkpoint, spec, layout, placement)


class Overhead(NamedTuple):
    """Microseconds of a decode step for one layer whose experts have the least width.

    Attributes
    ----------
    own_us
        The engine's own: everything from the routing to the sum over the experts, without their
        products.
    layer_us
        A whole layer without its experts' products: attention, norms and router as well.
    """

    own_us: float
    layer_us: float


def overhead(rounds: int) -> Overhead:
    """Medians on one thread, of that thread's own time: what else runs does not count."""
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**LEAST)).to(torch.bfloat16)
    halves, layers_us = [], []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = Checkpoint.open(Path(folder))
        with open_resident(checkpoint, 512, threads=1) as engine:
            ours = Ours(engine, list(range(3, 35)), [7] * 20)
            times = len(engine.spec.layers) * 20
            half, products = _expert_half(checkpoint, times)
            for _ in range(3 * rounds):
                ours.prefill()
                products_s = _thread_seconds(products)
                halves.append((_thread_seconds(half) - products_s) / times * 1e6)
                layers_us.append((_thread_seconds(ours.decode) - products_s) / times * 1e6)
    return Overhead(statistics.median(halves), statistics.median(layers_us))


def _expert_half(checkpoint: Checkpoint, times: int) -> tuple[Work, Work]:
    """So many passes of one token over a layer's experts, and so many times their products."""
    spec = checkpoint.spec
    number = spec.moe_layers[0]
    moe = spec.moe(number)
    layout = Layout(spec.digest, uniform_layout(spec, 1.0).layers[:1])
    transfer = open_transfer(spec, layout, CheckpointStore(checkpoint, spec, layout), "cpu")
    everyone = tuple(range(moe.num_experts))
    place = LayerPlacement(number, 0, moe.num_experts, 0, "lru", everyone)
    memory = ExpertMemory(spec, layout, [place], staging_experts=1, transfer=transfer)
    memory.warm()
    transfer.close()
    with torch.inference_mode():
        x = torch.randn(1, spec.hidden_size).bfloat16()
        ids = torch.arange(moe.top_k).unsqueeze(0)
        block = Block(x, Routing(ids, torch.full(ids.shape, 1 / moe.top_k)))
        slots = memory.layers[number]
        pieces = slots.slots["top"].pieces[: moe.top_k]
        weights = [piece.weights(slots.shapes["top"][0]) for piece in pieces]

    @torch.inference_mode()
    def half() -> None:
        for _ in range(times):
            layer_pass = memory.step(number, ids.tolist())
            total = torch.zeros_like(x, dtype=torch.float32)
            add_experts(moe, [block], [total], layer_pass)
            layer_pass.report()

    @torch.inference_mode()
    def products() -> None:
        for _ in range(times):
            for one in weights:
                gated_ffn(x, one, moe.activation_spec)

    return half, products


if __name__ == "__main__":
    main()
