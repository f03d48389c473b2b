"""What eval finds is what transformers finds, for exact packs and for lossy ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from moepack_runtime.tokenizer import Tokenizer
from safetensors.torch import load_file, save_file

from moepack import evaluating
from moepack.checkpoint import Checkpoint
from moepack.errors import BudgetTooSmallError, PlanMismatchError, RunError, TextError
from moepack.evaluating import Evaluation, evaluate, exact_placement
from moepack.formats import PackedModel
from moepack.layout import Layout
from moepack.layouts import uniform_layout
from moepack.pack import pack
from moepack.plan import OnMiss, Placement, Plan
from moepack.progress import NO_PROGRESS, Progress, Unit
from moepack.quality import TokenScores
from moepack.texts import Text
from tests.conftest import TinyFolder
from tests.support.packs import plan_for
from tests.support.plans import mixed_layout, placement
from tests.support.scored_by_transformers import Figures, Span, figures, load

CONTEXT = 64

#: Bytes are tokens: a text of 150 of them in windows of 64, and one that fits into a window.
LONG = bytes((7 * place * place + 3 * place) % 94 + 33 for place in range(150))
LONG_SPANS = [Span(0, 1, 64), Span(32, 64, 96), Span(64, 96, 128), Span(86, 128, 150)]
SHORT = b"a text of few words"
SHORT_SPANS = [Span(0, 1, len(SHORT))]

TEXTS = [Text(name, raw, raw.decode()) for name, raw in (("long", LONG), ("short", SHORT))]


def token_ids(folder: Path, raw: bytes) -> list[int]:
    return Tokenizer.load(folder).encode(raw.decode(), special=False)


def perturbed(folder: Path, to: Path, *, size: float, which: str = "experts") -> Path:
    """A copy of a checkpoint with noise on some of its weights."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    torch.manual_seed(3)
    for name in tensors:
        if which in name:
            tensors[name] += size * tensors[name].std() * torch.randn(tensors[name].shape)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def packed_as(
    checkpoint: Checkpoint, layout: Layout, place: Placement, folder: Path
) -> tuple[PackedModel, Plan]:
    plan = plan_for(checkpoint.spec, layout, place)
    pack(checkpoint, plan, folder)
    return PackedModel.open(folder), plan


def small_placement(checkpoint: Checkpoint, layout: Layout, context: int = CONTEXT) -> Placement:
    """Some experts resident, and as many in flight as the exact model needs of room."""
    return placement(checkpoint.spec, layout, tops=2, bottoms=1, staging=6, context=context)


def compare(
    exact: Path,
    found: Path,
    tmp_path: Path,
    *,
    ratios: tuple[float, ...] = (1.0,),
    context: int = CONTEXT,
    progress: Progress = NO_PROGRESS,
) -> Evaluation:
    """Pack ``found``, and evaluate it against ``exact``."""
    checkpoint = Checkpoint.open(found)
    layout = mixed_layout(checkpoint.spec, ratios, block_tokens=24)
    place = small_placement(checkpoint, layout, context)
    packed, plan = packed_as(checkpoint, layout, place, tmp_path / "pack")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    try:
        return evaluate(
            packed,
            plan,
            TEXTS,
            exact=Checkpoint.open(exact),
            sources=(),
            scratch=scratch,
            progress=progress,
        )
    finally:
        assert list(scratch.iterdir()) == []


def assert_same(evaluation: Evaluation, expected: Figures, rel: float = 2e-4) -> None:
    quality = evaluation.quality
    assert quality.nearness is not None
    assert quality.tokens == expected.tokens
    assert quality.perplexity.value == pytest.approx(expected.perplexity, rel=rel)
    near = quality.nearness
    assert near.exact_perplexity.value == pytest.approx(expected.exact_perplexity, rel=rel)
    assert near.kl.value == pytest.approx(expected.kl, rel=5e-3)
    # One near tie of 166 tokens may fall to the other side.
    assert near.top1_agreement.value == pytest.approx(expected.top1_agreement, abs=1.1 / 166)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("qwen3_moe", "plain"),
        ("mixtral", "window-llama3-tied"),
        ("deepseek_v2", "grouped"),
        ("gpt_oss", "plain"),
        ("phimoe", "window"),
    ],
)
def test_a_lossy_model_is_as_far_from_the_exact_one_as_transformers_says(
    family: str, variant: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    exact = tiny_folder(family, variant)
    lossy = perturbed(exact, tmp_path / "lossy", size=0.2)
    found = compare(exact, lossy, tmp_path, ratios=(1.0, 0.5, 0.0))
    long, short = (token_ids(exact, raw) for raw in (LONG, SHORT))
    texts = [(long, LONG_SPANS), (short, SHORT_SPANS)]
    models = load(lossy), load(exact)
    expected = figures(*models, texts)
    assert expected.kl > 1e-3
    assert expected.top1_agreement < 1
    assert_same(found, expected)
    for domain, text in zip(found.domains, texts, strict=True):
        alone = figures(*models, [text])
        assert domain.first_token == 1
        assert domain.quality.tokens == alone.tokens
        assert domain.quality.perplexity.value == pytest.approx(alone.perplexity, rel=2e-4)
        assert domain.quality.nearness is not None
        assert domain.quality.nearness.kl.value == pytest.approx(alone.kl, rel=5e-3)


def test_windows_on_both_sides_of_a_switch_of_angles(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """LongRoPE of the tiny PhiMoE changes at 64 tokens: ``short`` stays below, others do not."""
    exact = tiny_folder("phimoe", "longrope")
    lossy = perturbed(exact, tmp_path / "lossy", size=0.2)
    found = compare(exact, lossy, tmp_path, context=100)
    long, short = (token_ids(exact, raw) for raw in (LONG, SHORT))
    spans = [Span(0, 1, 100), Span(50, 100, 150)]
    assert_same(found, figures(load(lossy), load(exact), [(long, spans), (short, SHORT_SPANS)]))


def test_what_the_tokenizer_puts_before_a_text_stands_before_every_window(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    exact = tmp_path / "exact"
    shutil.copytree(tiny_folder("qwen3_moe", "plain"), exact)
    (exact / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "!", "eos_token": "?", "add_bos_token": True, "add_eos_token": True}
        )
    )
    (begin,) = token_ids(exact, b"!")
    lossy = perturbed(exact, tmp_path / "lossy", size=0.2)
    found = compare(exact, lossy, tmp_path)
    long, short = (token_ids(exact, raw) for raw in (LONG, SHORT))
    # 63 of a text in a window, 31 apart; the first token is predicted as well.
    spans = [Span(0, 0, 63), Span(31, 63, 94), Span(62, 94, 125), Span(87, 125, 150)]
    texts = [(long, spans), (short, [Span(0, 0, len(SHORT))])]
    assert_same(found, figures(load(lossy), load(exact), texts, prefix=[begin]))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_an_exact_pack_has_no_divergence_at_all(
    ratio: float, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    found = compare(folder, folder, tmp_path, ratios=(ratio,)).quality
    assert found.nearness is not None
    assert found.nearness.kl.value == 0.0
    assert found.nearness.top1_agreement.value == 1.0
    assert found.nearness.perplexity_ratio.value == 1.0
    assert found.perplexity == found.nearness.exact_perplexity


def test_a_split_costs_rounding_and_no_more(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    found = compare(folder, folder, tmp_path, ratios=(0.5,)).quality
    assert found.nearness is not None
    assert 0 < found.nearness.kl.value < 1e-9
    assert found.nearness.perplexity_ratio.value == pytest.approx(1.0, abs=1e-5)


def test_how_many_windows_go_at_once_changes_no_bit(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "WINDOW_TOKENS", CONTEXT)
    folder = tiny_folder("qwen3_moe", "plain")
    lossy = perturbed(folder, tmp_path / "lossy", size=0.2)
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    assert compare(folder, lossy, one) == compare(folder, lossy, several, context=4 * CONTEXT)


def exact_pack(folder: Path, tmp_path: Path) -> tuple[Checkpoint, PackedModel, Plan]:
    checkpoint = Checkpoint.open(folder)
    layout = uniform_layout(checkpoint.spec, 1.0, 24)
    place = small_placement(checkpoint, layout)
    return checkpoint, *packed_as(checkpoint, layout, place, tmp_path / "pack")


def test_without_the_checkpoint_there_is_perplexity(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    _, packed, plan = exact_pack(folder, tmp_path)
    found = evaluate(packed, plan, TEXTS, exact=None, sources=(), scratch=tmp_path)
    assert found.quality.nearness is None
    long, short = (token_ids(folder, raw) for raw in (LONG, SHORT))
    model = load(folder)
    expected = figures(model, model, [(long, LONG_SPANS), (short, SHORT_SPANS)])
    assert found.quality.perplexity.value == pytest.approx(expected.perplexity, rel=2e-4)


def test_at_most_so_many_tokens_of_each_text(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    _, packed, plan = exact_pack(tiny_folder("qwen3_moe", "plain"), tmp_path)
    found = evaluate(packed, plan, TEXTS, exact=None, sources=(), scratch=tmp_path, most_tokens=30)
    assert [domain.quality.tokens for domain in found.domains] == [30, len(SHORT) - 1]


def test_a_checkpoint_with_another_head_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    _, packed, plan = exact_pack(folder, tmp_path)
    other = Checkpoint.open(perturbed(folder, tmp_path / "other", size=0.1, which="lm_head"))
    with pytest.raises(PlanMismatchError, match=r"head\.weight is not that of"):
        evaluate(packed, plan, TEXTS, exact=other, sources=(), scratch=tmp_path)


def test_the_exact_model_stays_within_the_budget_of_the_plan(tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec
    layout = uniform_layout(spec, 1.0)
    in_flight = []
    for tops in (0, 2, 16):
        planned = placement(spec, layout, tops=tops, bottoms=0, staging=1, context=64)
        place = exact_placement(spec, layout, planned, 64)
        assert place.memory.total_bytes <= place.fast_budget_bytes == planned.memory.total_bytes
        in_flight.append(place.staging_experts)
    # Of the slots of three layers; no more than twice what a token uses.
    assert in_flight == [1, 1 + 3 * 2, 2 * 4]


def test_a_budget_without_room_for_one_exact_expert_is_refused(tiny_folder: TinyFolder) -> None:
    spec = Checkpoint.open(tiny_folder("qwen3_moe", "plain")).spec
    layout = uniform_layout(spec, 1.0)
    planned = placement(spec, layout, tops=0, bottoms=0, staging=1, context=64)
    planned = dataclasses.replace(planned, fast_budget_bytes=planned.memory.total_bytes - 1)
    with pytest.raises(BudgetTooSmallError, match="plan with --vram") as raised:
        exact_placement(spec, layout, planned, 64)
    assert raised.value.missing_bytes == 1


def test_a_model_that_gives_no_probabilities_is_named(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed, plan = exact_pack(tiny_folder("qwen3_moe", "plain"), tmp_path)

    def no_number(*_arguments: object) -> TokenScores:
        return TokenScores(torch.tensor([1.0, float("nan")], dtype=torch.float64).numpy())

    monkeypatch.setattr(evaluating, "score_rows", no_number)
    with pytest.raises(RunError, match="text long: the packed model gives a token"):
        evaluate(packed, plan, TEXTS, exact=None, sources=(), scratch=tmp_path)


def test_a_tokenizer_of_another_model_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    _, packed, plan = exact_pack(tiny_folder("qwen3_moe", "plain"), tmp_path)
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "few": 900}, unk_token="a"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (packed.folder / "tokenizer.json").unlink()
    other.save(str(packed.folder / "tokenizer.json"))
    with pytest.raises(RunError, match="gives token 900, the model has 256"):
        evaluate(packed, plan, TEXTS, exact=None, sources=(), scratch=tmp_path)


def test_an_empty_text_is_named(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    _, packed, plan = exact_pack(tiny_folder("qwen3_moe", "plain"), tmp_path)
    with pytest.raises(TextError, match="text none: is empty"):
        evaluate(packed, plan, [Text("none", b"", "")], exact=None, sources=(), scratch=tmp_path)


class Counted:
    """Progress that is written down; an action may be taken on the way."""

    def __init__(self, action: Callable[[str, int], None] | None = None) -> None:
        self.works: list[tuple[str, int | None, int]] = []
        self._action = action

    def start(self, what: str, total: int | None, unit: Unit = "bytes") -> None:  # noqa: ARG002
        self.works.append((what, total, 0))

    def advance(self, amount: int) -> None:
        what, total, done = self.works[-1]
        self.works[-1] = (what, total, done + amount)
        if self._action is not None:
            self._action(what, done + amount)

    def done(self) -> None:
        pass


def test_progress_counts_the_tokens_that_both_models_run(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder = tiny_folder("qwen3_moe", "plain")
    progress = Counted()
    compare(folder, folder, tmp_path, progress=progress)
    tokens = 4 * 64 + len(SHORT)
    runs = [work for work in progress.works if work[0].startswith("run")]
    assert runs == [
        ("run the exact model (tokens)", tokens, tokens),
        ("run the packed model (tokens)", tokens, tokens),
    ]


@pytest.mark.parametrize("phase", ["exact", "packed"])
def test_an_interrupt_leaves_no_thread_and_no_file(
    phase: str, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    def interrupt(what: str, done: int) -> None:
        if phase in what and done > 30:
            raise KeyboardInterrupt

    folder = tiny_folder("qwen3_moe", "plain")
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        compare(folder, folder, tmp_path, progress=Counted(interrupt))
    assert threading.active_count() == before


def test_plans_that_replace_missing_experts_are_scored_as_they_decode(
    tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    """Where nothing is replaced that is what a prompt gives; what is left out costs."""
    folder = tiny_folder("qwen3_moe", "plain")
    checkpoint = Checkpoint.open(folder)
    layout = dataclasses.replace(uniform_layout(checkpoint.spec, 1.0, 16), low="INT8")
    place = small_placement(checkpoint, layout)
    packed, plan = packed_as(checkpoint, layout, place, tmp_path / "pack")
    found = {}
    for name, rule in {
        "none": None,
        "exact": OnMiss(1.0, 1.0),
        "low": OnMiss(0.0, 1.0),
        "left out": OnMiss(0.0, 0.0),
    }.items():
        replaced = dataclasses.replace(plan, placement=dataclasses.replace(place, on_miss=rule))
        found[name] = evaluate(
            packed, replaced, TEXTS, exact=checkpoint, sources=(), scratch=tmp_path
        )
        assert found[name].decoded == (rule is not None)
    for domain, other in zip(found["none"].domains, found["exact"].domains, strict=True):
        assert domain.quality.tokens == other.quality.tokens
        expected = pytest.approx(domain.quality.perplexity.value, rel=1e-4)
        assert other.quality.perplexity.value == expected
    kl = {}
    for name, each in found.items():
        assert each.quality.nearness is not None
        kl[name] = each.quality.nearness.kl.value
    assert kl["exact"] < 1e-6
    assert 1e-6 < kl["low"] < kl["left out"] / 5
