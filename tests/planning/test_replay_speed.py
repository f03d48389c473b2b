"""The benchmark of the replay runs, and a replay is not slow."""

from __future__ import annotations

import json

import pytest

from benchmarks.replay_speed import main


def test_replays_keep_their_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Far below what a quiet machine does, so that only a loop in Python would fail here."""
    main(["--layers", "24", "--experts", "64", "--top-k", "8", "--tokens", "2048", "--rounds", "3"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["events"] == 24 * 2048
    assert len(told["events_per_s"]) == 6
    assert min(told["events_per_s"].values()) > 30_000
