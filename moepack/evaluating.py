"""Running a packed model over texts, and the exact one beside it, to see what packing cost.

The two never run at the same time. First the exact checkpoint goes through the same runtime, with
no expert resident, and what its last layer leaves for each scored token is kept in a file. Then the
packed model runs as its plan has it, and for a few tokens at a time both states go through the head
and are compared. They share the head, unless the pack's is rounded. So a model that is larger than
memory is evaluated under the budget of its plan, at the price of reading the whole of it for every
few thousand tokens.

A plan under which missing experts are replaced by low copies, or left out, is run as it generates:
what is scored one token at a time. What is missing then depends on what the caches hold, so the
result is that of this plan, over these texts in this order, and of fetching ahead also of how fast
the link was.

Peak memory of the fast tier: what the plan takes. The exact model gets the same room, and spends
what it does not need for experts in flight on more tokens at a time; the logits that are compared
are as many as fit into the workspace of a step (of one token at least, 28 bytes for each entry of
the vocabulary). Beside that: 32 bytes of RAM for each scored token and some for its ids; while the
exact model's trunk is read, its largest tensor once more; where the pack's trunk is rounded, the
exact head in the fast tier; and on disk 2 bytes (4 of a float32 model) for each scored token and
unit of the hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moepack.budget import staging_bytes
from moepack.comparing import rows_within, score_rows
from moepack.errors import (
    BudgetTooSmallError,
    ContextLengthError,
    PlanMismatchError,
    RunError,
    TextError,
)
from moepack.formats import PackedModel
from moepack.held_out import (
    LEAST_WINDOW_TOKENS,
    WINDOW_TOKENS,
    Passage,
    learnt_tokens,
    passage,
    stride_tokens,
    windows,
)
from moepack.kept_states import KeptStates
from moepack.layout import Layout
from moepack.layouts import uniform_layout
from moepack.plan import Placement, Plan
from moepack.progress import NO_PROGRESS, Progress
from moepack.quality import Quality, TokenScores, empty_scores, quality
from moepack.records import record
from moepack.routing import TextSource
from moepack.streaming import most_experts_of_a_token, streaming_placement
from moepack.texts import Text
from moepack.trunk import is_rounded
from moepack.units import format_size
from moepack.window_runs import WindowRun, decode_windows, run_windows
from moepack.working_memory import hidden_bytes

if TYPE_CHECKING:
    import torch
    from moepack_runtime.tokenizer import Tokenizer

    from moepack.checkpoint import Checkpoint
    from moepack.model_spec import ModelSpec

#: A token that is less likely than e to the minus this is none that a sound model gives.
_MOST_NLL = 700.0


@record
class Domain:
    """One text's quality.

    Attributes
    ----------
    first_token : int
        Which of its tokens is the first that was scored.
    """

    name: str
    first_token: int
    quality: Quality


@record
class Evaluation:
    """What :func:`evaluate` finds: of all texts together, and of each.

    ``decoded``: what was scored was run one token at a time, as the plan replaces missing experts.
    """

    quality: Quality
    domains: tuple[Domain, ...]
    window_tokens: int
    stride_tokens: int
    decoded: bool = False


def evaluate(
    packed: PackedModel,
    plan: Plan,
    texts: Sequence[Text],
    *,
    exact: Checkpoint | None,
    sources: Sequence[TextSource],
    scratch: Path,
    most_tokens: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Evaluation:
    """Score texts, each a domain, with a packed model, and compare it with the exact one.

    Parameters
    ----------
    exact
        The checkpoint that was packed, with its weights; None: there is only perplexity.
    sources
        Of the model's routing profile; see :mod:`moepack.held_out`.
    scratch
        A folder for the states that are kept meanwhile, in a file without a name.
    most_tokens
        That are scored of each text; None: all.

    Raises
    ------
    TextError
        When a text holds nothing to score.
    RunError
        When there is no tokenizer, or it is not the model's; or when a model gives no
        probabilities.
    BudgetTooSmallError
        When the exact model does not fit the plan's budget with one expert in flight.
    PlanMismatchError
        When the checkpoint is not the one that was packed.
    OutputError
        When the states cannot be kept.
    PackError, PlanError, CheckpointError
        When a model cannot be run.
    """
    from moepack_runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(packed.folder)
    passages = [_passage(tokenizer, packed.spec, text, sources, most_tokens) for text in texts]
    prefix_tokens = max(len(text.prefix) for text in passages)
    window_tokens = _window_tokens(packed.spec, plan.placement, prefix_tokens)
    runs = [
        WindowRun(number, window)
        for number, text in enumerate(passages)
        for window in windows(text, window_tokens)
    ]
    scores = score_windows(packed, plan, passages, runs, window_tokens, exact, scratch, progress)
    return Evaluation(
        quality(scores),
        tuple(
            Domain(text.name, text.first, quality([found]))
            for text, found in zip(passages, scores, strict=True)
        ),
        window_tokens,
        stride_tokens(window_tokens, prefix_tokens),
        decoded=plan.placement.on_miss is not None,
    )


def score_windows(
    packed: PackedModel,
    plan: Plan,
    passages: Sequence[Passage],
    runs: Sequence[WindowRun],
    window_tokens: int,
    exact: Checkpoint | None,
    scratch: Path,
    progress: Progress = NO_PROGRESS,
) -> list[TokenScores]:
    """Score the windows of some texts: what :func:`evaluate` does of windows that it has chosen.

    Parameters
    ----------
    runs
        Windows that score every token of each passage that is to be scored once, in order.
    window_tokens
        The longest of them, or more.

    Raises
    ------
    RunError, BudgetTooSmallError, PlanMismatchError, OutputError, PackError, PlanError
        As :func:`evaluate`.
    """
    if exact is None:
        return _run_packed(packed, plan, passages, runs, None, None, progress)
    _require_same_head(packed, exact)
    with KeptStates(scratch, packed.spec) as kept:
        _keep_exact(exact, plan, window_tokens, runs, kept, progress)
        kept.rewind()
        other = exact if packed.layout.trunk else None
        return _run_packed(packed, plan, passages, runs, kept, other, progress)


def _passage(
    tokenizer: Tokenizer,
    spec: ModelSpec,
    text: Text,
    sources: Sequence[TextSource],
    most_tokens: int | None,
) -> Passage:
    """A text in tokens, apart from what the model puts before every text."""
    ids = tokenizer.encode(text.text, special=False)
    if not ids:
        raise TextError(f"text {text.name}: is empty; expected some thousand tokens")
    whole = tokenizer.encode(text.text)
    added = len(whole) - len(ids)
    before = next((n for n in range(added + 1) if whole[n : n + len(ids)] == ids), 0)
    prefix = whole[:before]
    largest = max([*ids, *prefix])
    if largest >= spec.vocab_size:
        raise RunError(
            f"text {text.name}: the tokenizer gives token {largest}, the model has "
            f"{spec.vocab_size}; put the model's own tokenizer.json beside it and pack again"
        )
    learnt = learnt_tokens(text.content, len(whole), sources)
    return passage(text.name, ids, prefix, learnt, most_tokens)


def _window_tokens(spec: ModelSpec, placement: Placement, prefix_tokens: int) -> int:
    window = min(WINDOW_TOKENS, placement.context_tokens, spec.context_length)
    least = prefix_tokens + LEAST_WINDOW_TOKENS
    if window < least:
        raise ContextLengthError(
            f"the planned context of {placement.context_tokens} tokens is too short to predict "
            f"anything from; plan with --context {least} or more"
        )
    return window


def _require_same_head(packed: PackedModel, exact: Checkpoint) -> None:
    """The states of both go through the pack's norm and head, but for what of it is rounded."""
    from moepack_runtime.exact_head import head_prefixes

    spec = packed.spec
    exactly = {info.name for info in spec.trunk if not is_rounded(info, packed.layout.trunk)}
    for entry in packed.trunk:
        if entry.name in exactly and entry.name.startswith(head_prefixes(spec)):
            bits = np.ascontiguousarray(exact.trunk_tensor(entry.name))
            if hashlib.sha256(bits.data).hexdigest() != entry.sha256:
                raise PlanMismatchError(
                    f"{packed.folder}: {entry.name} is not that of {exact.name}; expected the "
                    "checkpoint that was packed: pack it again"
                )


def _keep_exact(
    exact: Checkpoint,
    plan: Plan,
    window_tokens: int,
    runs: Sequence[WindowRun],
    kept: KeptStates,
    progress: Progress,
) -> None:
    """Run the checkpoint and keep what its last layer leaves before each scored token."""
    from moepack_runtime.loading import open_checkpoint

    spec = exact.spec
    layout = uniform_layout(spec, 1.0, plan.layout.prefill_block_tokens)
    place = exact_placement(spec, layout, plan.placement, window_tokens)
    spare_bytes = place.fast_budget_bytes - place.memory.total_bytes
    tokens_at_once = window_tokens + spare_bytes // (hidden_bytes(spec, 2) - hidden_bytes(spec, 1))
    with open_checkpoint(exact, spec, layout, place, progress=progress) as engine:
        run_windows(
            engine,
            runs,
            tokens_at_once,
            "run the exact model (tokens)",
            lambda _text, rows, _targets: kept.write(rows),
            progress,
        )


def exact_placement(
    spec: ModelSpec, layout: Layout, planned: Placement, window_tokens: int
) -> Placement:
    """The exact model in the room that a plan takes: nothing resident, all else as planned.

    Raises
    ------
    BudgetTooSmallError
        When the plan's budget does not hold one of its experts.
    """

    def place(staging_experts: int) -> Placement:
        return streaming_placement(
            spec,
            layout,
            planned.device,
            planned.threads,
            context_tokens=window_tokens,
            staging_experts=staging_experts,
        )

    least_bytes = place(1).memory.total_bytes
    missing_bytes = least_bytes - planned.fast_budget_bytes
    if missing_bytes > 0:
        raise BudgetTooSmallError(
            f"the exact model takes {format_size(least_bytes)} of fast memory with one expert at a "
            f"time, the plan's budget is {format_size(planned.fast_budget_bytes)}: {missing_bytes} "
            f"bytes are missing; plan with --vram {format_size(least_bytes)} or more",
            missing_bytes=missing_bytes,
        )
    # A budget may be larger than the machine; what the plan takes of it is there.
    room_bytes = max(least_bytes, planned.memory.total_bytes)
    more = (room_bytes - least_bytes) // staging_bytes(spec, layout, 1)
    return replace(
        place(min(1 + more, 2 * most_experts_of_a_token(spec))),
        fast_budget_bytes=room_bytes,
        ram_budget_bytes=planned.ram_budget_bytes,
        readers=planned.readers,
    )


def _run_packed(
    packed: PackedModel,
    plan: Plan,
    passages: Sequence[Passage],
    runs: Sequence[WindowRun],
    kept: KeptStates | None,
    other: Checkpoint | None,
    progress: Progress,
) -> list[TokenScores]:
    """Run the packed model, and score each text.

    Parameters
    ----------
    other
        Whose head the states that are kept go through; None: through the pack's.
    """
    import torch
    from moepack_runtime.exact_head import load_head
    from moepack_runtime.loading import open_packed
    from moepack_runtime.memory import refusals_named

    memory = plan.placement.memory
    rows_at_once = rows_within(memory.workspace_bytes, packed.spec.vocab_size)
    # Taken at once: small arrays, one for every few rows of logits, would come to lie between those
    # and keep the allocator from using their memory again.
    found = [empty_scores(text.scored_tokens, compared=kept is not None) for text in passages]
    done = [0] * len(passages)
    with open_packed(packed, plan, progress=progress) as engine:
        with refusals_named(engine.device, memory.total_bytes):
            exact_head = None if other is None else load_head(other, packed.spec, engine.device)

        def take(text: int, rows: torch.Tensor, targets: Sequence[int]) -> None:
            for begin in range(0, len(targets), rows_at_once):
                part = rows[begin : begin + rows_at_once]
                ids = torch.tensor(targets[begin : begin + rows_at_once], device=engine.device)
                exact = None if kept is None else kept.read(len(part), engine.device)
                with refusals_named(engine.device, memory.total_bytes):
                    scores = score_rows(engine.logits, part, ids, exact, exact_head)
                _require_probabilities(scores, passages[text].name)
                found[text].put(done[text], scores)
                done[text] += len(part)

        what = "run the packed model (tokens)"
        if plan.placement.on_miss is not None:
            decode_windows(engine, runs, what, take, progress)
        else:
            run_windows(engine, runs, plan.placement.context_tokens, what, take, progress)
    return found


def _require_probabilities(scores: TokenScores, name: str) -> None:
    for nll, model in ((scores.nll, "packed"), (scores.exact_nll, "exact")):
        if nll is not None and not (nll < _MOST_NLL).all():
            worst = float(nll[~(nll < _MOST_NLL)][0])
            raise RunError(
                f"text {name}: the {model} model gives a token the logarithm {-worst:.4g} of a "
                f"probability, expected {-_MOST_NLL:.0f} to 0; check the pack with moepack verify, "
                "and the checkpoint it was made from"
            )
