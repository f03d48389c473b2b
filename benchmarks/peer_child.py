"""What runs inside the control group where the program is Python: moepack, and transformers.

    python -m benchmarks.peer_child WORK.json

Every token is announced by a star on standard output; the last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moepack.errors import PlanMismatchError
from moepack.records import decode, record

#: Of one token; JSON has no such sign.
ANNOUNCED = "*"


@record
class ChildWork:
    """What is to be done, by whom.

    Attributes
    ----------
    pack, plan : str
        moepack's packed folder and the file of its plan.
    model : str
        The checkpoint's folder, for transformers.
    cpu_bytes : int
        What accelerate may keep in memory of what lies in ``offload``.
    """

    runner: Literal["moepack", "transformers"]
    prompt: tuple[int, ...]
    warm_prompt: tuple[int, ...]
    new_tokens: int
    temperature: float
    threads: int
    model: str
    offload: str = ""
    cpu_bytes: int = 0
    pack: str = ""
    plan: str = ""


def run_moepack(work: ChildWork) -> dict[str, Any]:
    """Generate with the packed model under its plan, after a warm-up as ``moepack bench`` does."""
    from moepack_runtime.loading import open_packed
    from moepack_runtime.sampling import Sampler, SamplingParams

    from moepack.formats import PackedModel
    from moepack.measuring import warm_up
    from moepack.plan import load_plan
    from moepack.records import to_data

    packed = PackedModel.open(Path(work.pack))
    with open_packed(packed, load_plan(Path(work.plan))) as engine:
        warm_up(engine, [work.warm_prompt])
        sampler = Sampler(SamplingParams(temperature=work.temperature))
        stream = engine.generate(work.prompt, max_new_tokens=work.new_tokens, sampler=sampler)
        tokens = list(_announced(stream))
        stats = engine.stats()
    decode_s = (stats.tpot_s or 0.0) * (len(tokens) - 1)
    return {
        "prefill_s": stats.ttft_s,
        "decode_s": decode_s,
        "tokens": tokens,
        "stats": to_data(stats),
    }


def run_transformers(work: ChildWork) -> dict[str, Any]:
    """Generate with transformers, what does not fit offloaded to disk by accelerate."""
    import torch
    import transformers  # noqa: TID251 - a peer here

    from benchmarks.accelerate_offload import open_offloaded

    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    model = open_offloaded(Path(work.model), Path(work.offload), work.cpu_bytes)
    times: list[float] = []

    def drawn() -> Iterator[int]:
        inputs, cache = torch.tensor([work.prompt]), transformers.DynamicCache()
        for _ in range(work.new_tokens):
            logits = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = _draw(logits[0, -1].float(), work.temperature)
            times.append(time.perf_counter())
            yield token
            inputs = torch.tensor([[token]])

    with torch.inference_mode():
        model(torch.tensor([work.warm_prompt[:2]]), logits_to_keep=1)
        began_s = time.perf_counter()
        tokens = list(_announced(drawn()))
    return {"prefill_s": times[0] - began_s, "decode_s": times[-1] - times[0], "tokens": tokens}


def _draw(logits: Any, temperature: float) -> int:
    import torch

    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))


def _announced(stream: Iterator[int]) -> Iterator[int]:
    for token in stream:
        sys.stdout.write(ANNOUNCED)
        sys.stdout.flush()
        yield token


def main() -> int:
    """Do what the file says, and print one JSON object."""
    path = Path(sys.argv[1])
    work = decode(ChildWork, path.read_bytes(), what=str(path), error=PlanMismatchError)
    run = run_moepack if work.runner == "moepack" else run_transformers
    print("\n" + json.dumps(run(work)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
