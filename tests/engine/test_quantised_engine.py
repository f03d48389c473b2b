"""Engines over quantised experts: the dequantised model's numbers, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from moepack_runtime.checkpoint_store import CheckpointStore
from moepack_runtime.store import PackStore, SegmentStore

from moepack.checkpoint import Checkpoint
from moepack.errors import NonFiniteWeightError, PlanMismatchError
from moepack.layout import Layout
from moepack.model_spec import ModelSpec
from moepack.pack import pack
from moepack.segments import Bits
from tests.conftest import TinyFolder
from tests.support.conditions import any_placement, disturbed
from tests.support.dequantised import Dequantised
from tests.support.engines import all_logits, open_engine
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.tiny_models import build_tiny, byte_tokenizer

PROMPT = [(7 * place * place + 3 * place + 5) % 250 + 3 for place in range(21)]
FOLLOWING = [17, 99, 4, 250]
CONTEXT = 96

#: Experts of 96 neurons: what the groups of 64 do not divide is refused elsewhere.
NAMES = ("INT8", "INT4_G32")

Open = Callable[[str, str, str], Checkpoint]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Open:
    """A tiny model in float32, or in another dtype."""
    made: dict[tuple[str, str, str], Checkpoint] = {}

    def of(family: str, variant: str, dtype: str) -> Checkpoint:
        key = family, variant, dtype
        if key not in made:
            folder = tiny_folder(family, variant)
            if dtype != "F32":
                folder = tmp_path_factory.mktemp("tiny") / "-".join(key)
                kind = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
                build_tiny(family, variant).to(kind).save_pretrained(folder)
                byte_tokenizer().save(str(folder / "tokenizer.json"))
            made[key] = Checkpoint.open(folder)
            assert made[key].spec.dtype == dtype
        return made[key]

    return of


def resident(
    checkpoint: Checkpoint, layout: Layout, store: SegmentStore | None = None
) -> torch.Tensor:
    place = placement(checkpoint.spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    with open_engine(checkpoint, layout, place, store=store) as engine:
        return all_logits(engine, PROMPT, FOLLOWING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("family", "variant"), [("qwen3_moe", "plain"), ("gpt_oss", "plain"), ("deepseek_v3", "plain")]
)
def test_an_engine_computes_the_dequantised_model(
    opened: Open, tmp_path: Path, name: str, family: str, variant: str
) -> None:
    """From a checkpoint, and from packs of several splits; with biases of experts, and without."""
    checkpoint = opened(family, variant, "F32")
    spec = checkpoint.spec
    plain = mixed_layout(spec, (1.0,))
    expected = resident(
        checkpoint, plain, CheckpointStore(Dequantised(checkpoint, name), spec, plain)
    )
    for number, ratios in enumerate([(1.0,), (0.3, 1.0, 0.7, 0.0)]):
        layout = mixed_layout(spec, ratios, encodings=(name,))
        place = placement(spec, layout, tops=2, bottoms=1, staging=2, context=CONTEXT)
        out = tmp_path / f"pack{number}"
        pack(checkpoint, plan_for(spec, layout, place), out)
        found = []
        for store in (None, PackStore.open(out)):
            with open_engine(checkpoint, layout, place, store=store) as engine:
                found.append(all_logits(engine, PROMPT, FOLLOWING))
        assert torch.equal(*found), "a pack holds what is quantised on the fly"
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("family", "variant"), [("qwen3_moe", "plain"), ("gpt_oss", "plain")])
def test_models_in_16_bits_are_as_near_to_it_as_their_dtype_lets_them(
    opened: Open, family: str, variant: str, name: str, dtype: str
) -> None:
    """By the kernels, where the model is in bfloat16; by dequantising, where it is not."""
    checkpoint = opened(family, variant, dtype)
    spec = checkpoint.spec
    plain = mixed_layout(spec, (1.0,))
    found = resident(checkpoint, mixed_layout(spec, (1.0,), encodings=(name,)))
    expected = resident(
        checkpoint, plain, CheckpointStore(Dequantised(checkpoint, name), spec, plain)
    )
    wide = opened(family, variant, "F32")
    usual = resident(checkpoint, plain) - resident(wide, mixed_layout(wide.spec, (1.0,)))
    assert (found - expected).abs().mean() <= 1.5 * usual.abs().mean()


@pytest.mark.parametrize("ratios", [(1.0,), (0.0,), (0.5,), (0.3, 1.0, 0.0)])
@pytest.mark.parametrize("names", [("INT8",), ("INT4_G32",), ("INT4_G32", None, "INT8")])
@pytest.mark.parametrize("model", [("mixtral", "plain", "BF16"), ("gpt_oss", "plain", "BF16")])
def test_the_bits_do_not_depend_on_placement_or_order_of_arrival(
    opened: Open,
    tmp_path: Path,
    model: tuple[str, str, str],
    names: tuple[str | None, ...],
    ratios: tuple[float, ...],
) -> None:
    checkpoint = opened(*model)
    spec = checkpoint.spec
    layout = mixed_layout(spec, ratios, encodings=names)
    everything = placement(spec, layout, tops=99, bottoms=99, staging=1, context=CONTEXT)
    pack(checkpoint, plan_for(spec, layout, everything), tmp_path / "pack")
    expected = resident(checkpoint, layout, PackStore.open(tmp_path / "pack"))
    random = Random(len(ratios))
    alike = ratios == (1.0,) and len(names) == 1
    for trial in range(5):
        place = any_placement(checkpoint, layout, random, pooled=alike and trial % 2 == 0)
        with disturbed(checkpoint, layout, place, tmp_path / "pack", random) as engine:
            assert torch.equal(all_logits(engine, PROMPT, FOLLOWING), expected), (trial, place)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("names", [("INT8",), ("INT4_G32",), ("INT4_G32", None, "INT8")])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_bits_of_a_device_do_not_depend_on_placement(
    opened: Open, dtype: str, names: tuple[str | None, ...]
) -> None:
    checkpoint = opened("gpt_oss", "plain", dtype)
    layout = mixed_layout(checkpoint.spec, (0.3, 1.0, 0.0), encodings=names)
    found = []
    for slots, staging in ((99, 1), (0, 1), (2, 3)):
        place = placement(
            checkpoint.spec,
            layout,
            tops=slots,
            bottoms=slots,
            staging=staging,
            context=CONTEXT,
            device="cuda",
        )
        with open_engine(checkpoint, layout, place) as engine:
            found.append(all_logits(engine, PROMPT, FOLLOWING))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if dtype == "F32":
        torch.testing.assert_close(found[0].cpu(), resident(checkpoint, layout), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_packs_of_different_splits_agree_within_rounding(opened: Open, name: str) -> None:
    checkpoint = opened("mixtral", "plain", "F32")
    found = [
        resident(checkpoint, mixed_layout(checkpoint.spec, (ratio,), encodings=(name,)))
        for ratio in (0.0, 0.35, 0.7, 1.0)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)
    assert torch.equal(found[0], found[-1]), "one segment is one segment, top or bottom"


class Changed:
    """A checkpoint of which some experts hold other weights."""

    def __init__(self, checkpoint: Checkpoint, experts: set[int], value: float) -> None:
        self.checkpoint = checkpoint
        self.experts = experts
        self.value = np.float32(value)

    def expert(self, layer: int, expert: int) -> Mapping[str, Bits]:
        weights = self.checkpoint.expert(layer, expert)
        if expert not in self.experts:
            return weights
        return {
            name: np.full_like(bits.view(np.float32), self.value) for name, bits in weights.items()
        }

    def trunk_tensor(self, name: str) -> Bits:
        return self.checkpoint.trunk_tensor(name)


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_zeros_add_nothing(opened: Open, name: str) -> None:
    checkpoint = opened("mixtral", "plain", "F32")
    spec = checkpoint.spec
    found = []
    for names in ((None,), (name,)):
        layout = mixed_layout(spec, (0.5,), encodings=names)
        place = placement(spec, layout, tops=3, bottoms=0, staging=2, context=CONTEXT)
        store = CheckpointStore(Changed(checkpoint, set(range(8)), 0.0), spec, layout)
        with open_engine(checkpoint, layout, place, store=store) as engine:
            found.append(all_logits(engine, PROMPT, FOLLOWING))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_no_numbers_are_named(opened: Open, name: str) -> None:
    checkpoint = opened("mixtral", "plain", "F32")
    spec = checkpoint.spec
    layout = mixed_layout(spec, (0.5,), encodings=(name,))
    place = placement(spec, layout, tops=8, bottoms=0, staging=2, context=CONTEXT)
    store = CheckpointStore(Changed(checkpoint, {5}, float("nan")), spec, layout)
    with pytest.raises(NonFiniteWeightError, match="expert 5"):
        open_engine(checkpoint, layout, place, store=store)


def test_a_layout_in_another_float_is_refused(opened: Open) -> None:
    checkpoint = opened("mixtral", "plain", "F32")
    layout = mixed_layout(checkpoint.spec, (1.0,), encodings=("BF16",))
    with pytest.raises(PlanMismatchError, match="planned as BF16, the checkpoint holds F32"):
        CheckpointStore(checkpoint, checkpoint.spec, layout)


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_workspace_holds_what_dequantising_takes(opened: Open, name: str) -> None:
    checkpoint = opened("mixtral", "plain", "F32")
    spec: ModelSpec = checkpoint.spec

    def workspace(names: tuple[str | None, ...]) -> int:
        layout = mixed_layout(spec, (0.5,), encodings=names)
        place = placement(spec, layout, tops=1, bottoms=0, staging=1, context=1)
        return place.memory.workspace_bytes

    assert workspace((name, None)) == workspace((name,)) >= workspace((None,))
