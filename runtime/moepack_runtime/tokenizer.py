"""Text to tokens and back, through the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from moepack.errors import RunError
from moepack_runtime.chat import ChatTemplate, Message, read_chat_template

#: What decoding gives for bytes that are not (yet) a character.
_REPLACEMENT = "\ufffd"

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """A model's tokenizer. Made by :meth:`load`.

    Attributes
    ----------
    vocab_size : int
        Tokens, added ones included.
    bos_id, eos_id : int or None
        What ``tokenizer_config.json`` names as begin and end of a text.
    template : ChatTemplate or None
        How the model writes conversations, where it does.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        template_text: str | None,
        name: str,
    ) -> None:
        self._backend = backend
        self._name = name
        tokens = {
            key: _content(config[key]) for key in _SPECIAL_TOKENS if config.get(key) is not None
        }
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._find(tokens.get("bos_token"))
        self.eos_id = self._find(tokens.get("eos_token"))
        # Where the config says what surrounds a text, that replaces what tokenizer.json says.
        self._is_stated = "add_bos_token" in config or "add_eos_token" in config
        self._prefix = _ends(config.get("add_bos_token"), self.bos_id)
        self._suffix = _ends(config.get("add_eos_token"), self.eos_id)
        self.template = None if template_text is None else ChatTemplate(template_text, tokens, name)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``tokenizer.json``, and beside it the config and the chat template if there.

        Raises
        ------
        RunError
            When there is no ``tokenizer.json``, or one of the files cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            if (folder / "tokenizer.model").is_file():
                raise RunError(
                    f"{folder}: has tokenizer.model and no tokenizer.json; convert it with the "
                    "transformers library (AutoTokenizer.from_pretrained, then save_pretrained)"
                )
            raise RunError(
                f"{folder}: has no tokenizer; expected tokenizer.json beside the weights, as the "
                "model's publisher provides it"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as failure:  # noqa: BLE001 - the library raises nothing narrower
            raise RunError(f"{path}: not a tokenizer ({failure}); download it again") from None
        # Settings for batches, which would cut or fill a prompt.
        backend.no_truncation()
        backend.no_padding()
        config = _read_config(folder / "tokenizer_config.json")
        return cls(backend, config, read_chat_template(folder, config), folder.name)

    def _find(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text.

        Parameters
        ----------
        special
            Add what the model puts around a text, such as its begin token. A rendered
            conversation has that already.
        """
        if special and not self._is_stated:
            return self._backend.encode(text, add_special_tokens=True).ids
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._prefix, *ids, *self._suffix] if special else ids

    def encode_chat(
        self, messages: Sequence[Message], *, generate: bool = True, **variables: Any
    ) -> list[int]:
        """Tokens of a conversation. See :meth:`ChatTemplate.render`.

        Raises
        ------
        RunError
            When the model has no template, or it refuses the conversation.
        """
        if self.template is None:
            raise RunError(
                f"{self._name}: the model has no chat template; give it plain text instead"
            )
        text = self.template.render(messages, generate=generate, **variables)
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens, special ones left out unless asked for."""
        return self._backend.decode(list(ids), skip_special_tokens=not special)

    def stream(self, *, special: bool = False) -> TextStream:
        """Decode tokens as they come."""
        return TextStream(self, special=special)


class TextStream:
    """Text of tokens that come one by one, held back while it is part of a character.

    The pieces, joined, are the decoded whole. (One exception: where a tokenizer falls back to
    bytes, bytes that are no UTF-8 also spoil those decoded right before them.) Decoding begins a
    few tokens back, so a token costs the same however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        # Some tokens that were given out, because a token's text depends on the one before
        # (a leading space is dropped at the start of a text), then those held back.
        self._window: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """Add a token: the text that it completes, often its own, sometimes none."""
        self._window.append(token)
        before, text = self._decode()
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        return self._give(before, text)

    def finish(self) -> str:
        """What is held back, though it is no character."""
        return self._give(*self._decode())

    def _decode(self) -> tuple[str, str]:
        given = self._tokenizer.decode(self._window[: self._given], special=self._special)
        return given, self._tokenizer.decode(self._window, special=self._special)

    def _give(self, before: str, text: str) -> str:
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text[len(before) :]


def _content(token: str | Mapping[str, Any]) -> str:
    """A special token's text: older configs hold it with its properties."""
    return token if isinstance(token, str) else str(token["content"])


def _ends(is_added: bool | None, token: int | None) -> tuple[int, ...]:
    return (token,) if is_added and token is not None else ()


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as failure:
        raise RunError(f"{path}: cannot be read: {failure}") from None
    if not isinstance(config, dict):
        raise RunError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config
