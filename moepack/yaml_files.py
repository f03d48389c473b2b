"""YAML that people edit: read without YAML 1.1's surprises, written so that it reads back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moepack.errors import MoepackError
from moepack.units import format_size

#: A hundred times a routing profile of a large model.
MAX_YAML_BYTES = 64 << 20

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_FLOAT = "tag:yaml.org,2002:float"

# 5e9 and 2e-6 are numbers to everybody but YAML 1.1, which wants a point and a sign.
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_EXPONENT_BEGINS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """Dates stay texts, ``5e9`` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would take for something else."""


_Loader.yaml_implicit_resolvers = {
    begin: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for begin, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, _EXPONENT_BEGINS)
_Dumper.add_implicit_resolver(_FLOAT, _EXPONENT, _EXPONENT_BEGINS)


def read_yaml(
    path: Path,
    *,
    what: str,
    error: type[MoepackError],
    remedy: str,
    limit_bytes: int = MAX_YAML_BYTES,
) -> Any:
    """Parse a YAML file.

    Parameters
    ----------
    what
        How to name the file in a message, for instance ``compute profile compute.yaml``.
    remedy
        What to do when it cannot be read, for instance ``make one with moepack profile``.
    limit_bytes
        A larger file is something else, and is not parsed.

    Raises
    ------
    MoepackError
        ``error``, when the file cannot be read, is too large, or is not YAML.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise error(f"{what}: larger than {format_size(limit_bytes)}, so not one; {remedy}")
        # None of PyYAML's own loaders: this one is a safe one.
        return yaml.load(path.read_text("utf-8"), Loader=_Loader)
    except OSError as failure:
        raise error(f"{what}: {failure.strerror}; {remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        raise error(f"{what}: not YAML ({_reason(failure)}); correct it, or {remedy}") from None


def _reason(failure: Exception) -> str:
    """In one line: where in the file, where that is known, and what."""
    if isinstance(failure, yaml.MarkedYAMLError) and failure.problem_mark is not None:
        return f"line {failure.problem_mark.line + 1}: {failure.problem}"
    return " ".join(str(failure).split())


def to_yaml_text(data: object, *, flow: bool | None = None, unicode: bool = False) -> str:
    """Plain data as YAML: maps and lists of scalars on one line each, unless ``flow`` is told.

    Parameters
    ----------
    unicode
        Keep other characters than ASCII. PyYAML writes some of them (U+0085) so that they read
        back changed: for texts of our own only.
    """
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=flow,
        width=100,
        allow_unicode=unicode,
    )
    return text
