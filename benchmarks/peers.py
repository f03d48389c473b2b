"""moepack against other programs: the same weights, prompt, memory and cold disk.

    python -m benchmarks.peers MODEL --scratch DIR --llama-cpp PATH --ik-llama-cpp PATH
    python -m benchmarks.peers MODEL --scratch DIR --llama-cpp PATH --bits 8 4 --only-prepare
    python -m benchmarks.peers MODEL --scratch DIR --llama-cpp PATH --bits 8 4
    python -m benchmarks.peers MODEL --scratch DIR --llama-cpp PATH --bits 4 --trunk int8

For each share of the model's size every program runs in a memory control group of that size, the
whole process inside, its files dropped from the page cache before; the programs take turns, in
another order every round. transformers offloads to disk by accelerate, llama.cpp and ik_llama.cpp
run a GGUF of the very same weights (:mod:`benchmarks.gguf_export`). Peers have their best settings:
each number of threads and each variant is tried in the first round and the fastest kept; a model is
mapped over the file and over a loop device that reads no more than 128 KiB ahead; weights are not
repacked, and of the kinds with fewer bits also are. moepack is planned for the limit less 100 MiB.

With fewer bits the routed experts are rounded on both sides, and with ``--trunk int8`` the trunk's
large matrices as well, to int8 and to Q8_0. The size is that of what is then stored, the larger one
of both. What that loses is measured apart, on the model that ships with moepack
(:mod:`benchmarks.peer_quality`, with the same ``--trunk``), and a pair counts where moepack loses
no more.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.control_group import Interface
from benchmarks.gguf_kinds import Kind
from benchmarks.llama_runners import find_binary, find_sibling, llama_runners, of_kind
from benchmarks.loop_device import LoopDevice, NoLoopDeviceError
from benchmarks.options import at_least, new_tokens, positive
from benchmarks.peer_model import NotPreparedError, PeerModel
from benchmarks.peer_pairs import judge_pairs, pairs, told
from benchmarks.peer_precision import BITS, ROUNDED_BITS, TRUNKS, Precision, precision
from benchmarks.peer_quality import kept_quality
from benchmarks.peer_report import OWN, Bar, say, table
from benchmarks.peer_rounds import compare
from benchmarks.peer_runners import (
    Generation,
    MoepackRunner,
    Runner,
    TransformersRunner,
    transformers_absent,
)
from benchmarks.setting import named
from moepack.errors import MoepackError
from moepack.measuring import shipped_prompts
from moepack.units import format_size

TRANSFORMERS = "transformers + accelerate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table and verdicts for every share, and one line of JSON."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.trunk != "exact" and not set(args.bits) <= set(ROUNDED_BITS):
        parser.error(f"--trunk {args.trunk} goes with --bits {' or '.join(map(str, ROUNDED_BITS))}")
    # So that groups, devices and programs are taken down then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return named(_run, args)


def _run(args: argparse.Namespace) -> int:
    Interface.find()  # before anything takes long
    args.scratch.mkdir(parents=True, exist_ok=True)
    model = PeerModel(args.model, args.scratch)
    say(f"{model.spec.name}: {format_size(model.size_bytes)}; profile, unless it is known")
    model.profile(args.text, trunk=args.trunk)
    generation = _generation(args, model)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="run.") as own:
        found = [_at_bits(args, model, generation, bits, Path(own)) for bits in args.bits]
    document = {
        "model": str(args.model),
        "size_bytes": model.size_bytes,
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "temperature": args.temperature,
        "rounds": args.rounds,
        "trunk": args.trunk,
        "bits": found,
    }
    print(json.dumps(document))
    return 0


def _at_bits(
    args: argparse.Namespace, model: PeerModel, generation: Generation, bits: int, scratch: Path
) -> dict[str, Any]:
    """Measure at every share, with so many bits a weight."""
    both = precision(bits, args.trunk)
    with _peers(args, model, both) as peers:
        stored = [model.stored_bytes(both.asked)]
        stored += [path.stat().st_size for each in peers for path in each.files if path.is_file()]
        shares = [
            _share(args, model, generation, bits, share, max(stored), peers, scratch)
            for share in args.shares
        ]
    return {"bits": bits, "trunk": args.trunk, "stored_bytes": max(stored), "shares": shares}


def _share(
    args: argparse.Namespace,
    model: PeerModel,
    generation: Generation,
    bits: int,
    share: float,
    stored_bytes: int,
    peers: Sequence[Runner],
    scratch: Path,
) -> dict[str, Any]:
    """Measure at one share, and print it."""
    both = precision(bits, args.trunk)
    asked, what = both.asked, f"{bits} bits{both.told}"
    limit_bytes = int(share * stored_bytes)
    say(f"{what}, {share:.0%}, {format_size(limit_bytes)}: plan and pack, unless it is there")
    bar = Bar("", 0.0, 0.0)
    prediction: Any = None
    try:
        made = model.prepare(limit_bytes, asked, prompt_tokens=args.prompt, new_tokens=args.new)
        own = MoepackRunner(OWN, (made.threads,), pack=made.packed.pack, plan=made.packed.plan)
        bar, prediction = made.bar, made.packed.document["prediction"]
    except NotPreparedError as failure:
        say(str(failure))
        own = MoepackRunner(OWN, (), absent=str(failure))
    if args.only_prepare:
        return {"share": share, "limit_bytes": limit_bytes, "prediction": prediction}
    rows = compare(
        [own, *peers],
        generation,
        rounds=args.rounds,
        limit_bytes=limit_bytes,
        timeout_s=args.timeout,
        scratch=scratch,
    )
    kinds = {each.name: each.kind for each in peers}
    quality = kept_quality(args.scratch, asked.trunk)
    judged = judge_pairs(pairs(both, model.encoding(asked), quality), rows, kinds, bar)
    print(f"\n{what}, {share:.0%} of {format_size(stored_bytes)}: {format_size(limit_bytes)}\n")
    print("\n".join(table(rows)))
    for each in judged:
        print(f"\n{told(each, rows, kinds, bar, share)}", flush=True)
    return {
        "share": share,
        "limit_bytes": limit_bytes,
        "rows": [row.document() for row in rows],
        "bar": bar._asdict(),
        "pairs": [each.document() for each in judged],
        "prediction": prediction,
    }


@contextlib.contextmanager
def _peers(args: argparse.Namespace, model: PeerModel, both: Precision) -> Iterator[list[Runner]]:
    """Everybody but moepack. What is absent is among them, with the reason."""
    threads = tuple(args.threads)
    left_out = tuple(args.skip)
    runners: list[Runner] = []
    if both.asked.quality == "exact" and not (left_out and TRANSFORMERS.startswith(left_out)):
        runners.append(_transformers(model, threads))
    binaries = {
        "llama.cpp": find_binary(args.llama_cpp, ("llama-completion", "llama-cli")),
        "ik_llama.cpp": find_binary(args.ik_llama_cpp, ("llama-cli",)),
    }
    with contextlib.ExitStack() as stack:
        for kind in both.kinds:
            gguf: Path | str = "no binary was given, or it is not there"
            device: Path | str = "there is no GGUF to map"
            # A kind that everybody leaves out is not even made: it may not fit on the disk.
            programs = {
                name: binary
                for name, binary in binaries.items()
                if not (left_out and of_kind(name, kind).startswith(left_out))
            }
            if any(programs.values()):
                gguf = _gguf(args, model, kind)
            if isinstance(gguf, Path):
                try:
                    device = stack.enter_context(LoopDevice(gguf)).path
                except NoLoopDeviceError as failure:
                    device = str(failure)
            for name, binary in programs.items():
                runners += llama_runners(name, binary, gguf, device, threads, kind)
        yield [each for each in runners if not left_out or not each.name.startswith(left_out)]


def _gguf(args: argparse.Namespace, model: PeerModel, kind: Kind) -> Path | str:
    """The file, or why there is none."""
    say(f"the GGUF in {kind.told}, unless it is there")
    try:
        return model.gguf(kind, args.gguf, quantiser=find_sibling(args.llama_cpp, "llama-quantize"))
    except MoepackError as failure:
        return str(failure)


def _transformers(model: PeerModel, threads: tuple[int, ...]) -> Runner:
    absent = transformers_absent()
    if absent:
        return TransformersRunner(TRANSFORMERS, threads, absent)
    say("what accelerate offloads, unless it is there")
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
        help="on the disk that is to be measured; profiles, plans, packs and GGUFs stay there",
    )
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[16])
    parser.add_argument(
        "--trunk", choices=TRUNKS, default="exact", help="int8: rounded on both sides"
    )
    where = "the program, or a folder with it (build/bin is looked into)"
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="PATH",
        help=f"llama-completion, and llama-quantize for Q4_K: {where}",
    )
    parser.add_argument("--ik-llama-cpp", type=Path, metavar="PATH", help=f"llama-cli: {where}")
    parser.add_argument(
        "--gguf",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="written by benchmarks.gguf_export; others are made in the scratch folder",
    )
    parser.add_argument("--shares", type=positive, nargs="+", default=[1.0, 0.5, 0.3])
    parser.add_argument("--prompt", type=at_least(1), default=256, metavar="TOKENS")
    parser.add_argument("--new", type=new_tokens, default=64, metavar="TOKENS")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--threads", type=at_least(1), nargs="+", default=[1, 2], help="to try for peers"
    )
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
    parser.add_argument("--timeout", type=positive, default=900.0, metavar="SECONDS")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="NAME", help="peers whose names begin so"
    )
    parser.add_argument(
        "--only-prepare", action="store_true", help="make plans, packs and GGUFs, measure nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
