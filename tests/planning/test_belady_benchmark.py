"""The benchmark of policies against Belady reads recordings and adds up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.belady import BELADY, ONLINE, SHARES, main
from moepack.trace import LayerShape
from tests.support.caches import random_trace


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Two texts of use and one that is too short; the first repeats itself at its end."""
    layers = [LayerShape(row, 24, 2) for row in range(3)]
    texts = {
        name: random_trace(layers, tokens, np.random.default_rng(tokens)).ids
        for name, tokens in (("one", 400), ("two", 250), ("three", 40))
    }
    path = tmp_path / "trace_drawn.npz"
    np.savez(
        path,
        prompts=np.array(list(texts)),
        clean_prefix=np.array([300, 250, 40]),
        num_experts=24,
        allow_pickle=False,
        **texts,
    )
    return path


def test_a_recording_is_compared_at_every_size(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recordings-only", "--recording", str(recording)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])["trace_drawn"]
    assert told["tokens"] == 550
    assert len(told["half_lives"]) == 3
    assert [row["share"] for row in told["rows"]] == list(SHARES)
    for row in told["rows"]:
        rates, closed = row["hit_rates"], row["closed"]
        assert rates.keys() == {*ONLINE, BELADY}
        assert max(rates.values()) == rates[BELADY]
        for policy in ONLINE[1:]:
            between = rates["lru"] + closed[policy] * (rates[BELADY] - rates["lru"])
            assert between == pytest.approx(rates[policy])
    assert sum(line.startswith("| 1/") for line in lines) == len(SHARES)


def test_what_is_no_recording_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "strange.npz"
    np.savez(path, trace=np.zeros(3))
    assert main(["--recordings-only", "--recording", str(path)]) == 1
    assert "ProfileError: recording" in capsys.readouterr().err
