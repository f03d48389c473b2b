"""The programs that are compared: how each is started, and what a run of it gave."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peer_child import ANNOUNCED, ChildWork
from benchmarks.peer_process import Watched, forget_files, run_watched
from moepack.records import encode
from moepack.units import MIB

#: Left free in the group beside the process and its model. At the edge of a group the kernel reads
#: the program's own pages over and over instead of failing.
SPARE_BYTES = 100 * MIB

#: transformers reads every offloaded layer for every token, so a few of them tell its speed.
SLOW_NEW_TOKENS = 6

_ATTEMPTS = 3


class Generation(NamedTuple):
    """What all of them do.

    Attributes
    ----------
    warm_prompt : tuple of int
        Another prompt, for those that warm up with one; llama.cpp has a warm-up of its own.
    temperature : float
        0 takes the likeliest token.
    """

    prompt: tuple[int, ...]
    warm_prompt: tuple[int, ...]
    new_tokens: int
    temperature: float


class Measured(NamedTuple):
    """One run.

    Attributes
    ----------
    load_s : float
        From the start of the program until the prompt was begun, warm-up included.
    bytes_before : int
        Read from the disk until the first token: loading, warm-up and prompt.
    bytes_per_token : float
        Read from the disk for each further token.
    stats : dict or None
        What the program itself counts, where that is more.
    """

    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_before: int
    bytes_per_token: float
    peak_group_bytes: int | None
    peak_process_bytes: int
    stats: dict[str, Any] | None = None


@dataclass(frozen=True)
class Runner(ABC):
    """One way of running the model.

    Attributes
    ----------
    threads : tuple of int
        Counts to be tried, of which the fastest counts; one that chooses itself has a single one.
    absent : str
        Why it cannot be measured here; empty where it can.
    kind : str
        What its routed experts are stored in (:mod:`benchmarks.gguf_kinds`).
    """

    name: str
    threads: tuple[int, ...]
    absent: str = ""
    kind: str = "BF16"

    @property
    def program(self) -> str:
        """Its name without what makes it this variant: that stands behind a comma."""
        return self.name.partition(",")[0]

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """What it reads its weights from, to be dropped from the page cache before each run."""

    @abstractmethod
    def command(
        self, generation: Generation, threads: int, limit_bytes: int, scratch: Path
    ) -> list[str]:
        """The command line; what it needs to read lies in ``scratch``."""

    @abstractmethod
    def count_tokens(self, piece: str) -> int:
        """How many new tokens a piece of its standard output shows."""

    @abstractmethod
    def measured(self, generation: Generation, watched: Watched) -> Measured | None:
        """What a run that went through says; None where it does not say it."""

    def new_tokens(self, wanted: int) -> int:
        """How many tokens to draw, of those wanted."""
        return wanted

    def folder(self, scratch: Path) -> Path | None:  # noqa: ARG002 for others
        """Where it runs; None: here."""
        return None

    def run(
        self,
        generation: Generation,
        threads: int,
        *,
        limit_bytes: int,
        timeout_s: float,
        scratch: Path,
    ) -> Measured | str:
        """Run once, from a cold page cache. Returns why where it does not go through.

        One that ends well without saying how long it took is run again: llama.cpp now and then
        loses the last lines of what it says.
        """
        generation = generation._replace(new_tokens=self.new_tokens(generation.new_tokens))
        command = self.command(generation, threads, limit_bytes, scratch)
        for _ in range(_ATTEMPTS):
            forget_files(self.files)
            watched = run_watched(
                command,
                limit_bytes=limit_bytes,
                messages=scratch / "messages.txt",
                timeout_s=timeout_s,
                count_tokens=self.count_tokens,
                environment={**os.environ, "OMP_NUM_THREADS": str(threads)},
                folder=self.folder(scratch),
            )
            if watched.failure:
                return watched.failure
            measured = self.measured(generation, watched)
            if measured is not None:
                return measured
        return "it does not say how long it took"


@dataclass(frozen=True)
class MoepackRunner(Runner):
    """moepack, under a plan that was made for this limit; the plan chooses the threads."""

    pack: Path = Path()
    plan: Path = Path()

    @property
    def files(self) -> tuple[Path, ...]:
        """The packed folder."""
        return (self.pack,)

    def command(
        self, generation: Generation, threads: int, limit_bytes: int, scratch: Path
    ) -> list[str]:
        """See :class:`Runner`."""
        del limit_bytes  # the plan was made for it
        work = ChildWork(
            "moepack",
            **generation._asdict(),
            threads=threads,
            model="",
            pack=str(self.pack),
            plan=str(self.plan),
        )
        return _child_command(work, scratch)

    def count_tokens(self, piece: str) -> int:
        """See :class:`Runner`."""
        return piece.count(ANNOUNCED)

    def measured(self, generation: Generation, watched: Watched) -> Measured | None:
        """See :class:`Runner`."""
        return _of_child(generation, watched)


@dataclass(frozen=True)
class TransformersRunner(Runner):
    """transformers, with accelerate's offload to disk of what does not fit.

    Attributes
    ----------
    offload : Path
        What :func:`benchmarks.accelerate_offload.write_offload` has written.
    base_bytes : int
        Of the process without a model.
    """

    model: Path = Path()
    offload: Path = Path()
    base_bytes: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """The offloaded parameters."""
        return (self.offload,)

    def command(
        self, generation: Generation, threads: int, limit_bytes: int, scratch: Path
    ) -> list[str]:
        """See :class:`Runner`."""
        kept_bytes = limit_bytes - SPARE_BYTES - self.base_bytes
        work = ChildWork(
            "transformers",
            **generation._asdict(),
            threads=threads,
            model=str(self.model),
            offload=str(self.offload),
            cpu_bytes=max(0, kept_bytes),
        )
        return _child_command(work, scratch)

    def count_tokens(self, piece: str) -> int:
        """See :class:`Runner`."""
        return piece.count(ANNOUNCED)

    def measured(self, generation: Generation, watched: Watched) -> Measured | None:
        """See :class:`Runner`."""
        return _of_child(generation, watched)

    def new_tokens(self, wanted: int) -> int:
        """See :class:`Runner`."""
        return min(wanted, SLOW_NEW_TOKENS)


def transformers_absent() -> str:
    """Why transformers with accelerate cannot be measured; empty where it can."""
    missing = [name for name in ("transformers", "accelerate") if not _installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _child_command(work: ChildWork, scratch: Path) -> list[str]:
    path = scratch / "work.json"
    path.write_text(encode(work))
    return [sys.executable, "-m", "benchmarks.peer_child", str(path)]


def _of_child(generation: Generation, watched: Watched) -> Measured | None:
    if watched.first is None or watched.last is None:
        return None
    said = json.loads(watched.output.splitlines()[-1])
    decoded = len(said["tokens"]) - 1
    measured = measured_of(generation, watched, said["prefill_s"], said["decode_s"], decoded)
    return measured._replace(stats=said.get("stats"))


def measured_of(
    generation: Generation,
    watched: Watched,
    prefill_s: float,
    decode_s: float,
    decoded: int,
) -> Measured:
    """A run that went through, from what was watched and the seconds that it says it took.

    Parameters
    ----------
    decoded
        Tokens after the first, in ``decode_s``. Not all of them need have been seen: llama.cpp may
        lose some of its output.
    """
    assert watched.first is not None
    assert watched.last is not None
    seen = max(1, watched.tokens - 1)
    return Measured(
        load_s=watched.first.seconds - prefill_s,
        prefill_tokens_per_s=len(generation.prompt) / prefill_s,
        decode_tokens_per_s=decoded / decode_s if decode_s else 0.0,
        bytes_before=watched.first.read_bytes,
        bytes_per_token=(watched.last.read_bytes - watched.first.read_bytes) / seen,
        peak_group_bytes=watched.peak_group_bytes,
        peak_process_bytes=watched.last.peak_process_bytes,
    )
