"""The real client of the hub against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepack.checkpoint import Checkpoint
from tests.conftest import TinyFolder
from tests.support.hub_server import Hub, serve
from tests.support.quantised_sources import quantised_model
from tests.support.safetensors_files import read_file, write_file

ROOT = Path(__file__).parents[2]
NAME = "tiny/moe"
#: The client writes 10 MiB at a time, so that a download which can be interrupted is larger.
VOCAB_SIZE = 120_000


@pytest.fixture(scope="module")
def big_model(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model of 30 MiB, most of it embedding, with files that nobody needs."""
    source = tiny_folder("mixtral", "window-llama3-tied")
    folder = tmp_path_factory.mktemp("big")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB_SIZE}))
    shutil.copy(source / "tokenizer.json", folder)
    tensors = read_file(source / "model.safetensors")
    embedding = np.random.default_rng(0).standard_normal((VOCAB_SIZE, 64), np.float32)
    write_file(folder / "one.safetensors", {"model.embed_tokens.weight": embedding})
    del tensors["model.embed_tokens.weight"]
    write_file(folder / "two.safetensors", tensors)
    weight_map = dict.fromkeys(tensors, "two.safetensors")
    weight_map["model.embed_tokens.weight"] = "one.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "README.md").write_text("what nobody needs\n" * 100)
    write_file(folder / "consolidated.safetensors", {"other": np.zeros(1000, np.float32)})
    return folder


@pytest.fixture
def hub(big_model: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.repositories[NAME] = big_model
        yield hub


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Ask:
    """Open a hub id in a process with a cache of its own, which lives as long as the test."""

    def ask(
        name: str = NAME,
        mode: str = "weights",
        *,
        interrupt_bytes: int = 0,
        endpoint: str = hub.endpoint,
        offline: bool = False,
    ) -> dict[str, Any]:
        environment = {
            "PATH": os.environ["PATH"],
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        run = subprocess.run(
            [sys.executable, "-m", "tests.checkpoint.hub_client", name, mode, str(interrupt_bytes)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        answer: dict[str, Any] = json.loads(run.stdout)
        return {**answer, "stderr": run.stderr}

    return ask


def needed_bytes(folder: Path) -> int:
    unneeded = {"README.md", "consolidated.safetensors"}
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in unneeded)


def embedding_digest(folder: Path) -> str:
    embedding = Checkpoint.open(folder).trunk_tensor("embed.weight")
    return hashlib.sha256(embedding.tobytes()).hexdigest()


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_headers_alone_transfer_config_index_and_headers(
    hub: Hub, ask: Ask, big_model: Path
) -> None:
    answer = ask(mode="headers")

    assert answer["folder"] is None
    assert answer["spec"] == Checkpoint.open(big_model).spec.digest
    assert (
        hub.sent_bytes["one.safetensors"] <= header_bytes(big_model / "one.safetensors") + 100_000
    )
    assert (
        hub.sent_bytes["two.safetensors"] <= header_bytes(big_model / "two.safetensors") + 100_000
    )
    whole = {"api", "config.json", "model.safetensors.index.json"}
    assert set(hub.sent_bytes) == {*whole, "one.safetensors", "two.safetensors"}
    assert all(wanted.startswith("bytes=0-") for _, wanted in hub.ranges)


def test_a_header_longer_than_the_first_request_takes_a_second(
    hub: Hub, ask: Ask, big_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(big_model, tmp_path / "long")
    raw = (folder / "two.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padded = raw[8 : 8 + length].ljust(150_000)
    data = len(padded).to_bytes(8, "little") + padded + raw[8 + length :]
    (folder / "two.safetensors").write_bytes(data)
    hub.repositories[NAME] = folder

    assert ask(mode="headers")["spec"] == Checkpoint.open(big_model).spec.digest
    assert ("two.safetensors", "bytes=0-150007") in hub.ranges


def test_a_download_fetches_what_is_needed_and_says_how_much_it_is(
    hub: Hub, ask: Ask, big_model: Path
) -> None:
    answer = ask()

    total = needed_bytes(big_model)
    assert answer["progress"] == [total, total, True]
    assert answer["stderr"] == ""
    assert answer["auxiliary"] == ["tokenizer.json"]
    assert hub.sent_bytes["README.md"] == hub.sent_bytes["consolidated.safetensors"] == 0
    assert answer["embedding"] == embedding_digest(big_model)


def test_headers_and_weights_have_one_identity(ask: Ask) -> None:
    headers, weights, again = ask(mode="headers"), ask(), ask(mode="headers")

    assert headers["weights"] == weights["weights"] == again["weights"]
    assert again["folder"] == weights["folder"]  # it is here now


def test_other_weights_have_another_identity(
    hub: Hub, ask: Ask, big_model: Path, tmp_path: Path
) -> None:
    before = ask(mode="headers")["weights"]
    folder = shutil.copytree(big_model, tmp_path / "tuned")
    tensors = read_file(folder / "two.safetensors")
    tensors["model.norm.weight"][0] += 1
    write_file(folder / "two.safetensors", tensors)
    hub.repositories[NAME] = folder

    assert ask(mode="headers")["weights"] != before


def test_a_cached_model_opens_offline(ask: Ask) -> None:
    online = ask()
    offline = ask(offline=True)

    assert "error" not in offline, offline
    for key in ("name", "folder", "spec", "weights", "embedding"):
        assert offline[key] == online[key]
    assert "using the copy in the cache" in offline["stderr"]


def test_a_cached_model_is_not_fetched_again(hub: Hub, ask: Ask) -> None:
    ask()
    hub.forget()
    ask()

    assert set(hub.sent_bytes) == {"api"}


def test_an_interrupted_download_keeps_what_was_complete(
    hub: Hub, ask: Ask, big_model: Path, tmp_path: Path
) -> None:
    interrupted = ask(interrupt_bytes=25 << 20)
    assert interrupted["error"] == "KeyboardInterrupt"
    assert interrupted["progress"][2]
    complete = {path.name for path in tmp_path.glob("hf/hub/*/snapshots/*/*")}
    assert complete
    assert "one.safetensors" not in complete
    hub.forget()

    answer = ask()

    assert not complete & set(hub.sent_bytes)
    assert answer["progress"][0] == answer["progress"][1] < needed_bytes(big_model)
    assert answer["embedding"] == embedding_digest(big_model)


def test_a_broken_connection_is_taken_up_by_range(hub: Hub, ask: Ask, big_model: Path) -> None:
    hub.cut_once["one.safetensors"] = 25 << 20

    answer = ask()

    assert ("one.safetensors", f"bytes={20 << 20}-") in hub.ranges
    assert answer["progress"] == [needed_bytes(big_model), needed_bytes(big_model), True]
    assert answer["embedding"] == embedding_digest(big_model)


def test_no_such_repository(hub: Hub, ask: Ask) -> None:
    answer = ask("tiny/none")

    assert answer["error"] == "ModelNotFoundError"
    assert "tiny/none" in answer["message"]
    assert hub.endpoint in answer["message"]


def test_a_gated_repository_says_what_to_do(hub: Hub, ask: Ask) -> None:
    hub.gated.add(NAME)
    answer = ask()

    assert answer["error"] == "CheckpointError"
    assert f"accept its terms on {hub.endpoint}/{NAME}" in answer["message"]


def test_an_unreachable_hub(ask: Ask) -> None:
    answer = ask(endpoint="http://127.0.0.1:9")

    assert answer["error"] == "HubUnreachableError"
    assert "http://127.0.0.1:9" in answer["message"]


def test_offline_without_a_cached_copy(ask: Ask) -> None:
    answer = ask(offline=True)

    assert answer["error"] == "HubUnreachableError"
    assert "HF_HUB_OFFLINE" in answer["message"]


def test_a_hub_that_ignores_ranges_is_named_before_it_sends_everything(hub: Hub, ask: Ask) -> None:
    hub.ignore_ranges = True
    answer = ask(mode="headers")

    assert answer["error"] == "HubUnreachableError"
    assert "range" in answer["message"]


@pytest.mark.parametrize("mode", ["headers", "weights"])
def test_a_model_that_cannot_be_used_is_refused_before_the_download(
    hub: Hub, ask: Ask, big_model: Path, tmp_path: Path, mode: str
) -> None:
    folder = shutil.copytree(big_model, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    hub.repositories[NAME] = folder

    answer = ask(mode=mode)

    assert answer["error"] == "UnsupportedEncodingError"
    assert "GPTQ" in answer["message"]
    assert hub.sent_bytes["one.safetensors"] < 200_000


@pytest.mark.parametrize("key", ["qwen3_moe-fp8", "gpt_oss-mxfp4"])
def test_a_quantised_model_is_known_from_its_headers(
    hub: Hub, ask: Ask, tmp_path: Path, key: str
) -> None:
    folder = hub.repositories[NAME] = quantised_model(key, tmp_path / key)
    weights_bytes = (folder / "model.safetensors").stat().st_size

    answer = ask(mode="headers")

    checkpoint = Checkpoint.open(folder)
    assert answer["spec"] == checkpoint.spec.digest
    assert answer["source"] == [
        checkpoint.source_size.encoding,
        checkpoint.source_size.size_bytes,
    ]
    assert hub.sent_bytes["model.safetensors"] <= 200_000 < weights_bytes // 2


def test_a_damaged_shard_on_the_hub_is_named(
    hub: Hub, ask: Ask, big_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(big_model, tmp_path / "cut")
    raw = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(raw[:-1])
    hub.repositories[NAME] = folder

    answer = ask(mode="headers")

    assert answer["error"] == "DamagedCheckpointError"
    assert "two.safetensors" in answer["message"]
    assert "truncated" in answer["message"]
