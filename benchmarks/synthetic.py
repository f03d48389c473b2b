"""Checkpoints with the shapes of real models, whose routers route as those do.

    python -m benchmarks.synthetic --shape olmoe-1b-7b --layers 7 --out DIR
    python -m benchmarks.synthetic --check DIR --recording FILE

The first writes a checkpoint of random weights that transformers and moepack open alike. Usage of
experts, their reuse from token to token and how well the next layer's are predicted follow a preset
of profiles/routing: how it is done is in :mod:`benchmarks.synthetic_residual`. The second runs a
checkpoint and prints what came of it beside the preset's figures and the recorded ones
(:mod:`benchmarks.synthetic_check`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import at_least
from benchmarks.setting import named
from benchmarks.synthetic_check import check
from benchmarks.synthetic_folder import write_checkpoint
from moepack.cli.progress import TerminalProgress
from moepack.presets import resolve
from moepack.routing_model import load_routing_model

#: The configs of the models as their publishers have them.
CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "checkpoint" / "hub_configs"

#: Shapes, and the routing that each has unless told otherwise.
SHAPES = {
    "olmoe-1b-7b": "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b": "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "mixtral-8x7b": "mixtral-8x7b",
}


_WIDTHS = {
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
}
_FEWEST_HEADS = 4


def shape_config(
    shape: str, layers: int | None = None, narrow: int = 1, vocab: int | None = None
) -> dict[str, Any]:
    """The config of a shape, cut to its first layers and tokens, its widths over ``narrow``."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{shape}.json").read_text("utf-8"))
    if layers is not None:
        config["num_hidden_layers"] = layers
    if vocab is not None:
        config["vocab_size"] = vocab
    for name in _WIDTHS & config.keys():
        config[name] //= narrow
    keys, queries = config["num_key_value_heads"], config["num_attention_heads"]
    config["num_key_value_heads"] = max(min(keys, _FEWEST_HEADS), keys // narrow)
    config["num_attention_heads"] = max(config["num_key_value_heads"], queries // narrow)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint, or check one."""
    return named(_run, _parser().parse_args(arguments))


def _run(asked: argparse.Namespace) -> int:
    if asked.check is not None:
        check(asked.check, asked.recording, draws=asked.draws, generate=not asked.no_drawn)
    else:
        _write(asked)
    return 0


def _write(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    write_checkpoint(
        shape_config(asked.shape, asked.layers, asked.narrow, asked.vocab),
        load_routing_model(resolve(asked.routing or SHAPES[asked.shape], "routing")),
        asked.out,
        seed=asked.seed,
        recipe={
            "shape": asked.shape,
            "layers": asked.layers,
            "narrow": asked.narrow,
            "vocab": asked.vocab,
        },
        progress=TerminalProgress(sys.stderr),
    )
    print(json.dumps({"written": str(asked.out), "shape": asked.shape, "seed": asked.seed}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="write a checkpoint there")
    what.add_argument("--check", type=Path, metavar="DIR", help="run the checkpoint that is there")
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--layers", type=at_least(1), metavar="N", help="of them; all unless told")
    parser.add_argument(
        "--vocab",
        type=at_least(1),
        metavar="TOKENS",
        help="instead of the shape's: few layers with all embeddings are mostly embeddings",
    )
    parser.add_argument(
        "--narrow",
        type=at_least(1),
        default=1,
        metavar="N",
        help="divide all widths, to check routing",
    )
    parser.add_argument("--routing", metavar="PRESET", help="instead of the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recording", type=Path, metavar="FILE", help="recorded routing, an .npz")
    parser.add_argument(
        "--draws", type=at_least(1), default=4, help="sets of random texts (default 4)"
    )
    parser.add_argument("--no-drawn", action="store_true", help="it draws no texts of its own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
