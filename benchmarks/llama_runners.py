"""llama.cpp and ik_llama.cpp among the programs that are compared."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.gguf_kinds import BF16, Kind
from benchmarks.gguf_text import text_of, tokens_of
from benchmarks.peer_process import Watched
from benchmarks.peer_runners import Generation, Measured, Runner, measured_of


@dataclass(frozen=True)
class LlamaRunner(Runner):
    """llama.cpp or ik_llama.cpp: its program that goes on from a prompt.

    Attributes
    ----------
    gguf : Path
        The file, or the block device over it.
    extra : tuple of str
        Options that make it this variant.
    """

    binary: Path = Path()
    gguf: Path = Path()
    extra: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The GGUF."""
        return (self.gguf,)

    def command(
        self, generation: Generation, threads: int, limit_bytes: int, scratch: Path
    ) -> list[str]:
        """See :class:`Runner`."""
        del limit_bytes  # it asks for no limit
        prompt = scratch / "prompt.txt"
        prompt.write_text(text_of(generation.prompt), encoding="utf-8")
        count = str(threads)
        context = len(generation.prompt) + generation.new_tokens + 64
        sampling = ["--temp", str(generation.temperature), "--samplers", "temperature"]
        return [
            *(str(self.binary.resolve()), "-m", str(self.gguf.resolve())),
            *("-f", str(prompt.resolve())),
            *("-n", str(generation.new_tokens), "-c", str(context), "-t", count, "-tb", count),
            *("--seed", "0", "--ignore-eos", "--no-display-prompt", "--simple-io"),
            *sampling,
            *self.extra,
        ]

    def folder(self, scratch: Path) -> Path:
        """See :class:`Runner`: some write a log where they are."""
        return scratch

    def count_tokens(self, piece: str) -> int:
        """See :class:`Runner`."""
        return len(tokens_of(piece))

    def measured(self, generation: Generation, watched: Watched) -> Measured | None:
        """See :class:`Runner`."""
        times = parse_timings(watched.messages + watched.output)
        if times is None or watched.first is None:
            return None
        return measured_of(generation, watched, times.prefill_s, times.decode_s, times.decoded)


class Timings(NamedTuple):
    """What llama.cpp says of a run."""

    prompt_tokens: int
    prefill_s: float
    decoded: int
    decode_s: float


_TIMING = re.compile(
    r"(?P<prompt>prompt )?eval time\s*=\s*(?P<ms>[\d.]+) ms\s*/\s*(?P<count>\d+) (?:tokens|runs)"
)


def parse_timings(messages: str) -> Timings | None:
    """The timings that llama.cpp and ik_llama.cpp print at their end; None where there are none."""
    prompt: tuple[int, float] | None = None
    decode: tuple[int, float] | None = None
    for found in _TIMING.finditer(messages):
        each = int(found["count"]), float(found["ms"]) / 1e3
        if found["prompt"]:
            prompt = each
        else:
            decode = each
    return None if prompt is None or decode is None else Timings(*prompt, *decode)


def find_binary(path: Path | None, names: Sequence[str]) -> Path | None:
    """A program: itself, or in the folder that was named, or in its ``bin`` or ``build/bin``."""
    if path is None or path.is_file():
        return path
    for folder in (path, path / "bin", path / "build" / "bin"):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def find_sibling(path: Path | None, name: str) -> Path | None:
    """Another program of the folder that was named, or in which the named program is."""
    folder = path.parent if path is not None and path.is_file() else path
    return find_binary(folder, (name,))


def of_kind(name: str, kind: Kind) -> str:
    """What a program is called with a file of a kind."""
    return name if kind == BF16 else f"{name} {kind.told}"


def llama_runners(
    name: str,
    binary: Path | None,
    gguf: Path | str,
    device: Path | str,
    threads: tuple[int, ...],
    kind: Kind = BF16,
) -> list[Runner]:
    """The variants of llama.cpp, or of what came from it, that this binary can run.

    Parameters
    ----------
    gguf
        The file, or why there is none.
    device
        A block device over the GGUF that reads little ahead, or why there is none.
    kind
        Of the file.
    """
    name = of_kind(name, kind)
    if binary is None:
        absent = "no binary was given, or it is not there"
        return [LlamaRunner(name, threads, absent, kind.name)]
    if isinstance(gguf, str):
        return [LlamaRunner(name, threads, gguf, kind.name)]
    known = subprocess.run([str(binary), "--help"], capture_output=True, text=True, check=False)
    plain = LlamaRunner(name, threads, "", kind.name, binary, gguf)
    return list(_variants(plain, known.stdout + known.stderr, device))


def _variants(plain: LlamaRunner, options: str, device: Path | str) -> Iterator[Runner]:
    """One program and one file in all ways that are worth trying.

    Parameters
    ----------
    options
        What the program says of its own.
    """
    common = ("-no-cnv",) if "-no-cnv" in options else ()
    as_stored = ("--no-repack",) if "--no-repack" in options else ()
    mapped = replace(plain, extra=(*common, *as_stored))

    def variant(what: str, *extra: str, of: LlamaRunner = mapped, absent: str = "") -> Runner:
        name = f"{plain.name}, {what}"
        return replace(of, name=name, absent=absent, extra=(*of.extra, *extra))

    yield variant("mmap, as it is")
    near = replace(mapped, gguf=device) if isinstance(device, Path) else None
    if near is None:
        yield variant("mmap, 128 KiB ahead", absent=str(device))
    else:
        yield variant("mmap, 128 KiB ahead", of=near)
    if "--load-mode" in options and "dio" in options:
        yield variant("direct I/O", "--load-mode", "dio")
    elif "--direct-io" in options:
        yield variant("direct I/O", "--direct-io", "--no-mmap")
    else:
        yield variant("direct I/O", absent="this version has none")
    if plain.kind != BF16.name:  # of which there is nothing to repack
        if as_stored:
            yield variant("repacked", of=replace(plain, extra=common))
        elif "--run-time-repack" in options:
            yield variant("repacked", "--run-time-repack")
    if "--prefetch-experts" in options:
        yield variant("--prefetch-experts", "--prefetch-experts")
        if near is not None:
            yield variant("--prefetch-experts, 128 KiB ahead", "--prefetch-experts", of=near)
