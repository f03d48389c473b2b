"""What is measured of an expert is what it sees in transformers, and loses there when rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from moepack_runtime.tokenizer import Tokenizer

from moepack import damage_inputs
from moepack.calibration import Calibration
from moepack.checkpoint import Checkpoint
from moepack.damage import DamageProfile, MissTrial
from moepack.damage_probe import Measured, measure_damage
from moepack.encodings import encoding
from moepack.errors import ProfileError, TextError
from moepack.factor_file import FactorFile
from moepack.quantise import dequantise_expert, quantise_expert
from tests.conftest import TinyFolder
from tests.support.scored_by_transformers import load

WORDS = ("red green blue one two three stone water", "kalt warm nah fern gross klein alt neu")


@pytest.fixture(scope="module")
def folder(tiny_folder: TinyFolder) -> Path:
    return tiny_folder("qwen3_moe", "plain")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short ones, without repetition."""
    rng = np.random.default_rng(5)
    paths = []
    for number, words in enumerate(WORDS):
        path = tmp_path_factory.mktemp("texts") / f"{number}.txt"
        path.write_text(" ".join(rng.choice(words.split(), 60)))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def factors() -> Iterator[FactorFile]:
    with FactorFile.temporary() as file:
        yield file


@pytest.fixture(scope="module")
def found(folder: Path, texts: list[Path], factors: FactorFile) -> Measured:
    return measure_damage(Checkpoint.open(folder), device="cpu", texts=texts, factors=factors)


@pytest.fixture(scope="module")
def measured(found: Measured) -> DamageProfile:
    return found.damage


class Weighed(NamedTuple):
    """A checkpoint, and what rounding its experts is weighed by."""

    checkpoint: Checkpoint
    calibration: Calibration


@pytest.fixture(scope="module")
def weighed(folder: Path, found: Measured) -> Weighed:
    return Weighed(Checkpoint.open(folder), found.calibration)


@pytest.fixture(scope="module")
def sequences(folder: Path, texts: list[Path]) -> list[list[int]]:
    """The first 60 % of each text: what is fitted to."""
    tokenizer = Tokenizer.load(folder)
    encoded = [tokenizer.encode(path.read_text()) for path in texts]
    return [list(ids[: round(0.6 * len(ids))]) for ids in encoded]


@contextmanager
def rounded(model: Any, weighed: Weighed, layer: int, experts: range, name: str) -> Iterator[None]:
    """Transformers' model with some experts of a layer rounded."""
    module = model.model.layers[layer].mlp.experts
    before = module.gate_up_proj.clone(), module.down_proj.clone()
    for expert in experts:
        codes = quantise_expert(
            weighed.checkpoint.expert(layer, expert),
            encoding(name),
            "F32",
            "it",
            importance=weighed.calibration.importance(layer, expert),
        )
        weights = dequantise_expert(codes, encoding(name))
        both = np.concatenate([weights["gate.weight"], weights["up.weight"]])
        module.gate_up_proj[expert] = torch.from_numpy(both)
        module.down_proj[expert] = torch.from_numpy(np.ascontiguousarray(weights["down.weight"]))
    yield
    module.gate_up_proj.copy_(before[0])
    module.down_proj.copy_(before[1])


def outputs(model: Any, sequences: list[list[int]], layer: int) -> tuple[torch.Tensor, ...]:
    """The stream behind a layer, and log-probabilities; of all tokens."""
    kept: list[torch.Tensor] = []

    def keep(module: object, args: object, output: Any) -> None:
        kept.append((output if isinstance(output, torch.Tensor) else output[0]).reshape(-1, 64))

    hook = model.model.layers[layer].register_forward_hook(keep)
    logits = [model(torch.tensor([tokens])).logits[0] for tokens in sequences]
    hook.remove()
    return torch.cat(kept).double(), torch.cat(logits).double().log_softmax(-1)


def divergence_of(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(1).mean())


def test_inputs_are_what_experts_get_in_transformers(
    folder: Path, weighed: Weighed, sequences: list[list[int]]
) -> None:
    """Sums over single tokens: squares times the router's weight over the norm, both squared."""
    model: Any = load(folder)
    for number, block in enumerate(model.model.layers):
        seen: list[tuple[torch.Tensor, ...]] = []
        hooks = [
            block.post_attention_layernorm.register_forward_hook(
                lambda _module, given, got, seen=seen: seen.append((given[0][0], got[0]))
            ),
            block.mlp.gate.register_forward_hook(
                lambda _module, _given, got, seen=seen: seen.append(got[1:])
            ),
        ]
        with torch.inference_mode():
            for tokens in sequences:
                model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        experts = block.mlp.experts
        hidden, neurons = (np.zeros((16, size)) for size in (64, 96))
        counts = np.zeros((16, 1))
        for (residual, inputs), (weights, ids) in zip(seen[::2], seen[1::2], strict=True):
            for token, chosen in enumerate(ids.tolist()):
                norm = float(residual[token].double().square().sum())
                for expert, weight in zip(chosen, weights[token].tolist(), strict=True):
                    both = experts.gate_up_proj[expert].double() @ inputs[token].double()
                    gate, up = both.detach().chunk(2)
                    inner = torch.nn.functional.silu(gate) * up
                    counts[expert] += weight**2 / norm
                    hidden[expert] += weight**2 / norm * inputs[token].double().square().numpy()
                    neurons[expert] += weight**2 / norm * inner.square().numpy()
        used = counts[:, 0] > 0
        assert used.sum() > 4
        moments = weighed.calibration.moments(number)
        assert np.allclose(moments.hidden[used], hidden[used] / counts[used], rtol=1e-3)
        assert np.allclose(moments.neurons[used], neurons[used] / counts[used], rtol=1e-3)
        assert (moments.hidden[~used] > 0).all()  # as if by all tokens


def test_damage_names_what_rounding_was_weighed_by(found: Measured) -> None:
    assert found.damage.calibration == found.calibration.digest
    assert found.calibration.layers == tuple(layer.layer for layer in found.damage.layers)


def test_errors_are_those_of_the_layer_with_one_expert_rounded(
    folder: Path, weighed: Weighed, measured: DamageProfile, sequences: list[list[int]]
) -> None:
    model = load(folder)
    assert measured.tokens == sum(map(len, sequences))
    with torch.inference_mode():
        for found in measured.layers:
            exact, _ = outputs(model, sequences, found.layer)
            for expert in range(0, len(found.errors[0]), 7):
                for name, errors in zip(found.encodings, found.errors, strict=True):
                    alone = range(expert, expert + 1)
                    with rounded(model, weighed, found.layer, alone, name):
                        changed, _ = outputs(model, sequences, found.layer)
                    lost = (changed - exact).square().sum(1) / exact.square().sum(1)
                    # An expert that no token uses is taken as used once.
                    if lost.any():
                        assert errors[expert] == pytest.approx(float(lost.mean()), rel=1e-3)
                    else:
                        assert 0 < errors[expert] < 1 / measured.tokens


def test_divergences_are_those_of_the_model_with_one_layer_rounded(
    folder: Path, weighed: Weighed, measured: DamageProfile, sequences: list[list[int]]
) -> None:
    model = load(folder)
    assert measured.divergence_tokens == sum(map(len, sequences))
    with torch.inference_mode():
        for found in measured.layers:
            _, p = outputs(model, sequences, found.layer)
            every = range(len(found.errors[0]))
            for divergence, name in (
                (found.fine_divergence, found.encodings[0]),
                (found.coarse_divergence, found.encodings[-1]),
            ):
                with rounded(model, weighed, found.layer, every, name):
                    _, q = outputs(model, sequences, found.layer)
                assert divergence == pytest.approx(divergence_of(p, q), rel=0.01)


def test_divergences_of_all_layers_are_those_of_the_model_rounded_whole(
    folder: Path, weighed: Weighed, measured: DamageProfile, sequences: list[list[int]]
) -> None:
    model = load(folder)
    with torch.inference_mode():
        _, p = outputs(model, sequences, 0)
        for divergence, which in ((measured.fine_divergence, 0), (measured.coarse_divergence, -1)):
            with ExitStack() as stack:
                for found in measured.layers:
                    every, name = range(len(found.errors[0])), found.encodings[which]
                    stack.enter_context(rounded(model, weighed, found.layer, every, name))
                _, q = outputs(model, sequences, 0)
            assert divergence == pytest.approx(divergence_of(p, q), rel=0.01)


@contextmanager
def missing(model: Any, weighed: Weighed, trial: MissTrial, seen: list[str]) -> Iterator[None]:
    """Transformers' model with every expert missing, replaced or left out token by token."""
    before = [block.mlp.experts.forward for block in model.model.layers]

    def replace(number: int, experts: Any) -> None:
        low = {
            expert: dequantise_expert(
                quantise_expert(
                    weighed.checkpoint.expert(number, expert),
                    encoding("INT4_G32"),
                    "F32",
                    "it",
                    importance=weighed.calibration.importance(number, expert),
                ),
                encoding("INT4_G32"),
            )
            for expert in range(16)
        }

        def forward(inputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            found = torch.zeros_like(inputs)
            for token, x in enumerate(inputs):
                share = 0.0
                chosen = sorted(zip(weights[token].tolist(), ids[token].tolist(), strict=True))
                for weight, expert in reversed(chosen):
                    if share <= trial.exact_up_to:
                        both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
                        seen.append("exact")
                    elif share <= trial.low_up_to:
                        gate, up, last = low[expert].values()
                        both = torch.from_numpy(np.concatenate([gate, up]))
                        down = torch.from_numpy(np.ascontiguousarray(last))
                        seen.append("low")
                    else:
                        both = None
                        seen.append("nothing")
                    if both is not None:
                        gate, up = (both @ x).chunk(2)
                        found[token] += weight * (down @ (torch.nn.functional.silu(gate) * up))
                    share += weight / float(weights[token].sum())
            return found

        experts.forward = forward

    for number, block in enumerate(model.model.layers):
        replace(number, block.mlp.experts)
    yield
    for block, forward in zip(model.model.layers, before, strict=True):
        block.mlp.experts.forward = forward


def test_rules_for_misses_do_what_they_do_in_transformers(
    folder: Path, weighed: Weighed, measured: DamageProfile, sequences: list[list[int]]
) -> None:
    model = load(folder)
    assert measured.misses is not None
    assert measured.misses.encoding == "INT4_G32"
    trials = {(t.exact_up_to, t.low_up_to): t for t in measured.misses.trials}
    assert len(trials) == len(measured.misses.trials)
    with torch.inference_mode():
        _, p = outputs(model, sequences, 0)
        for rule in ((0.0, 1.0), (0.2, 0.9), (0.6, 0.9)):
            seen: list[str] = []
            with missing(model, weighed, trials[rule], seen):
                _, q = outputs(model, sequences, 0)
            assert trials[rule].divergence == pytest.approx(divergence_of(p, q), rel=0.01)
            # Of 4 bytes a weight the low copy has half of one, and 4 for each 32.
            saved = (seen.count("low") * (1 - 0.625 / 4) + seen.count("nothing")) / len(seen)
            assert trials[rule].saved == pytest.approx(saved)


def test_a_sample_of_an_experts_inputs_tells_its_error(
    folder: Path, texts: list[Path], found: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = found.damage
    monkeypatch.setattr(damage_inputs, "SAMPLED", 20)
    with FactorFile.temporary() as other:
        sampled, calibration = measure_damage(
            Checkpoint.open(folder), device="cpu", texts=texts, factors=other
        )
    assert calibration.digest == found.calibration.digest  # of all tokens
    for one, all_of_them in zip(sampled.layers, measured.layers, strict=True):
        assert sum(one.errors[-1]) == pytest.approx(sum(all_of_them.errors[-1]), rel=0.15)
        assert one.coarse_divergence == all_of_them.coarse_divergence


def test_texts_that_say_nothing_are_refused(
    folder: Path, tmp_path: Path, factors: FactorFile
) -> None:
    measure = partial(measure_damage, Checkpoint.open(folder), device="cpu", factors=factors)
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(ProfileError, match="name longer ones with --text"):
        measure(texts=[short])
    with pytest.raises(TextError):
        measure(texts=[tmp_path / "missing.txt"])


def test_second_moments_are_not_from_tokens_that_tell_what_rounding_does() -> None:
    def seen(first: int, tokens: int) -> damage_inputs.Seen:
        rows = torch.arange(first, first + tokens, dtype=torch.float32)
        return damage_inputs.Seen(rows[:, None], rows, rows[:, None].long(), rows[:, None])

    blocks = [seen(0, 10), seen(100, 6), seen(200, 4)]
    left = damage_inputs.unshared(blocks, (4, 0, 2))
    assert left is not None
    expected = torch.tensor([4, 5, 6, 7, 8, 9, *range(100, 106), 202, 203], dtype=torch.float32)
    for column in left:
        torch.testing.assert_close(column.flatten().float(), expected)
    assert damage_inputs.unshared(blocks, (10, 1, 0)) is None, "too little beside it"


def test_second_moments_are_those_of_what_an_expert_gets(found: Measured) -> None:
    """Of one that is used: the diagonal is that of the mean squares, but for the damping."""
    for layer in found.calibration.layers:
        moments = found.calibration.moments(layer)
        for expert in range(16):
            importance = found.calibration.importance(layer, expert)
            for means, second in (
                (moments.hidden[expert], importance.of_hidden),
                (moments.neurons[expert], importance.of_neurons),
            ):
                assert second is not None
                lower = second.coefficients[0] * second.powers[:, None] + np.eye(len(means))
                diagonal = np.diag(lower.T @ (second.weights[:, None] * lower))
                damping = diagonal - means / means.mean()
                assert damping == pytest.approx(np.full(len(means), damping.mean()), abs=0.003)
                assert damping.mean() > 0.01
