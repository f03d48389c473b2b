"""How much each encoding loses on the shipped model: moepack's and the peers', on the same tokens.

    python -m benchmarks.peer_quality --scratch DIR --llama-cpp PATH
    python -m benchmarks.peer_quality --scratch DIR --llama-cpp PATH --trunk int8

The texts that ship with moepack, the parts that ``moepack eval`` scores of them (nothing was fitted
to those), in windows of 1024 tokens. llama-perplexity scores the second half of a window but for
the half's first token, so that is what is scored here on both sides, and windows overlap by what
they do not score: each token is scored once, given the same tokens before it. Both sides are
compared with their own computation in bfloat16: moepack by the code of ``moepack eval``, llama.cpp
by what ``llama-perplexity --kl-divergence-base`` keeps (:mod:`benchmarks.llama_perplexity`); means
and intervals come from the same function. The very tokens go in: the GGUF's vocabulary is one
character a token (:mod:`benchmarks.gguf_export`), and its windows are read back and compared.

moepack's experts are rounded as they are for whoever has run ``moepack profile --bits``: weighed
by the inputs that it has seen, in the parts of the texts that are not scored. It is run here, once
for a scratch folder, in a workspace apart from that of :mod:`benchmarks.peers`, whose measurements
of the machine stay as they are. llama.cpp's kinds are rounded without an importance matrix.

Trunks are as the model has them, or rounded on both sides: moepack's to int8, llama.cpp's to Q8_0.

A kind that llama-quantize cannot store on this model is told as what it stored instead. Nothing
here depends on how busy the machine is. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.gguf_kinds import BF16, KINDS
from benchmarks.gguf_text import text_of
from benchmarks.llama_perplexity import compared, first_scored, keep_probabilities
from benchmarks.llama_runners import find_sibling
from benchmarks.options import at_least
from benchmarks.peer_model import PeerModel
from benchmarks.peer_precision import TRUNKS, Asked, TrunkName, suffix_of
from benchmarks.peer_report import say
from benchmarks.setting import named
from moepack.atomic import write_atomically
from moepack.errors import MoepackError
from moepack.evaluating import score_windows
from moepack.formats import PackedModel
from moepack.held_out import WINDOW_TOKENS, Passage, Window, learnt_tokens
from moepack.plan import load_plan
from moepack.precision import QualityName, precision_of
from moepack.quality import Quality, TokenScores, empty_scores, quality
from moepack.shipped import shipped_model, shipped_texts
from moepack.texts import read_texts
from moepack.window_runs import WindowRun

#: What is scored of moepack, and the peers' kinds that move about as many bytes.
OWN: tuple[QualityName, ...] = ("int8", "int4")
_KINDS = tuple(name for name in KINDS if name != BF16.name)

#: moepack's workspace in the scratch folder.
_HOME = "moepack-quality"

#: Everything resident: where experts lie changes no bit.
_BUDGET_BYTES = 128 << 20


class Found(NamedTuple):
    """One way to store a model.

    Attributes
    ----------
    stored, trunk : str
        What experts and trunk really are in.
    calibrated : bool
        Whether rounding of experts was weighed by what their inputs are like.
    bits_per_weight : float
        Of the experts.
    """

    stored: str
    trunk: str
    calibrated: bool
    bits_per_weight: float
    quality: Quality

    def document(self) -> dict[str, Any]:
        """What JSON says of it."""
        near = self.quality.nearness
        assert near is not None, "the exact model was at hand"
        return {
            "stored": self.stored,
            "trunk": self.trunk,
            "calibrated": self.calibrated,
            "bits_per_weight": self.bits_per_weight,
            "kl": near.kl.value,
            "kl_interval": [near.kl.low, near.kl.high],
            "top1_agreement": near.top1_agreement.value,
            "perplexity": self.quality.perplexity.value,
            "exact_perplexity": near.exact_perplexity.value,
        }


def shared_windows(
    name: str, ids: Sequence[int], learnt: int, window_tokens: int = WINDOW_TOKENS
) -> tuple[Passage, list[Window]]:
    """Whole windows that llama-perplexity scores as ``moepack eval`` is told to.

    Parameters
    ----------
    learnt
        Tokens at the beginning that are not scored.
    """
    skipped = first_scored(window_tokens)
    first = max(learnt, skipped)
    begins = range(first - skipped, len(ids) - window_tokens + 1, window_tokens - skipped)
    found = [Window(tuple(ids[begin : begin + window_tokens]), skipped) for begin in begins]
    end = begins[-1] + window_tokens if begins else first
    return Passage(name, ids[:end], (), first), found


class _Texts(NamedTuple):
    passages: list[Passage]
    runs: list[WindowRun]

    @property
    def scored_tokens(self) -> int:
        return sum(passage.scored_tokens for passage in self.passages)


def _texts(folder: Path, most_windows: int | None) -> _Texts:
    """The shipped texts in windows, those too short left out."""
    tokenizer = Tokenizer.load(folder)
    passages: list[Passage] = []
    runs: list[WindowRun] = []
    for text in read_texts(shipped_texts()):
        ids = tokenizer.encode(text.text, special=False)
        learnt = learnt_tokens(text.content, len(ids), ())
        passage, windows = shared_windows(text.name, ids, learnt)
        windows = windows[:most_windows]
        if windows:
            scored = sum(len(window.tokens) - window.first for window in windows)
            passages.append(passage._replace(ids=passage.ids[: passage.first + scored]))
            runs += [WindowRun(len(passages) - 1, window) for window in windows]
    return _Texts(passages, runs)


def _own(
    model: PeerModel, texts: _Texts, trunk: TrunkName, scratch: Path
) -> Iterator[tuple[str, Found]]:
    for name in OWN:
        asked = Asked(name, trunk)
        say(f"moepack {asked.name}")
        made = model.packed(
            asked, ("--vram", str(_BUDGET_BYTES), "--context", str(WINDOW_TOKENS)), scratch / name
        )
        packed, plan = PackedModel.open(made.pack), load_plan(made.plan)
        scores = score_windows(
            packed, plan, texts.passages, texts.runs, WINDOW_TOKENS, model.checkpoint, scratch
        )
        layout = plan.layout
        stored = "+".join(sorted({cut.encoding for cut in layout.layers}))
        calibrated, bits = bool(layout.calibration), precision_of(model.spec, layout).mean_bits
        own_trunk = layout.trunk or model.spec.dtype
        yield name, Found(stored, own_trunk, calibrated, bits, quality(scores))


def _peers(
    model: PeerModel, texts: _Texts, trunk: TrunkName, llama_cpp: Path | None, scratch: Path
) -> Iterator[tuple[str, Found | str]]:
    """Each kind, or why there is nothing to say of it."""
    import gguf

    from benchmarks.gguf_export import expert_types, trunk_types
    from benchmarks.gguf_tensors import bits_per_weight

    program = find_sibling(llama_cpp, "llama-perplexity")
    if program is None:
        yield from ((kind, "absent: no llama-perplexity") for kind in _KINDS)
        return
    windows = np.array([run.window.tokens for run in texts.runs], np.int32)
    text, exact, other = (scratch / name for name in ("text.txt", "exact.bin", "other.bin"))
    text.write_text(text_of(windows.ravel().tolist()), encoding="utf-8")
    quantiser = find_sibling(llama_cpp, "llama-quantize")
    say("llama.cpp BF16")
    keep_probabilities(program, model.gguf(BF16), text, exact, windows)
    for kind in _KINDS:
        rounded = KINDS[kind].with_trunk(TRUNKS[trunk])
        say(f"llama.cpp {rounded.told}")
        try:
            path = model.gguf(rounded, quantiser=quantiser)
        except MoepackError as failure:
            yield kind, f"absent: {failure}"
            continue
        types = expert_types(path)
        bits = sum(
            weights * bits_per_weight(gguf.GGMLQuantizationType[name])
            for name, weights in types.items()
        )
        keep_probabilities(program, path, text, other, windows)
        scores = _by_text(texts, compared(exact, other))
        stored, in_trunk = ("+".join(sorted(found)) for found in (types, trunk_types(path)))
        yield kind, Found(stored, in_trunk, False, bits / types.total(), quality(scores))


def _by_text(texts: _Texts, windows: Iterator[TokenScores]) -> list[TokenScores]:
    """The windows of each text together, as moepack's scores are."""
    found = [empty_scores(text.scored_tokens, compared=True) for text in texts.passages]
    done = [0] * len(found)
    for run, scores in zip(texts.runs, windows, strict=True):
        found[run.text].put(done[run.text], scores)
        done[run.text] += len(scores.nll)
    return found


def measure(
    scratch: Path, llama_cpp: Path | None, trunk: TrunkName, most_windows: int | None = None
) -> dict[str, Any]:
    """Everything with such a trunk, as JSON says it."""
    model = PeerModel(shipped_model(), scratch, _HOME)
    say("moepack profile --bits, unless it is known")
    model.profile(bits=True, trunk=trunk)
    texts = _texts(model.folder, most_windows)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="quality.") as folder:
        own = dict(_own(model, texts, trunk, Path(folder)))
        peers = dict(_peers(model, texts, trunk, llama_cpp, Path(folder)))
    return {
        "model": model.spec.name,
        "window_tokens": WINDOW_TOKENS,
        "tokens": texts.scored_tokens,
        "trunk": trunk,
        "moepack": {name: found.document() for name, found in own.items()},
        "peers": {
            kind: {"failure": found} if isinstance(found, str) else found.document()
            for kind, found in peers.items()
        },
    }


def table(document: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| | experts in | bits a weight | trunk in | KL, nats | same first choice |"
    yield "| --- " * 6 + "|"
    rows = {f"moepack {name}": found for name, found in document["moepack"].items()}
    rows |= {f"llama.cpp {kind}": found for kind, found in document["peers"].items()}
    for name, found in rows.items():
        if "failure" in found:
            yield f"| {name} | {found['failure']} | | | | |"
            continue
        low, high = found["kl_interval"]
        interval = "" if low is None else f" ({low:.5f} to {high:.5f})"
        yield (
            f"| {name} | {found['stored']} | {found['bits_per_weight']:.2f} | {found['trunk']} "
            f"| {found['kl']:.5f}{interval} | {found['top1_agreement']:.1%} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, and one line of JSON; keep it for benchmarks.peers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help="a folder of its programs")
    parser.add_argument(
        "--trunk", choices=TRUNKS, default="exact", help="int8: rounded on both sides"
    )
    parser.add_argument(
        "--windows", type=at_least(1), metavar="N", help="of each text at the most; default: all"
    )
    return named(_run, parser.parse_args(arguments))


def _run(args: argparse.Namespace) -> int:
    args.scratch.mkdir(parents=True, exist_ok=True)
    document = measure(args.scratch, args.llama_cpp, args.trunk, args.windows)
    text = json.dumps(document, indent=1)
    write_atomically(kept_at(args.scratch, args.trunk), text.encode())
    print("\n".join(table(document)))
    print(json.dumps(document))
    return 0


def kept_at(scratch: Path, trunk: TrunkName) -> Path:
    """Where the figures with such a trunk are kept."""
    return scratch / f"quality{suffix_of(trunk)}.json"


def kept_quality(scratch: Path, trunk: TrunkName) -> dict[str, Any] | None:
    """The figures that were measured in this scratch folder; None where none were, or others."""
    path = kept_at(scratch, trunk)
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    # Those without the key are older than the calibration by which experts are rounded now.
    return document if document.get("trunk") == trunk else None


if __name__ == "__main__":
    sys.exit(main())
