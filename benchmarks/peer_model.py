"""One model for all programs: moepack's plan and pack for a limit, and the GGUF.

moepack is used as anybody would use it, by its commands, in a workspace of its own in the scratch
folder. What it has measured and packed there is kept for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accelerate_offload import INDEX_FILE
from benchmarks.gguf_kinds import BF16, Kind
from benchmarks.peer_precision import Asked, TrunkName
from benchmarks.peer_report import Bar
from benchmarks.peer_runners import SPARE_BYTES
from moepack.budget import stored_bytes
from moepack.calibration import CALIBRATION_FILE
from moepack.checkpoint import Checkpoint
from moepack.compute import load_compute
from moepack.errors import MoepackError
from moepack.factor_file import FACTORS_FILE
from moepack.hardware import load_hardware
from moepack.layout import LayerLayout
from moepack.layouts import uniform_layout
from moepack.plan import load_plan
from moepack.precision import encoding_of
from moepack.trunk import stored_trunk
from moepack.workspace import ModelFolder, Workspace

#: The process takes more than was measured of a bare one: modules that only a run needs.
SLACK_BYTES = 32 << 20

#: In a plan's replay, what no engine could be: everything there, or the future known.
_BOUNDS = frozenset({"resident", "belady"})


class NotPreparedError(MoepackError):
    """A step before the measurement failed."""


class Packed(NamedTuple):
    """A plan, what ``moepack plan`` says of it, and the folder that was packed for it."""

    pack: Path
    plan: Path
    document: dict[str, Any]


class Prepared(NamedTuple):
    """moepack, ready for one limit."""

    packed: Packed
    threads: int
    bar: Bar


class PeerModel:
    """A checkpoint, profiled; plans, packs and the GGUF are made when they are asked for.

    Parameters
    ----------
    model
        Its folder.
    home
        moepack's workspace, a folder in ``scratch``.
    """

    def __init__(self, model: Path, scratch: Path, home: str = "moepack") -> None:
        self.checkpoint = Checkpoint.open(model)
        self.spec = self.checkpoint.spec
        self.folder = model
        self._scratch = scratch
        self._workspace = Workspace(scratch / home)

    @property
    def size_bytes(self) -> int:
        """Of all weights."""
        return self.spec.experts_bytes + self.spec.trunk_bytes

    @property
    def process_base_bytes(self) -> int:
        """Of a process that has loaded torch and nothing else, as profiled."""
        return load_hardware(self._workspace.hardware_path).process_base_bytes

    def profile(
        self, texts: Sequence[Path] = (), *, bits: bool = False, trunk: TrunkName = "exact"
    ) -> None:
        """Measure the machine and the model, unless that has been done in this scratch folder.

        Parameters
        ----------
        texts
            What the routing is recorded on; none: the texts that ship with moepack.
        bits
            Also what rounding is weighed by: plans then are calibrated, as they are by default
            for whoever has measured it.
        trunk
            What plans will be asked for: a profile of before there were such trunks is renewed.

        Raises
        ------
        NotPreparedError
            With what moepack said.
        """
        if not self._is_profiled(bits, trunk):
            named = [argument for text in texts for argument in ("--text", str(text))]
            self._moepack("profile", str(self.folder), *named, *(("--bits",) if bits else ()))

    def _is_profiled(self, bits: bool, trunk: TrunkName) -> bool:
        known = self._known()
        if known is None or not known.routing_path.exists():
            return False
        files = (CALIBRATION_FILE, FACTORS_FILE)
        if bits and not all((known.folder / name).exists() for name in files):
            return False
        return trunk == "exact" or load_compute(known.compute_path).rounded_head_s is not None

    def encoding(self, asked: Asked) -> str:
        """What the routed experts are stored in."""
        return encoding_of(self.spec, asked.quality)

    def stored_bytes(self, asked: Asked) -> int:
        """Of all weights, stored as asked."""
        trunk = sum(tensor.size_bytes for tensor in stored_trunk(self.spec, asked.stored_trunk))
        if asked.quality == "exact":
            return self.spec.experts_bytes + trunk
        experts = sum(
            self.spec.moe(cut.layer).num_experts * stored_bytes(self.spec, cut, "top")
            for cut in self._whole(asked)
        )
        return experts + trunk

    def prepare(
        self, limit_bytes: int, asked: Asked, *, prompt_tokens: int, new_tokens: int
    ) -> Prepared:
        """Plan for a control group of this size, and pack.

        Raises
        ------
        NotPreparedError
            With what moepack said: the limit may be too small.
        """
        ram_bytes = limit_bytes - SPARE_BYTES
        vram_bytes = ram_bytes - self.process_base_bytes - SLACK_BYTES
        if vram_bytes <= 0:
            raise NotPreparedError(
                f"a limit of {limit_bytes} bytes leaves nothing for the model beside a process of "
                f"{self.process_base_bytes}"
            )
        lengths = ("--prompt", str(prompt_tokens), "--new", str(new_tokens))
        context = ("--context", str(prompt_tokens + new_tokens))
        budgets = ("--vram", str(vram_bytes), "--ram", str(ram_bytes))
        name = f"{asked.name}-{limit_bytes}-{prompt_tokens}-{new_tokens}"
        packed = self.packed(asked, (*budgets, *lengths, *context), self._scratch / "plans" / name)
        threads = load_plan(packed.plan).placement.threads
        return Prepared(packed, threads, self._bar(packed.document, asked))

    def packed(self, asked: Asked, options: Sequence[str], folder: Path) -> Packed:
        """What ``moepack plan`` and ``moepack pack`` make of such options.

        Plans are kept in ``folder`` and packs by their layout, so that a measurement need not wait
        for what an earlier one has made. A plan older than the profiles is made again.

        Raises
        ------
        NotPreparedError
            With what moepack said.
        """
        plan, told = folder / "plan.json", folder / "told.json"
        if not told.exists() or told.stat().st_mtime < self._profiled_s():
            said = self._moepack("plan", str(self.folder), *asked.options, *options, "--json")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._known_folder().plan_path, plan)
            told.write_text(said)
        layout = load_plan(plan).layout
        name = f"{self.checkpoint.weights_digest[:16]}-{layout.digest[:16]}"
        pack = self._scratch / "packs" / name
        if not pack.exists():
            pack.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan, self._known_folder().plan_path)
            self._moepack("pack", str(self.folder), "--out", str(pack))
        return Packed(pack, plan, json.loads(told.read_text()))

    def offload(self) -> Path:
        """The parameters as transformers takes them from disk, made where they are not there.

        Raises
        ------
        NotPreparedError
            With what transformers said.
        """
        folder = self._scratch / "offload" / self.checkpoint.weights_digest[:16]
        if not (folder / INDEX_FILE).exists():
            _python("benchmarks.accelerate_offload", str(self.folder), str(folder))
        return folder

    def gguf(
        self, kind: Kind, given: Sequence[Path] = (), *, quantiser: Path | None = None
    ) -> Path:
        """The GGUF of these weights: one that was given, or one made in the scratch folder.

        Parameters
        ----------
        given
            Files of any kind.
        quantiser
            llama-quantize, for the kinds that it alone can round to.

        Raises
        ------
        CheckpointError, GroupMismatchError, QuantiserError
            When the given one is another's, or none can be written.
        """
        from benchmarks.gguf_export import expert_types, require_ours, trunk_types, write

        for path in given:
            types = expert_types(path), trunk_types(path)
            if tuple(map(set, types)) == ({kind.name}, {kind.trunk}):
                require_ours(path, self.checkpoint)
                return path
        path = self._gguf_path(kind)
        if not path.exists():
            source = self._gguf_path(BF16)
            kept = source if source.exists() else None
            write(self.checkpoint, path, kind, quantiser=quantiser, source=kept)
        require_ours(path, self.checkpoint)
        return path

    def _gguf_path(self, kind: Kind) -> Path:
        suffix = "" if kind == BF16 else f"-{kind.name}"
        if kind.trunk != BF16.trunk:
            suffix += f"-trunk-{kind.trunk}"
        return self._scratch / f"{self.checkpoint.weights_digest[:16]}{suffix}.gguf"

    def _known(self) -> ModelFolder | None:
        return self._workspace.find_source(str(self.folder.resolve()))

    def _known_folder(self) -> ModelFolder:
        known = self._known()
        assert known is not None, "moepack plan has remembered it"
        return known

    def _profiled_s(self) -> float:
        """When what plans are made from was measured."""
        known = self._known()
        paths = [self._workspace.hardware_path]
        if known is not None:
            paths += [known.compute_path, known.routing_path, known.folder / CALIBRATION_FILE]
        return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)

    def _whole(self, asked: Asked) -> tuple[LayerLayout, ...]:
        """Whole experts, stored as asked."""
        name = self.encoding(asked)
        return uniform_layout(self.spec, 1.0, encodings=(name,) * len(self.spec.moe_layers)).layers

    def _bar(self, document: dict[str, Any], asked: Asked) -> Bar:
        missed = {
            name: float(baseline["link_bytes_per_token"])
            for name, baseline in document["baselines"].items()
            if name not in _BOUNDS
        }
        policy = min(missed, key=lambda name: missed[name])
        expert_bytes = stored_bytes(self.spec, self._whole(asked)[0], "top")
        link = load_hardware(self._workspace.hardware_path).link_seconds
        return Bar(policy, missed[policy], expert_bytes / link(expert_bytes))

    def _moepack(self, *arguments: str) -> str:
        return _python("moepack", *arguments, home=self._workspace.root)


def _python(module: str, *arguments: str, home: Path | None = None) -> str:
    """What a module prints that is run as a command.

    Raises
    ------
    NotPreparedError
        With what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "MOEPACK_HOME": str(home)} if home else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise NotPreparedError(f"{module} {arguments[0]}: {said[-1]}")
    return done.stdout
