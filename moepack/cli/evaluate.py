"""``moepack eval``: how good the packed model is, and how near to the exact one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moepack.cli.models import find_packed, open_pack, plan_to_run
from moepack.cli.options import JsonOption, PackOption
from moepack.cli.output import emit, note
from moepack.cli.progress import TerminalProgress
from moepack.errors import CheckpointError, TextError
from moepack.shipped import SHIPPED_MODEL, shipped_model, shipped_texts
from moepack.workspace import Workspace

if TYPE_CHECKING:
    from moepack.checkpoint import Checkpoint
    from moepack.evaluating import Evaluation
    from moepack.formats import PackedModel
    from moepack.quality import Estimate, Quality
    from moepack.routing import TextSource
    from moepack.texts import Text
    from moepack.workspace import ModelFolder


def evaluate(
    model: PackOption = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to score, each a domain of its own; may be repeated. Default: the texts "
            "that ship with moepack, but for what routing profiles learn from.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Score at most so many tokens of each text. Default: all.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure quality: perplexity, and divergence from the exact model.

    The checkpoint that was packed runs first, streamed within the budget of the plan; then the
    packed model does. Where the checkpoint is not at hand there is only perplexity.
    """
    from moepack.evaluating import evaluate as score
    from moepack.report.evaluate import evaluation_view
    from moepack.trunk import trunk_name

    workspace = Workspace.locate()
    texts = _read(text or list(shipped_texts()))
    packed = open_pack(workspace, model)
    plan = plan_to_run(workspace, packed, named=model is not None)
    known = find_packed(workspace, packed)
    exact = _find_exact(packed, known)
    if exact.checkpoint is None:
        note(f"there is only perplexity, without the exact model: {exact.told}")
    workspace.create()
    found = score(
        packed,
        plan,
        texts,
        exact=exact.checkpoint,
        sources=_sources(known),
        scratch=workspace.root,
        most_tokens=tokens,
        progress=TerminalProgress(),
    )
    encodings = Counter(
        cut.encoding_of(expert)
        for cut in packed.layout.layers
        for expert in range(packed.spec.moe(cut.layer).num_experts)
    )
    emit(
        {
            "model": plan.model_name,
            "encodings": encodings,
            "trunk": trunk_name(packed.layout.trunk),
            **evaluation_document(found),
        },
        as_json=json,
        view=lambda: evaluation_view(
            found, model=plan.model_name, encodings=encodings, exact=exact.told
        ),
    )


def _read(paths: Sequence[Path]) -> list[Text]:
    """The texts, each under a name of its own: without its ending, where that is enough."""
    from moepack.texts import read_texts

    if not paths:
        raise TextError(
            "this installation of moepack lacks its texts; name files with --text, or install it "
            "again"
        )
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in paths]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise typer.BadParameter(f"{twice[0]} is named twice", param_hint="--text")
    texts = read_texts(paths)
    return [text._replace(name=name) for text, name in zip(texts, names, strict=True)]


class _Exact(NamedTuple):
    """The checkpoint that was packed, and its name; or None, and why it is not at hand."""

    checkpoint: Checkpoint | None
    told: str


def _find_exact(packed: PackedModel, known: ModelFolder | None) -> _Exact:
    """Open what was packed where it was then; nothing is downloaded."""
    from moepack.checkpoint import Checkpoint

    if known is None:
        return _Exact(None, f"the workspace does not know what {packed.folder} was packed from")
    source = known.record.source
    place = str(shipped_model()) if source == SHIPPED_MODEL else source
    try:
        checkpoint = Checkpoint.open(place, headers_only=True, progress=TerminalProgress())
        if checkpoint.folder is None:
            return _Exact(None, f"the weights of {source} are not on this machine")
        digests = checkpoint.spec.digest, checkpoint.weights_digest
    except CheckpointError as failure:
        return _Exact(None, str(failure))
    if digests != (packed.spec.digest, packed.manifest.weights_digest):
        return _Exact(None, f"{source} has changed since it was packed")
    return _Exact(checkpoint, known.record.name)


def _sources(known: ModelFolder | None) -> tuple[TextSource, ...]:
    """What the model's routing profile learnt from, if it has one."""
    from moepack.routing import load_summary

    if known is None or not known.routing_path.exists():
        return ()
    return load_summary(known.routing_path).sources


def evaluation_document(found: Evaluation) -> dict[str, object]:
    """What ``--json`` says of an evaluation; what there is not is absent."""
    from moepack.quality import BLOCK_TOKENS, CONFIDENCE

    return {
        **quality_document(found.quality),
        "confidence": CONFIDENCE,
        "interval_block_tokens": BLOCK_TOKENS,
        "window_tokens": found.window_tokens,
        "stride_tokens": found.stride_tokens,
        **({"decoded": True} if found.decoded else {}),
        "domains": {
            domain.name: {**quality_document(domain.quality), "first_token": domain.first_token}
            for domain in found.domains
        },
    }


def quality_document(quality: Quality) -> dict[str, object]:
    """Figures, with ``NAME_interval`` [low, high] beside those that have one."""
    figures: dict[str, Estimate] = {"perplexity": quality.perplexity}
    if quality.nearness is not None:
        figures |= {
            "exact_perplexity": quality.nearness.exact_perplexity,
            "perplexity_ratio": quality.nearness.perplexity_ratio,
            "kl": quality.nearness.kl,
            "top1_agreement": quality.nearness.top1_agreement,
        }
    document: dict[str, object] = {"tokens": quality.tokens}
    for name, estimate in figures.items():
        document[name] = estimate.value
        if estimate.low is not None:
            document[f"{name}_interval"] = [estimate.low, estimate.high]
    return document
