"""Recorded steps on a device: the processor's results, at every length that is recorded."""

from __future__ import annotations

import pytest
import torch
from moepack_runtime import token_graphs
from moepack_runtime.predict import NextRouter, Predictor
from moepack_runtime.sampling import Sampler, SamplingParams
from typing_extensions import override

from moepack.checkpoint import Checkpoint
from tests.conftest import TinyFolder
from tests.support.engines import all_logits, open_engine
from tests.support.plans import mixed_layout, placement
from tests.support.tiny_models import TINY_MODELS

CONTEXT = 64
PROMPT = [(11 * place * place + 5 * place + 7) % 250 + 3 for place in range(50)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("family", "variant"), [(model.family, model.variant) for model in TINY_MODELS]
)
def test_a_device_gives_what_the_processor_gives_at_every_length(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, family: str, variant: str
) -> None:
    """Two prompts, of which the first leaves its rows, and tokens one at a time behind each."""
    monkeypatch.setattr(token_graphs, "_FEWEST_ROWS", 16)
    checkpoint = Checkpoint.open(tiny_folder(family, variant))
    layout = mixed_layout(checkpoint.spec, (1.0, 0.5))
    found = {}
    for device in ("cpu", "cuda"):
        place = placement(
            checkpoint.spec, layout, tops=2, bottoms=1, staging=2, context=CONTEXT, device=device
        )
        with open_engine(checkpoint, layout, place) as engine:
            logits = []
            for prompt_tokens in (40, 1, 12):
                engine.reset()
                prompt, following = PROMPT[:prompt_tokens], PROMPT[prompt_tokens:]
                logits.append(all_logits(engine, prompt, following).cpu())
            found[device] = torch.cat(logits)
            assert (engine.token_graphs is None) == (device == "cpu")
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=1e-3, rtol=0)


class Asked(Predictor):
    """The next layer's router, asked anew for every token: it does not say it can be recorded."""

    def __init__(self) -> None:
        self.router: NextRouter | None = None
        self.asked = 0

    @override
    def rank(self, target: int, residual: torch.Tensor, depth: int) -> torch.Tensor:
        assert self.router is not None
        self.asked += 1
        return self.router.rank(target, residual, depth)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_recorded_guess_is_the_guess(
    tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(token_graphs, "_FEWEST_ROWS", 16)
    checkpoint = Checkpoint.open(tiny_folder(family, "plain"))
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(
        checkpoint.spec,
        layout,
        tops=2,
        bottoms=0,
        staging=6,
        context=CONTEXT,
        device="cuda",
        prefetch="all",
        depth=3,
    )
    found = []
    for predictor in (None, Asked()):
        with open_engine(checkpoint, layout, place, predictor=predictor) as engine:
            if predictor is not None:
                predictor.router = NextRouter(engine.decoder.layers)
            sampler = Sampler(SamplingParams(temperature=0.0))
            tokens = list(engine.generate(PROMPT[:12], max_new_tokens=20, sampler=sampler))
            stats = engine.stats()
            found.append((tokens, stats.recall, stats.hit_rate))
    assert found[0] == found[1]
    assert found[0][1], "something has been guessed"
    assert predictor is not None
    assert predictor.asked > 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_device_takes_no_more_memory_than_planned(tiny_folder: TinyFolder, family: str) -> None:
    checkpoint = Checkpoint.open(tiny_folder(family, "plain"))
    layout = mixed_layout(checkpoint.spec, (1.0,))
    place = placement(
        checkpoint.spec, layout, tops=2, bottoms=0, staging=2, context=CONTEXT, device="cuda"
    )
    with open_engine(checkpoint, layout, place) as engine:
        all_logits(engine, PROMPT[:40], PROMPT[40:])
        assert 0 < engine.stats().peak_fast_bytes <= place.memory.total_bytes
