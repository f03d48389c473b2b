"""``moepack inspect``: what a model or a packed folder is, and what it would need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepack import records
from moepack.cli.models import is_pack, open_source
from moepack.cli.options import JsonOption, lengths
from moepack.cli.output import emit
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack.formats import PackedModel
    from moepack.model_spec import ModelSpec


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|DIR",
            help="A model (folder, hub id, 'default') or a packed folder. Without it: the current "
            "model.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a model or a packed folder is, and what it would need."""
    from moepack.report.model import pack_view, spec_view

    if model is not None and is_pack(model):
        from moepack.formats import PackedModel

        packed = PackedModel.open(Path(model))
        emit(pack_document(packed), as_json=json, view=lambda: pack_view(packed))
        return
    source = open_source(Workspace.locate(), model, headers_only=True)
    spec, size = source.spec, source.checkpoint.source_size
    document = spec_document(spec) | {"source": records.to_data(size)}
    emit(document, as_json=json, view=lambda: spec_view(spec, _context(spec), size))


def _context(spec: ModelSpec) -> int:
    """The context for which needs are stated: that of ``moepack plan`` when it is not told."""
    return lengths(spec).context_tokens


def spec_document(spec: ModelSpec) -> dict[str, object]:
    """What ``--json`` says of a model."""
    from moepack.needs import needs
    from moepack.segments import cuts

    need = needs(spec, _context(spec))
    return {
        "kind": "model",
        "name": spec.name,
        "digest": spec.digest,
        "family": spec.family,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "context_length": spec.context_length,
        "total_parameters": spec.total_parameters,
        "active_parameters": spec.active_parameters,
        "trunk_bytes": spec.trunk_bytes,
        "experts_bytes": spec.experts_bytes,
        "layers": [
            {
                "layer": number,
                "experts": moe.num_experts,
                "top_k": moe.top_k,
                "expert_bytes": spec.expert_bytes(number),
                "shared_experts": moe.shared_intermediate_size > 0,
                "cuts": list(cuts(moe, spec.hidden_size, spec.dtype)),
            }
            for number in spec.moe_layers
            for moe in (spec.moe(number),)
        ],
        "dense_layers": len(spec.layers) - len(spec.moe_layers),
        "unused_tensors": list(spec.unused),
        "needs": {
            "context_tokens": _context(spec),
            "kv_bytes": need.kv_bytes,
            "least_bytes": need.least_bytes,
            "resident_bytes": need.resident_bytes,
        },
    }


def pack_document(packed: PackedModel) -> dict[str, object]:
    """What ``--json`` says of a packed folder."""
    from moepack.trunk import trunk_name

    manifest = packed.manifest
    return {
        "kind": "pack",
        "folder": str(packed.folder),
        "layout_digest": manifest.layout_digest,
        "weights_digest": manifest.weights_digest,
        "prefill_block_tokens": packed.layout.prefill_block_tokens,
        "size_bytes": sum(shard.size_bytes for shard in manifest.shards),
        "trunk": trunk_name(packed.layout.trunk),
        "trunk_bytes": sum(tensor.size_bytes for tensor in packed.trunk),
        "shards": len(manifest.shards),
        "segments": len(packed.entries),
        "layers": [
            {
                "layer": cut.layer,
                "split": cut.split,
                "split_ratio": cut.split_ratio,
                "encoding": cut.encoding,
                "experts_by_encoding": cut.class_sizes(packed.spec.moe(cut.layer).num_experts),
            }
            for cut in packed.layout.layers
        ],
        "model": spec_document(packed.spec),
    }
