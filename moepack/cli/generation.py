"""What ``run`` and ``bench`` share: opening the engine to plan, and the JSON of a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from moepack import records
from moepack.atomic import require_writable, writing_atomically
from moepack.cli.models import open_pack, plan_to_run
from moepack.cli.options import Link
from moepack.cli.output import note
from moepack.cli.progress import TerminalProgress
from moepack.cli.replanning import ReplanReport
from moepack.drift import Drift, compare, slowness
from moepack.errors import CheckpointError, PackError, PlanMismatchError
from moepack.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from moepack_runtime.chrome_trace import ChromeTrace
    from moepack_runtime.engine import Engine
    from moepack_runtime.stats import RunStats
    from moepack_runtime.tokenizer import Tokenizer

    from moepack.cost import LinkSeconds
    from moepack.formats import PackedModel
    from moepack.model_spec import ModelSpec
    from moepack.plan import Plan
    from moepack.workspace import Workspace
    from moepack.yardstick import Pace


#: What the parts of the bytes over the link are called in JSON.
_LINK_PARTS = {
    "demand_bytes_per_token": "demand",
    "ahead_used_bytes_per_token": "prefetch_used",
    "ahead_wasted_bytes_per_token": "prefetch_wasted",
}


class Session(NamedTuple):
    """A packed model, open and ready to generate."""

    plan: Plan
    engine: Engine
    tokenizer: Tokenizer
    stop_ids: frozenset[int]


def open_session(
    workspace: Workspace, model: str | None, *, check: str, link: Link | None = None
) -> Session:
    """Open the packed model that is meant, under its newest plan. The caller closes the engine.

    Parameters
    ----------
    check
        Value of a ``moepack_runtime.store.CheckMode``.
    link
        The throttled link that the plan must be for; None for whichever it is for.

    Raises
    ------
    WorkspaceError, PackError, PlanError, RunError
        When it has not been packed, or the plan cannot be carried out.
    """
    from moepack_runtime.loading import open_packed
    from moepack_runtime.store import CheckMode
    from moepack_runtime.tokenizer import Tokenizer

    packed = open_pack(workspace, model)
    plan = plan_to_run(workspace, packed, named=model is not None)
    if link is not None and plan.link != tuple(link):
        raise PlanMismatchError(
            "the plan was priced for another link; give moepack plan the same --link first"
        )
    tokenizer = Tokenizer.load(packed.folder)
    stop_ids = _stop_ids(packed, tokenizer)
    if plan.link is not None:
        rate_bytes_per_s, latency_s = plan.link
        note(
            f"the link is throttled to {format_rate(rate_bytes_per_s)} and "
            f"{format_duration(latency_s)}, as planned"
        )
    engine = open_packed(
        packed, plan, check=CheckMode(check), link=plan.link, progress=TerminalProgress()
    )
    try:
        note_what_ram_holds(packed.spec, plan, engine.process_base_bytes)
    except BaseException:
        engine.close()
        raise
    return Session(plan, engine, tokenizer, stop_ids)


def note_what_ram_holds(spec: ModelSpec, plan: Plan, process_base_bytes: int) -> None:
    """Say what comes from the disk, and whether that is more than was planned.

    The process may take more beside the engine than it did when the machine was profiled.
    """
    from moepack_runtime.loading import require_host_memory

    planned = plan.placement.host
    if planned is None:
        return
    tier = require_host_memory(spec, plan.layout, plan.placement, process_base_bytes)
    assert tier is not None, "the plan is for a device"
    held_bytes = sum(tier.held.values())
    if held_bytes == planned.held_bytes and not planned.bounces:
        return
    text = f"RAM holds {held_bytes / plan.prediction.slow_bytes:.0%} of the experts"
    if held_bytes == planned.held_bytes:
        note(f"{text}, the disk the rest, as planned")
    else:
        note(
            f"{text}, {planned.held_bytes / plan.prediction.slow_bytes:.0%} were planned: the "
            f"process itself takes {format_size(process_base_bytes)}"
        )


def _stop_ids(packed: PackedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text, as config, generation config and tokenizer name them.

    Raises
    ------
    PackError
        When the folder's generation config is not one.
    """
    from moepack.families import stop_ids
    from moepack.source_files import GENERATION_FILE, read_file
    from moepack.source_headers import parse_json

    stops = set(packed.spec.eos_token_ids)
    if tokenizer.eos_id is not None:
        stops.add(tokenizer.eos_id)
    path = packed.folder / GENERATION_FILE
    if path.exists():
        try:
            stops.update(stop_ids(parse_json(read_file(path), str(path)), str(path)))
        except CheckpointError as failure:
            raise PackError(f"{failure}, or pack again") from None
    return frozenset(stops)


@contextmanager
def traced(path: Path | None) -> Iterator[ChromeTrace | None]:
    """A timeline for an engine to fill, which is written after the block.

    However the block ends: after an error or an interrupt with what there is by then. Put the
    engine inside: while the trace is written it needs the memory that the engine gives back.

    Parameters
    ----------
    path
        None: there is no timeline.

    Raises
    ------
    OutputError
        Before the block, where the file could not be written.
    """
    if path is None:
        yield None
        return
    require_writable(path)
    from moepack_runtime.chrome_trace import ChromeTrace

    trace = ChromeTrace()
    try:
        yield trace
    finally:
        if len(trace):
            with writing_atomically(path) as out:
                trace.write(out, TerminalProgress())
            note(f"trace written to {path}: {len(trace):,} events, for ui.perfetto.dev")
            if trace.dropped:
                note(f"the trace was full: {trace.dropped:,} later events are not in it")


def drift_of(plan: Plan, stats: RunStats, pace: Pace | None = None) -> dict[str, Drift]:
    """What was predicted beside what was measured.

    The first token is compared only after a prompt as long as the one that was priced.

    Parameters
    ----------
    pace
        How fast the processor was meanwhile, where somebody looked.
    """
    measured = dataclasses.asdict(stats)
    if stats.prompt_tokens != plan.placement.prompt_tokens:
        del measured["ttft_s"]
    return compare(plan.prediction, measured, pace)


def link_of(workspace: Workspace, plan: Plan) -> LinkSeconds | None:
    """Seconds of one transfer over the link of a plan; None where this machine's is not known."""
    from moepack.cost import throttled
    from moepack.hardware import load_hardware

    if not workspace.hardware_path.exists():
        return None
    link: LinkSeconds = load_hardware(workspace.hardware_path).link_seconds
    return link if plan.link is None else throttled(link, *plan.link)


def link_efficiency(workspace: Workspace, plan: Plan, stats: RunStats) -> float | None:
    """Bytes per second while the link had work, over what the link gives at that size.

    None where nothing crossed the link, or this machine's link is not known.
    """
    link = link_of(workspace, plan)
    if link is None or stats.link_bytes_per_s is None or stats.mean_read_bytes is None:
        return None
    size_bytes = round(stats.mean_read_bytes)
    return stats.link_bytes_per_s / (size_bytes / link(size_bytes))


def run_document(
    workspace: Workspace,
    plan: Plan,
    stats: RunStats,
    *,
    tokens: list[int],
    text: str,
    replans: Sequence[ReplanReport] = (),
    pace: Pace | None = None,
) -> dict[str, object]:
    """What ``--json`` says of a generation; what was not measured, or did not happen, is absent."""
    measured = records.to_data(stats) | {"link_efficiency": link_efficiency(workspace, plan, stats)}
    for field, name in _LINK_PARTS.items():
        measured[name] = measured.pop(field)
    slow = slowness(plan.prediction, pace)
    measured["layers"] = [_present(layer) for layer in measured["layers"]] or None
    return {
        "tokens": tokens,
        "text": text,
        **_present(measured),
        "prediction": records.to_data(plan.prediction),
        "drift": {
            metric: _present(dataclasses.asdict(drift))
            for metric, drift in drift_of(plan, stats, pace).items()
        },
        **({} if slow is None else {"slowness": slow._asdict()}),
        **({"replans": [records.to_data(each) for each in replans]} if replans else {}),
    }


def _present(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}
