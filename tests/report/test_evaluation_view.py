"""What people are shown of an evaluation."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from moepack.evaluating import Domain, Evaluation
from moepack.quality import Estimate, Nearness, Quality
from moepack.report.evaluate import evaluation_view

PERPLEXITY = Estimate(15.106, 14.12, 16.4)
NEARNESS = Nearness(
    exact_perplexity=Estimate(15.01, 14.0, 16.3),
    perplexity_ratio=Estimate(1.0064, 1.0051, 1.0078),
    kl=Estimate(0.01234, 0.0116, 0.0131),
    top1_agreement=Estimate(0.9532, 0.9497, 0.9561),
)


def shown(nearness: Nearness | None, encodings: dict[str, int], *names: str) -> list[str]:
    domains = tuple(Domain(name, 1, Quality(700, PERPLEXITY, nearness)) for name in names)
    whole = Quality(700 * len(names), Estimate(15.1), nearness)
    view = evaluation_view(
        Evaluation(whole, domains, 1024, 512), model="default", encodings=encodings, exact="words"
    )
    console = Console(file=io.StringIO(), width=160)
    with console.capture() as captured:
        console.print(view)
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_every_text_has_a_row_and_all_have_one_together() -> None:
    lines = shown(NEARNESS, {"INT8": 256}, "c", "python")
    assert lines[0] == "text tokens perplexity 95% exact KL 95% same first 95%"
    figures = "15 0.0123 0.0116 to 0.0131 95.3% 95.0% to 95.6%"
    assert lines[1] == f"c 700 15.1 14.1 to 16.4 {figures}"
    assert lines[3] == f"all 1400 15.1 - {figures}"
    assert "model default, experts in INT8" in lines
    assert "exact words; the perplexity is 1.0064 of its own (1.0051 to 1.0078)" in lines


def test_divergences_of_every_size_can_be_read() -> None:
    for value, text in ((0.0, "0"), (3.1e-9, "3.10e-09"), (0.01, "0.0100"), (2.0, "2.00")):
        near = dataclasses.replace(NEARNESS, kl=Estimate(value))
        assert f"15 {text} - 95.3%" in shown(near, {"INT8": 1}, "c")[1]


def test_one_text_is_not_shown_twice() -> None:
    assert sum("700" in line for line in shown(NEARNESS, {"INT8": 256}, "c")) == 1


def test_without_the_exact_model_it_says_why() -> None:
    lines = shown(None, {"INT8": 96, "INT4_G32": 160}, "c")
    assert lines[0] == "text tokens perplexity 95%"
    assert "model default, 96 experts in INT8, 160 in INT4_G32" in lines
    assert "exact not at hand: words" in lines
    assert not any(line.startswith("KL") for line in lines)
