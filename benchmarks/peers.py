"""moepack against other programs: the same weights, prompt, memory and cold disk.

    python -m benchmarks.peers MODEL --scratch DIR --llama-cpp PATH --ik-llama-cpp PATH

For each share of the model's size every program runs in a memory control group of that size, the
whole process inside, its files dropped from the page cache before; the programs take turns, in
another order every round. transformers offloads to disk by accelerate, llama.cpp and ik_llama.cpp
run a bfloat16 GGUF of the very same weights (:mod:`benchmarks.gguf_export`). Peers have their best
settings: each number of threads is tried in the first round and the faster kept; a model is mapped
over the file and over a loop device that reads no more than 128 KiB ahead; weights are not
repacked. moepack is planned for the limit less 100 MiB.

Printed are medians over the rounds. The bar for moepack is ``min(2.5 * the best peer, 0.9 * disk
bandwidth / bytes missed by the best online policy in the plan's replay)`` in decoding, at shares
below one, and the best peer's prefill. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.control_group import Interface
from benchmarks.llama_runners import find_binary, llama_runners
from benchmarks.loop_device import LoopDevice, NoLoopDeviceError
from benchmarks.peer_model import Bar, NotPreparedError, PeerModel
from benchmarks.peer_report import OWN, Row, best_threads, judge, row_of, sentence, table
from benchmarks.peer_runners import (
    Generation,
    Measured,
    MoepackRunner,
    Runner,
    TransformersRunner,
    transformers_absent,
)
from moepack.errors import MoepackError
from moepack.measuring import shipped_prompts
from moepack.units import format_size

TRANSFORMERS = "transformers + accelerate"


def compare(
    runners: Sequence[Runner],
    generation: Generation,
    *,
    rounds: int,
    limit_bytes: int,
    timeout_s: float,
    scratch: Path,
) -> list[Row]:
    """Run every program once a round, in turns; threads are chosen in the first round."""
    found: dict[str, dict[int, list[Measured]]] = {each.name: {} for each in runners}
    failures = {each.name: f"absent: {each.absent}" for each in runners if each.absent}
    order = deque(each for each in runners if not each.absent)
    for number in range(rounds):
        for runner in order:
            runs = found[runner.name]
            counts = runner.threads if number == 0 else tuple(filter(None, [best_threads(runs)]))
            for threads in counts:
                _say(f"round {number + 1}: {runner.name}, {threads} threads")
                outcome = runner.run(
                    generation,
                    threads,
                    limit_bytes=limit_bytes,
                    timeout_s=timeout_s,
                    scratch=scratch,
                )
                if isinstance(outcome, str):
                    failures[runner.name] = outcome
                    _say(f"    {outcome}")
                else:
                    runs.setdefault(threads, []).append(outcome)
                    _say(f"    {outcome.decode_tokens_per_s:.2f} tokens/s")
        order.rotate(-1)
    return [row_of(name, runs, failures.get(name, "")) for name, runs in found.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table and a verdict for every share, and one line of JSON."""
    args = _parser().parse_args(arguments)
    # So that groups, devices and programs are taken down then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(json.dumps(_run(args)))
    except MoepackError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    Interface.find()  # before anything takes long
    args.scratch.mkdir(parents=True, exist_ok=True)
    model = PeerModel(args.model, args.scratch)
    _say(f"{model.spec.name}: {format_size(model.size_bytes)}; profile, unless it is known")
    model.profile(args.text)
    generation = _generation(args, model)
    shares = []
    with (
        tempfile.TemporaryDirectory(dir=args.scratch, prefix="run.") as own,
        _peers(args, model) as peers,
    ):
        shares = [_share(args, model, generation, share, peers, Path(own)) for share in args.shares]
    return {
        "model": str(args.model),
        "size_bytes": model.size_bytes,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "temperature": args.temperature,
        "rounds": args.rounds,
        "shares": shares,
    }


def _share(
    args: argparse.Namespace,
    model: PeerModel,
    generation: Generation,
    share: float,
    peers: Sequence[Runner],
    scratch: Path,
) -> dict[str, Any]:
    """Measure at one share, and print it."""
    limit_bytes = int(share * model.size_bytes)
    _say(f"{share:.0%}, {format_size(limit_bytes)}: plan and pack")
    bar = Bar("", 0.0, 0.0)
    document: dict[str, Any] = {}
    try:
        made = model.prepare(limit_bytes, prompt_tokens=args.prompt, new_tokens=args.new)
        own = MoepackRunner(OWN, (made.threads,), pack=made.pack, plan=made.plan)
        bar, document = made.bar, made.document
    except NotPreparedError as failure:
        own = MoepackRunner(OWN, (), absent=str(failure))
    rows = compare(
        [own, *peers],
        generation,
        rounds=args.rounds,
        limit_bytes=limit_bytes,
        timeout_s=args.timeout,
        scratch=scratch,
    )
    verdict = judge(rows, bar)
    print(f"\n{share:.0%} of {format_size(model.size_bytes)}: {format_size(limit_bytes)}\n")
    print("\n".join(table(rows)))
    print(f"\n{sentence(verdict, bar, rows, judged=share < 1)}", flush=True)
    return {
        "share": share,
        "limit_bytes": limit_bytes,
        "rows": [row.document() for row in rows],
        "bar": bar._asdict(),
        "verdict": verdict._asdict(),
        "prediction": document.get("prediction"),
    }


@contextlib.contextmanager
def _peers(args: argparse.Namespace, model: PeerModel) -> Iterator[list[Runner]]:
    """Everybody but moepack. What is absent is among them, with the reason."""
    threads = tuple(args.threads)
    left_out = tuple(args.skip)
    runners: list[Runner] = []
    if not left_out or not TRANSFORMERS.startswith(left_out):
        runners.append(_transformers(model, threads))
    named = {
        "llama.cpp": find_binary(args.llama_cpp, ("llama-completion", "llama-cli")),
        "ik_llama.cpp": find_binary(args.ik_llama_cpp, ("llama-cli",)),
    }
    gguf = Path()
    if any(named.values()):
        _say("the GGUF, unless it is there")
        gguf = model.gguf(args.gguf)
    with contextlib.ExitStack() as stack:
        device: Path | str = "there is no GGUF to map"
        if any(named.values()):
            try:
                device = stack.enter_context(LoopDevice(gguf)).path
            except NoLoopDeviceError as failure:
                device = str(failure)
        for name, binary in named.items():
            runners += llama_runners(name, binary, gguf, device, threads)
        yield [each for each in runners if not left_out or not each.name.startswith(left_out)]


def _transformers(model: PeerModel, threads: tuple[int, ...]) -> Runner:
    absent = transformers_absent()
    if absent:
        return TransformersRunner(TRANSFORMERS, threads, absent)
    _say("what accelerate offloads, unless it is there")
    return TransformersRunner(
        TRANSFORMERS,
        threads,
        model=model.folder,
        offload=model.offload(),
        base_bytes=model.process_base_bytes,
    )


def _generation(args: argparse.Namespace, model: PeerModel) -> Generation:
    """The prompt that all of them get, and another to warm up with."""
    if args.random_prompt:
        numbers = np.random.default_rng(0).integers(model.spec.vocab_size, size=2 * args.prompt)
        prompts = numbers.reshape(2, args.prompt).tolist()
    else:
        prompts = shipped_prompts(Tokenizer.load(model.folder), args.prompt)
    return Generation(tuple(prompts[0]), tuple(prompts[-1]), args.new, args.temperature)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a bfloat16 checkpoint's folder")
    parser.add_argument(
        "--scratch",
        type=Path,
        required=True,
        metavar="DIR",
        help="on the disk that is to be measured; profiles, packs and the GGUF stay there",
    )
    where = "the program, or a folder with it (build/bin is looked into)"
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help=f"llama-completion: {where}")
    parser.add_argument("--ik-llama-cpp", type=Path, metavar="PATH", help=f"llama-cli: {where}")
    parser.add_argument(
        "--gguf", type=Path, metavar="PATH", help="written by benchmarks.gguf_export"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.3])
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--new", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="to try for peers")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--random-prompt",
        action="store_true",
        help="tokens at random instead of the texts that ship with moepack",
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="to record the routing on, instead of those texts",
    )
    parser.add_argument("--timeout", type=float, default=900.0, metavar="SECONDS")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="NAME", help="peers whose names begin so"
    )
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
