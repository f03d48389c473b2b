"""Chat templates: a conversation as the text that the model was trained on.

Templates are programs of a model's publisher, so they run in jinja's immutable sandbox and see
plain data only. Filters and globals are those that the transformers library gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moepack.errors import RunError

Message = Mapping[str, Any]


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the model's own words, for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way of declaring them

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A model's chat template.

    Parameters
    ----------
    text
        The jinja source.
    tokens
        Special tokens that the template may name, such as ``bos_token``.
    name
        Whose template it is, for messages.

    Raises
    ------
    RunError
        When the source is not a template.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], name: str) -> None:
        self._tokens = dict(tokens)
        self._name = name
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as failure:
            raise RunError(f"{name}: its chat template cannot be read: {failure}") from None

    def render(
        self, messages: Sequence[Message], *, generate: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Parameters
        ----------
        messages
            Each with ``role`` and ``content``, as plain data.
        generate
            End with what begins the model's answer.
        variables
            Whatever else the template knows, such as ``enable_thinking``.

        Raises
        ------
        RunError
            When the template refuses the conversation.
        """
        values = {
            **self._tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": generate,
        }
        try:
            return self._template.render(values)
        except jinja2.TemplateError as failure:
            raise RunError(f"{self._name}: its chat template refuses: {failure}") from None


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Source of a model's template: ``chat_template.jinja``, else what the config holds.

    Of several named ones in the config, ``default``; None where there is none.

    Raises
    ------
    RunError
        When the file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            raise RunError(f"{path}: cannot be read: {failure}") from None
    held = config.get("chat_template")
    if isinstance(held, list):
        held = {entry["name"]: entry["template"] for entry in held}.get("default")
    return held if isinstance(held, str) else None
