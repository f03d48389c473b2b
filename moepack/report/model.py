"""A model, and its packed folder."""

from __future__ import annotations

from rich.console import Group, RenderableType

from moepack.budget import stored_bytes
from moepack.formats import PackedModel
from moepack.layout import LayerLayout
from moepack.model_spec import ModelSpec
from moepack.needs import needs
from moepack.pack import PackReport
from moepack.report.tables import by_layer, columns, facts
from moepack.source_formats import SourceSize
from moepack.trunk import trunk_name
from moepack.units import format_duration, format_rate, format_size
from moepack.verify import VerifyReport


def spec_view(spec: ModelSpec, context_tokens: int, source: SourceSize) -> RenderableType:
    """What a model is, and what it would need at a context length."""
    need = needs(spec, context_tokens)
    rows = [
        ("model", f"{spec.name} ({spec.architecture})"),
        (
            "parameters",
            f"{_count(spec.total_parameters)}, of which {_count(spec.active_parameters)} a token",
        ),
        ("weights", f"{format_size(spec.weights_bytes)} in {spec.dtype}{_from(spec, source)}"),
        ("trunk", format_size(spec.trunk_bytes)),
        ("experts", f"{format_size(spec.experts_bytes)}: {_experts(spec)}"),
        ("context", f"{spec.context_length} tokens at most"),
        (
            "fast memory",
            (
                f"{format_size(need.least_bytes)} at the least, "
                f"{format_size(need.resident_bytes)} with every expert resident "
                f"(context {context_tokens}, KV cache {format_size(need.kv_bytes)})"
            ),
        ),
    ]
    if spec.unused:
        rows.append(("not used", f"{len(spec.unused)} known tensors, as {spec.unused[0]}"))
    return facts(rows)


def _from(spec: ModelSpec, source: SourceSize) -> str:
    """What the files hold, where they hold something else."""
    if source.encoding == spec.dtype:
        return ""
    return f", from {format_size(source.size_bytes)} in {source.encoding}"


def _experts(spec: ModelSpec) -> str:
    """``48 layers x 128 of 4.50 MiB, 8 a token``, one phrase for each kind of layer."""
    kinds: dict[tuple[int, int, int], int] = {}
    for layer in spec.moe_layers:
        moe = spec.moe(layer)
        kind = (moe.num_experts, spec.expert_bytes(layer), moe.top_k)
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(
        f"{layers} layers x {experts} of {format_size(size_bytes)}, {top_k} a token"
        for (experts, size_bytes, top_k), layers in kinds.items()
    )


def _count(number: int) -> str:
    """``30.5 B`` parameters."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def pack_view(packed: PackedModel) -> RenderableType:
    """What a packed folder holds."""
    manifest = packed.manifest
    spec = packed.spec
    overview = facts(
        [
            ("packed folder", str(packed.folder)),
            ("architecture", spec.architecture),
            ("layout", manifest.layout_digest[:16]),
            ("on disk", format_size(sum(shard.size_bytes for shard in manifest.shards))),
            ("trunk", _trunk_words(packed)),
            ("segments", f"{len(packed.entries)} in {len(manifest.shards) - 1} shards"),
        ]
    )
    layers = columns(
        ("layer", "experts", "top", "bottom", "split", "encoding"),
        by_layer(
            (
                cut.layer,
                (
                    str(spec.moe(cut.layer).num_experts),
                    format_size(stored_bytes(spec, cut, "top")),
                    format_size(stored_bytes(spec, cut, "bottom")),
                    f"{cut.split_ratio:.2f}",
                    _encodings(spec, cut),
                ),
            )
            for cut in packed.layout.layers
        ),
    )
    return Group(overview, "", layers)


def _trunk_words(packed: PackedModel) -> str:
    size_bytes = sum(tensor.size_bytes for tensor in packed.trunk)
    if not packed.layout.trunk:
        return format_size(size_bytes)
    name = trunk_name(packed.layout.trunk)
    exact_bytes = packed.spec.trunk_bytes
    return f"{format_size(size_bytes)} in {name} ({format_size(exact_bytes)} exact)"


def _encodings(spec: ModelSpec, cut: LayerLayout) -> str:
    """``INT8``, or ``3 INT8, 5 INT4_G32`` of a mixed layer."""
    sizes = cut.class_sizes(spec.moe(cut.layer).num_experts)
    if len(sizes) == 1:
        return cut.encoding
    return ", ".join(f"{count} {name}" for name, count in sizes.items())


def pack_done_view(done: PackReport) -> RenderableType:
    """What packing did."""
    return facts(
        [
            ("packed folder", done.folder),
            ("size", format_size(done.size_bytes)),
            ("written", f"{format_size(done.written_bytes)} in {format_duration(done.duration_s)}"),
            ("reused", format_size(done.linked_bytes + done.resumed_bytes)),
        ]
    )


def verify_view(found: VerifyReport) -> RenderableType:
    """What verifying found."""
    rate = format_rate(found.size_bytes / found.duration_s)
    overview = facts(
        [
            ("packed folder", found.folder),
            ("checked", f"{format_size(found.size_bytes)} at {rate}"),
            ("segments", f"{found.segments}, and {found.trunk_tensors} tensors of the trunk"),
            ("damaged", str(len(found.damages) or "none")),
        ]
    )
    damages = columns(
        ("damaged", "what", "how"),
        ((damage.path, damage.what, damage.reason) for damage in found.damages),
    )
    extra: list[RenderableType] = [f"not part of the pack: {name}" for name in found.extra_files]
    return Group(overview, *(("", damages) if found.damages else ()), *extra)
