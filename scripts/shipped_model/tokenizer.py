"""The tokenizer: a byte-level BPE trained on equal shares of every domain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shipped_model.corpus import load_part

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SAMPLE_BYTES_PER_DOMAIN = 1_500_000


def _sample(folder: Path, domain: str) -> Iterator[str]:
    """Yield documents spread evenly over a domain, up to the sample's size."""
    documents = load_part(folder, domain, "train")
    stride = max(1, sum(len(d.text) for d in documents) // SAMPLE_BYTES_PER_DOMAIN)
    for document in documents[::stride]:
        yield document.text


def train(folder: Path, names: list[str], vocab_size: int) -> Tokenizer:
    """Train the tokenizer and write ``tokenizer/`` as the transformers library reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for name in names for text in _sample(folder, name))
    tokenizer.train_from_iterator(texts, trainer)
    out = folder / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """Read back the trained tokenizer."""
    return Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))


def encode_part(
    tokenizer: Tokenizer, folder: Path, domain: str, part: str
) -> npt.NDArray[np.uint16]:
    """Return the token ids of one part of a domain, an end-of-text after every document."""
    texts = [document.text for document in load_part(folder, domain, part)]
    encodings = tokenizer.encode_batch(texts)
    pieces = [np.array([*encoding.ids, END_OF_TEXT_ID], np.uint16) for encoding in encodings]
    return np.concatenate(pieces)


def encode_all(tokenizer: Tokenizer, folder: Path, names: list[str]) -> None:
    """Write ``tokens/<domain>.<part>.npy`` for every domain and part."""
    out = folder / "tokens"
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for part in ("train", "dev", "test"):
            ids = encode_part(tokenizer, folder, name, part)
            np.save(out / f"{name}.{part}.npy", ids)
            print(f"{name}.{part}: {len(ids)} tokens", flush=True)


def load_tokens(folder: Path, domain: str, part: str) -> npt.NDArray[np.uint16]:
    """Read back the token ids of one part of a domain."""
    ids: npt.NDArray[np.uint16] = np.load(folder / "tokens" / f"{domain}.{part}.npy")
    return ids
