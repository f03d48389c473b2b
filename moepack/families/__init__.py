"""Families: from a foreign ``config.json`` and safetensors headers to a :class:`ModelSpec`.

Foreign names end here. One module a concern: :mod:`.table` the rows and their defaults,
:mod:`.outlines` how each family's config describes its layers (:mod:`.parts` what they share),
:mod:`.rope` rotary embeddings, :mod:`.tensors` and :mod:`.experts` names and layouts,
:mod:`.config` typed reading. No weights are read, and nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moepack.errors import (
    NotMixtureOfExpertsError,
    TensorMismatchError,
    UnknownArchitectureError,
    UnsupportedEncodingError,
)
from moepack.families.config import Config
from moepack.families.experts import ExpertLayout, TensorSource, find_experts
from moepack.families.outlines import Outline
from moepack.families.table import FAMILIES, Family
from moepack.families.tensors import (
    Header,
    find_trunk_tensor,
    find_unused,
    missing_tensor,
    trunk_shapes,
)
from moepack.model_spec import ModelSpec, TensorInfo

__all__ = [
    "FAMILIES",
    "ExpertLayout",
    "Family",
    "Header",
    "Sources",
    "TensorSource",
    "find_family",
    "read_spec",
    "source_of",
]

#: Dtypes that are read, by their safetensors names.
DTYPES = ("BF16", "F16", "F32")

#: Keys that count routed experts, in any architecture: their absence makes a model dense.
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """Where every canonical tensor of a model lies in its checkpoint.

    Attributes
    ----------
    trunk : mapping
        Canonical name to source name.
    experts : mapping
        Decoder's layer number to the layout of its experts.
    """

    trunk: Mapping[str, str]
    experts: Mapping[int, ExpertLayout]


def find_family(config: Mapping[str, Any], what: str = "config.json") -> Family:
    """The row of a config. ``what`` is how messages name the document.

    Raises
    ------
    NotMixtureOfExpertsError
        When no row fits and the config has no routed experts.
    UnknownArchitectureError
        When no row fits.
    """
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    model_type = config.get("model_type")
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    for family in FAMILIES:
        if architecture is None and model_type == family.name:
            return family
    shown = architecture or model_type or "nothing"
    # Models of several modalities keep what we look for one level down.
    nested = (value for value in config.values() if isinstance(value, Mapping))
    if not any(section.get(key) for section in (config, *nested) for key in _EXPERT_COUNTS):
        raise NotMixtureOfExpertsError(
            f"{what} names {shown}, a model without routed experts; expected a"
            " mixture-of-experts model, because experts are all that moepack moves"
        )
    known = ", ".join(family.architectures[0] for family in FAMILIES)
    raise UnknownArchitectureError(
        f"{what} names {shown}, which no family reads; expected one of {known}"
    )


def read_spec(config: Mapping[str, Any], headers: Mapping[str, Header], name: str) -> ModelSpec:
    """What a model is, from its config and the headers of its shards.

    Parameters
    ----------
    config
        The parsed ``config.json``.
    headers
        Every tensor of the checkpoint under its source name.
    name
        What the user calls the model.

    Raises
    ------
    NotMixtureOfExpertsError
        A dense model.
    UnknownArchitectureError
        No family reads the architecture.
    UnsupportedModelError
        The config asks for something that is not implemented.
    UnsupportedEncodingError
        The weights are of a dtype that is not read.
    MissingTensorError, LeftoverTensorError, TensorMismatchError
        Config and tensors do not belong together.
    DamagedCheckpointError
        The config breaks its own rules.
    """
    what = f"{name}: config.json"
    family = find_family(config, what)
    reader = Config(config, family.defaults, what)
    if any(config.get(key) == 0 for key in _EXPERT_COUNTS):
        raise NotMixtureOfExpertsError(
            f"{what} counts 0 experts; expected a mixture-of-experts model"
        )
    outline = family.outline(reader)
    _check_rope(reader, outline)
    if all(layer.moe is None for layer in outline.layers):
        raise NotMixtureOfExpertsError(
            f"{what} makes every layer dense; expected routed experts in some"
        )
    spec = ModelSpec(
        name=name,
        family=family.name,
        architecture=family.architectures[0],
        dtype="",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        context_length=reader.integer("max_position_embeddings"),
        norm=outline.norm,
        norm_eps=reader.number("rms_norm_eps"),
        tied_embeddings=reader.flag("tie_word_embeddings"),
        rope=outline.rope,
        layers=outline.layers,
        trunk=(),
        head_bias=outline.head_bias,
        bos_token_id=next(iter(reader.integers("bos_token_id")), None),
        eos_token_ids=reader.integers("eos_token_id"),
    )
    reader.refuse_unread()
    return _with_tensors(spec, family, headers)


def stop_ids(generation_config: Mapping[str, Any], what: str) -> tuple[int, ...]:
    """Tokens that end a text, as a ``generation_config.json`` names them.

    Raises
    ------
    DamagedCheckpointError
        When they are not tokens.
    """
    return Config(generation_config, {}, what).integers("eos_token_id")


def source_of(spec: ModelSpec, headers: Mapping[str, Header]) -> Sources:
    """Where every canonical tensor of a model lies.

    Raises
    ------
    MissingTensorError
        When the headers lack one.
    """
    family = next(row for row in FAMILIES if row.name == spec.family)
    names = (name for name, _ in _trunk(spec))
    return Sources(
        trunk={name: find_trunk_tensor(name, headers, spec.name) for name in names},
        experts={
            i: find_experts(
                i,
                spec.moe(i),
                spec.hidden_size,
                headers,
                interleaved=family.interleaved_experts,
                what=spec.name,
            )
            for i in spec.moe_layers
        },
    )


def _check_rope(config: Config, outline: Outline) -> None:
    pairs = outline.layers[0].attention.rotary_dim // 2
    for factors in (outline.rope.short_factor, outline.rope.long_factor):
        if factors is not None and len(factors) != pairs:
            raise config.damaged(f"{len(factors)} factors of longrope", f"{pairs}, one a pair")


def _with_tensors(spec: ModelSpec, family: Family, headers: Mapping[str, Header]) -> ModelSpec:
    """The spec with trunk, dtype and unused tensors, all of them checked."""
    _check_dtypes(spec.name, headers)
    sources = source_of(spec, headers)
    trunk = []
    for canonical, shape in _trunk(spec):
        source = sources.trunk[canonical]
        _check_shape(spec.name, source, headers[source], shape)
        trunk.append(TensorInfo(canonical, headers[source].dtype, shape))
    used = set(sources.trunk.values())
    dtype = ""
    for layout in sources.experts.values():
        for source, shape in layout.tensors():
            header = headers.get(source)
            if header is None:
                raise missing_tensor((source,), spec.name)
            _check_shape(spec.name, source, header, shape)
            dtype = dtype or header.dtype
            if header.dtype != dtype:
                raise UnsupportedEncodingError(
                    f"{spec.name}: tensor {source} is {header.dtype} where other experts are"
                    f" {dtype}; expected experts of one dtype; convert the model to one"
                )
            used.add(source)
    unused = find_unused(
        headers,
        used,
        num_layers=len(spec.layers),
        extra_layers=family.extra_layers,
        tied=spec.tied_embeddings,
        what=spec.name,
    )
    return dataclasses.replace(spec, trunk=tuple(trunk), dtype=dtype, unused=unused)


def _trunk(spec: ModelSpec) -> list[tuple[str, tuple[int, ...]]]:
    return list(
        trunk_shapes(
            spec.layers,
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            norm=spec.norm,
            tied=spec.tied_embeddings,
            head_bias=spec.head_bias,
        )
    )


def _check_dtypes(name: str, headers: Mapping[str, Header]) -> None:
    """Refuse encodings that cannot be read, before names are looked up: theirs differ as well."""
    for source in sorted(headers):
        dtype = headers[source].dtype
        if dtype in DTYPES or source.endswith(".inv_freq"):
            continue
        stored = "MXFP4" if source.endswith(("_blocks", "_scales")) else dtype
        raise UnsupportedEncodingError(
            f"{name}: tensor {source} is stored in {stored}; expected {', '.join(DTYPES)}, or a"
            " quantization_config in its config.json that says how to read it; use a copy of the"
            " model in bfloat16"
        )


def _check_shape(name: str, source: str, header: Header, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise TensorMismatchError(
            f"{name}: tensor {source} has shape {list(header.shape)}; its config.json implies"
            f" {list(shape)}; use the config that belongs to these weights"
        )
