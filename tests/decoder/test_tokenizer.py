"""Text to tokens as transformers does it, and a stream that never shows half a character."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from moepack_runtime.tokenizer import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moepack.errors import RunError
from tests.support.tiny_models import byte_tokenizer

TEXT = "The quick brown fox — naïve, 東京, 🦊🦊 and\n\n  more  spaces. "


def llama_like() -> tokenizers.Tokenizer:
    """Metaspace words with a fall-back to bytes, which begins every text with <s>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdefghijklmnopqrstuvwxyzThé,.", "▁t", "he", "▁the"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def gpt_like() -> tokenizers.Tokenizer:
    """Bytes, merged where they are frequent, with two special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "the 東京 the 🦊 fox"], trainer)
    return tokenizer


KINDS = {"llama": llama_like, "gpt": gpt_like, "bytes": byte_tokenizer}


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.load(save(tmp_path_factory.mktemp("tokenizer"), KINDS[request.param]()))


def streamed(tokenizer: Tokenizer, ids: list[int], *, special: bool = False) -> list[str]:
    stream = tokenizer.stream(special=special)
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(text=st.text(max_size=60) | st.sampled_from([TEXT, "the the", " the", "🦊🦊🦊"]))
def test_streamed_pieces_of_a_text_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for special in (False, True):
        pieces = streamed(tokenizer, ids, special=special)
        assert "".join(pieces) == tokenizer.decode(ids, special=special)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in streamed(tokenizer, ids))


@given(data=st.data())
@pytest.mark.parametrize("kind", ["gpt", "bytes"])
def test_streamed_pieces_of_any_tokens_are_the_decoded_whole(
    kind: str, data: st.DataObject
) -> None:
    """Bytes that are no text among them."""
    backend = KINDS[kind]()
    tokenizer = Tokenizer(backend, {}, None, "any")
    last = backend.get_vocab_size() - 1
    ids = data.draw(st.lists(st.integers(0, last), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {}, None, "bytes")
    pieces = streamed(tokenizer, tokenizer.encode("a🦊b"))
    assert pieces == ["a", "", "", "", "🦊", "b", ""]


def test_half_a_character_at_the_end_is_shown_at_last() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {}, None, "bytes")
    assert streamed(tokenizer, tokenizer.encode("a🦊")[:-1]) == ["a", "", "", "", "\ufffd"]


CONFIGS: dict[str, dict[str, Any]] = {
    "silent": {"bos_token": "<s>", "eos_token": "</s>"},
    "adds bos": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "adds nothing": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
    "adds both": {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_surrounds_a_text_is_what_transformers_puts_there(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    ours = Tokenizer.load(save(tmp_path, llama_like(), config))
    plain = {
        key: getattr(value, "get", lambda _, v=value: v)("content") for key, value in config.items()
    }
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **plain)
    for text in ("the fox", "<s>the", ""):
        assert ours.encode(text) == theirs(text)["input_ids"]
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False) == bare
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no tokenizer; expected"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(RunError, match="convert it"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "[]", "holds a list, expected an object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    save(tmp_path, byte_tokenizer())
    (tmp_path / file).write_text(content)
    with pytest.raises(RunError, match=message):
        Tokenizer.load(tmp_path)
