"""The shipped model in bfloat16: no further from the exact result than transformers is.

Tolerance: the mean error of a logit, over all positions and tokens, against float64. Single logits
differ more, in transformers as here, where rounding tips a near tie of the router.
"""

from __future__ import annotations

import functools

import torch
import transformers
from moepack_runtime.tokenizer import Tokenizer

from moepack.checkpoint import Checkpoint
from moepack.shipped import shipped_model, shipped_texts
from tests.support.engines import all_logits, greedy, open_engine
from tests.support.plans import mixed_layout, placement

TOKENS = 192
MEAN_ERROR = 0.05


@functools.cache
def by_transformers(dtype: torch.dtype) -> torch.nn.Module:
    # Its grouped kernel does not take float64; the eager one takes everything.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shipped_model(), dtype=torch.bfloat16, experts_implementation="eager"
    )
    converted: torch.nn.Module = model.eval().to(dtype)
    return converted


def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return logits.double()


def test_no_domain_is_further_from_float64_than_transformers() -> None:
    checkpoint = Checkpoint.open(shipped_model())
    tokenizer = Tokenizer.load(shipped_model())
    layout = mixed_layout(checkpoint.spec, (1.0, 0.5, 0.0, 0.3), block_tokens=64)
    place = placement(checkpoint.spec, layout, tops=8, bottoms=2, staging=4, context=256)
    texts = shipped_texts()
    assert len(texts) >= 6
    ours, theirs = [], []
    with open_engine(checkpoint, layout, place) as engine:
        for text in texts:
            ids = tokenizer.encode(text.read_text("utf-8"))[100 : 100 + TOKENS]
            exact = logits_of(by_transformers(torch.float64), ids)
            rounded = logits_of(by_transformers(torch.bfloat16), ids)
            engine.reset()
            # Half as a prompt, and of the rest some tokens one by one.
            found = all_logits(engine, ids[: TOKENS // 2], ids[TOKENS // 2 : TOKENS // 2 + 16])
            rows = len(found)
            ours.append((found.double() - exact[:rows]).abs().mean().item())
            theirs.append((rounded[:rows] - exact[:rows]).abs().mean().item())
            agreed = (found.argmax(-1) == exact[:rows].argmax(-1)).double().mean().item()
            assert agreed > 0.9, text.name
    assert max(ours) < MEAN_ERROR
    assert sum(ours) <= sum(theirs)


def test_every_greedy_token_is_the_best_within_rounding() -> None:
    checkpoint = Checkpoint.open(shipped_model())
    ids = Tokenizer.load(shipped_model()).encode("In the beginning God created the heaven")
    layout = mixed_layout(checkpoint.spec, (1.0, 0.5), block_tokens=64)
    place = placement(checkpoint.spec, layout, tops=8, bottoms=0, staging=4, context=128)
    with open_engine(checkpoint, layout, place) as engine:
        found = greedy(engine, ids, 32)
    exact = by_transformers(torch.float64)
    sequence = list(ids)
    for token in found:
        logits = logits_of(exact, sequence)[-1]
        # Rounding may prefer a near tie; it may not prefer anything else.
        assert logits[token] > logits.max() - 4 * MEAN_ERROR
        sequence.append(token)
