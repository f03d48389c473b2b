"""The benchmark of dequantising runs, and counts bytes as they are."""

from __future__ import annotations

import json

import pytest

from benchmarks import dequantise


def test_every_contender_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dequantise, "FP8_SHAPE", (256, 384))
    monkeypatch.setattr(dequantise, "MXFP4_SHAPE", (64, 96))
    assert dequantise.main(["--rounds", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    rates = json.loads(last)["codes_bytes_per_s"]
    assert list(rates) == ["FP8", "MXFP4"]
    for found in rates.values():
        assert list(found) == ["moepack", "transformers", "copying"]
        assert all(rate > 0 for rate in found.values())
    assert len(table) == 1 + 6
