"""How fast quantised checkpoints become bfloat16, here and in transformers.

    python -m benchmarks.dequantise

One matrix of an expert of DeepSeek-V3 in FP8 and one of GPT-OSS in MXFP4, drawn at random, by one
thread; contenders take turns, and the best round of each counts, in processor time. *Copying* moves
as many bytes as the result has: what no reader can undercut. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.options import at_least
from moepack.dequantise import fp8_weights, mxfp4_weights

#: Rows and columns.
FP8_SHAPE = (2048, 7168)
MXFP4_SHAPE = (5760, 2880)


class Case(NamedTuple):
    """A matrix to dequantise.

    Attributes
    ----------
    codes_bytes : int
        What is read of it, scales left out.
    contenders : dict
        Each makes the whole matrix.
    """

    name: str
    codes_bytes: int
    contenders: dict[str, Callable[[], object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, then one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=7)
    options = parser.parse_args(arguments)
    print(f"{'format':<8}{'contender':<14}{'ms':>8}{'codes, GB/s':>14}{'bfloat16, GB/s':>17}")
    found: dict[str, dict[str, float]] = {}
    for case in (_fp8(*FP8_SHAPE), _mxfp4(*MXFP4_SHAPE)):
        seconds = _race(case, options.rounds)
        size_bytes = _result_bytes(case)
        for name, best_s in seconds.items():
            print(
                f"{case.name:<8}{name:<14}{1e3 * best_s:8.1f}"
                f"{case.codes_bytes / best_s / 1e9:14.2f}{size_bytes / best_s / 1e9:17.2f}"
            )
        found[case.name] = {name: case.codes_bytes / best_s for name, best_s in seconds.items()}
    print(json.dumps({"codes_bytes_per_s": found}))
    return 0


def _race(case: Case, rounds: int) -> dict[str, float]:
    """The best seconds of each contender, after a round that does not count."""
    best = dict.fromkeys(case.contenders, float("inf"))
    for number in range(rounds + 1):
        for name, contender in case.contenders.items():
            started_s = time.process_time()
            contender()
            if number:
                best[name] = min(best[name], time.process_time() - started_s)
    return best


def _result_bytes(case: Case) -> int:
    return case.codes_bytes * {"FP8": 2, "MXFP4": 4}[case.name]


def _fp8(rows: int, columns: int) -> Case:
    import torch
    from transformers.integrations.finegrained_fp8 import (  # noqa: TID251 - what is compared with
        Fp8Dequantize,
    )

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    codes = random.integers(0, 0x7F, (rows, columns), dtype=np.uint8)
    scales = random.uniform(1e-4, 2e-4, (rows // 128, columns // 128)).astype(np.float32)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)
    convert = Fp8Dequantize(None)
    result = np.zeros((rows, columns), np.uint16)
    return Case(
        "FP8",
        codes.nbytes,
        {
            "moepack": lambda: fp8_weights(codes, scales, (128, 128), "BF16"),
            "transformers": lambda: convert._dequantize_one(*theirs, torch.bfloat16),
            "copying": result.copy,
        },
    )


def _mxfp4(rows: int, columns: int) -> Case:
    import torch
    from transformers.integrations.mxfp4 import (  # noqa: TID251 - what is compared with
        convert_moe_packed_tensors,
    )

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
    scales = random.integers(112, 124, (rows, columns // 32), dtype=np.uint8)
    theirs = torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None]
    result = np.zeros((rows, columns), np.uint16)
    return Case(
        "MXFP4",
        blocks.nbytes,
        {
            "moepack": lambda: mxfp4_weights(blocks, scales, "BF16"),
            "transformers": lambda: convert_moe_packed_tensors(*theirs),
            "copying": result.copy,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
