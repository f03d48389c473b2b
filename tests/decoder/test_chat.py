"""Conversations are written as transformers writes them, and templates cannot do harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moepack_runtime.tokenizer import Tokenizer
from transformers import PreTrainedTokenizerFast

from moepack.errors import RunError
from tests.support.tiny_models import byte_tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Say “hi” 🦊", "extra": {"a": [1, None]}},
    {"role": "assistant", "content": "hi"},
]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "json": "{{ bos_token }}{{ messages | tojson }}|{{ messages[1].extra | tojson(indent=2) }}",
    "loop": (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}{{ tools is none }}{{ thinking is defined and thinking }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
}


def save(folder: Path, config: dict[str, Any]) -> Tokenizer:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generate", [False, True])
def test_a_conversation_is_written_as_transformers_writes_it(
    tmp_path: Path, name: str, generate: bool
) -> None:
    tokens = {"bos_token": "a", "eos_token": "b"}
    ours = save(tmp_path, {**tokens, "chat_template": TEMPLATES[name]})
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **tokens)
    expected = theirs.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=generate,
        thinking=True,
    )
    assert ours.template is not None
    assert ours.template.render(MESSAGES, generate=generate, thinking=True) == expected
    assert ours.decode(ours.encode_chat(MESSAGES, generate=generate, thinking=True)) == expected


def test_the_file_rules_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = save(tmp_path, {"chat_template": "from the config"})
    assert tokenizer.template is not None
    assert tokenizer.template.render([]) == "from the file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = save(tmp_path, {"chat_template": named})
    assert tokenizer.template is not None
    assert tokenizer.template.render([]) == "plain"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, {})
    assert tokenizer.template is None
    with pytest.raises(RunError, match="has no chat template"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses: no system role"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_a_named_error(
    tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = save(tmp_path, {"chat_template": template})
    with pytest.raises(RunError, match=message):
        tokenizer.encode_chat(MESSAGES)


def test_a_template_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="chat template cannot be read"):
        save(tmp_path, {"chat_template": "{% for %}"})
