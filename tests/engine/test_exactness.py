"""The engine computes what transformers computes, and the same bits wherever things lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from moepack_runtime import products
from moepack_runtime.store import PackStore
from moepack_runtime.transfer import HostileTransfer, ThrottledTransfer

from moepack.checkpoint import Checkpoint
from moepack.pack import pack
from moepack.plan import POLICIES, POOL_POLICIES, DeviceKind, SharedPool
from tests.conftest import TinyFolder
from tests.support.engines import Twin, all_logits, greedy, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.tiny_models import TINY_MODELS, build_tiny

KEYS = [(model.family, model.variant) for model in TINY_MODELS]

#: Longer than every sliding window of the tiny models, and no multiple of the block.
PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(45)]
SHORT = PROMPT[:21]
#: Longer than the block many times over.
LONG = [(13 * place * place + 5 * place + 1) % 250 + 3 for place in range(120)]
FOLLOWING = [17, 99, 4, 250, 31, 8]
NEW_TOKENS = 32
CONTEXT = 96

#: Near the ratios of a mixed pack; each layer takes the next.
MIXED = (0.3, 1.0, 0.5, 0.0)


def reference(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits at each prompt position and the greedy continuation, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        logits = model(ids).logits[0]
        # Its own cached decode; stop tokens are disabled so that both go on.
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(PROMPT) :].tolist()
    return logits, tokens


@pytest.mark.parametrize(("family", "variant"), KEYS)
def test_every_family_agrees_with_transformers(
    tiny_folder: TinyFolder, tmp_path: Path, family: str, variant: str
) -> None:
    """From the plain checkpoint, and from packs of several splits and placements."""
    folder = tiny_folder(family, variant)
    logits, tokens = reference(folder)
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec
    for number, ratios in enumerate([(1.0,), MIXED, MIXED[::-1]]):
        layout = mixed_layout(spec, ratios)
        place = placement(spec, layout, tops=2, bottoms=1, staging=2, context=CONTEXT)
        store = None
        if number:
            out = tmp_path / f"pack{number}"
            pack(checkpoint, plan_for(spec, layout, place), out)
            store = PackStore.open(out)
        with open_engine(checkpoint, layout, place, store=store) as engine:
            found = engine.forward(PROMPT, all_logits=True)
            torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
            engine.reset()
            assert greedy(engine, PROMPT, NEW_TOKENS) == tokens


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]

# Of the trial, as a number.
TWINS: dict[str, Callable[[int], Twin]] = {
    "host": lambda _: lambda transfer: transfer,
    "hostile": lambda seed: partial(HostileTransfer, seed=seed),
    "throttled": lambda _: partial(ThrottledTransfer, rate_bytes_per_s=2e9, latency_s=1e-5),
}


RATIOS = {"whole": (1.0,), "none": (0.0,), "mixed": MIXED}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "variant", "ratios"),
    # Other variants differ in their trunk: they need not be cut in every way.
    [
        pytest.param(*key, ratios, id=f"{name}-{'-'.join(key)}")
        for name, ratios in RATIOS.items()
        for key in KEYS
        if key[0] in {"qwen3_moe", "gpt_oss", "deepseek_v3"}
        and (key[1] == "plain" or name == "mixed")
    ],
)
def test_the_bits_do_not_depend_on_placement_or_order_of_arrival(
    tiny_folder: TinyFolder,
    family: str,
    variant: str,
    ratios: tuple[float, ...],
    device: DeviceKind,
) -> None:
    checkpoint = Checkpoint.open(tiny_folder(family, variant))
    spec = checkpoint.spec
    layout = mixed_layout(spec, ratios)
    place_on = partial(placement, spec, layout, context=CONTEXT, device=device)
    everything = place_on(tops=99, bottoms=99, staging=1)
    with open_engine(checkpoint, layout, everything) as engine:
        filled = engine.link.reads
        resident = all_logits(engine, SHORT, FOLLOWING)
        assert engine.link.reads == filled, "everything was there before"
    places = [
        place_on(tops=0, bottoms=0, staging=1),
        place_on(tops=1, bottoms=0, staging=2, policy="lfu"),
        place_on(tops=3, bottoms=2, staging=5, policy="lcp"),
        place_on(tops=5, bottoms=5, staging=3, coldest_first=True),
    ]
    for name, twin in TWINS.items():
        for trial, place in enumerate(places):
            with open_engine(checkpoint, layout, place, twin=twin(trial)) as engine:
                found = all_logits(engine, SHORT, FOLLOWING)
                assert torch.equal(found, resident), (name, place.layers[0])
                # A second sequence meets warm caches.
                engine.reset()
                again = all_logits(engine, SHORT, FOLLOWING)
                assert torch.equal(again, resident), (name, "again", place.layers[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "pool"])
def test_the_bits_of_a_long_prompt_do_not_depend_on_the_policy(
    tiny_folder: TinyFolder, shared: bool, twin: str, device: DeviceKind
) -> None:
    """With fewer slots than a token has experts, and with more; in each layer, and in one pool."""
    checkpoint = Checkpoint.open(tiny_folder("qwen3_moe", "plain"))
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,) if shared else MIXED)
    place_on = partial(placement, spec, layout, context=len(LONG) + 64, device=device)
    with open_engine(checkpoint, layout, place_on(tops=99, bottoms=99, staging=1)) as engine:
        resident = all_logits(engine, LONG, FOLLOWING * 4)
    places = [
        place_on(tops=0, bottoms=0, staging=2, pool=SharedPool(slots, policy))
        if shared
        else place_on(tops=slots, bottoms=slots // 2, staging=2, policy=policy)
        for policy in (POOL_POLICIES if shared else POLICIES)
        for slots in ((1, 11) if shared else (1, 4))
    ]
    for trial, place in enumerate(places):
        with open_engine(checkpoint, layout, place, twin=TWINS[twin](trial)) as engine:
            found = all_logits(engine, LONG, FOLLOWING * 4)
            assert torch.equal(found, resident), (place.layers[0], place.pool)


def test_the_bits_do_not_depend_on_the_placement_where_experts_are_dear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products take rows in other numbers, of which one has a kernel of its own."""
    monkeypatch.setattr("moepack_runtime.products._DEAR_WEIGHTS", 1)
    rows = set()

    def chosen(tokens: int) -> int:
        rows.add(products.dear_rows(tokens))
        return products.dear_rows(tokens)

    monkeypatch.setattr("moepack_runtime.ffn.dear_rows", chosen)
    build_tiny("olmoe", "plain").bfloat16().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    spec = checkpoint.spec
    layout = mixed_layout(spec, (1.0,))
    place_on = partial(placement, spec, layout, context=CONTEXT)
    with open_engine(checkpoint, layout, place_on(tops=99, bottoms=0, staging=1)) as engine:
        resident = all_logits(engine, PROMPT, FOLLOWING)
    assert {1, 2, 4, 8} <= rows
    for trial in range(2):
        place = place_on(tops=trial, bottoms=0, staging=2)
        with open_engine(checkpoint, layout, place, twin=TWINS["hostile"](trial)) as engine:
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), resident)


def test_packs_of_different_splits_agree_within_rounding(tiny_folder: TinyFolder) -> None:
    checkpoint = Checkpoint.open(tiny_folder(*KEYS[0]))
    spec = checkpoint.spec
    found = []
    for ratio in (0.0, 0.2, 0.5, 0.8, 1.0):
        layout = mixed_layout(spec, (ratio,))
        place = placement(spec, layout, tops=2, bottoms=0, staging=2, context=CONTEXT)
        with open_engine(checkpoint, layout, place) as engine:
            found.append(all_logits(engine, PROMPT, FOLLOWING))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)
    assert torch.equal(found[0], found[-1]), "one segment is one segment, top or bottom"
