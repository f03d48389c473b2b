"""Kills a packing process at every point where it touches the disk, and packs again.

Run by ``test_resume.py`` in a process of its own, because it forks. The points are Python's audit
events (opening, renaming, removing, linking ...), every fsync, and every tensor that is read from
the source, which lies between writes. SIGKILL: nothing gets to clean up.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from moepack.pack import pack
from moepack.plan import Plan
from moepack.segments import Bits
from tests.pack.fake_models import FakeSource, contents, make_plan, make_spec

WATCHED = {
    "ctypes.call_function",
    "fcntl.flock",
    "open",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
}


class Killer:
    """Ends its own process at the n-th tick."""

    def __init__(self, point: int) -> None:
        self.left = point

    def tick(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def watch(self) -> None:
        mock.patch.object(os, "fsync", side_effect=lambda _: self.tick()).start()
        sys.addaudithook(lambda event, _: self.tick() if event in WATCHED else None)


class KilledSource(FakeSource):
    killer: Killer

    def expert(self, layer: int, expert: int) -> dict[str, Bits]:
        self.killer.tick()
        return super().expert(layer, expert)

    def trunk_tensor(self, name: str) -> Bits:
        self.killer.tick()
        return super().trunk_tensor(name)


def in_child(work: Callable[[], object]) -> bool:
    """Whether some work ended by itself, in a child, rather than by being killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"failed, rather than being killed: {status}"
    return status == 0


def packs_killed_at(point: int, source: FakeSource, plan: Plan, out: Path) -> bool:
    def work() -> None:
        killed = KilledSource(source.spec, source.seed, source.auxiliary_files)
        killed.killer = Killer(point)
        killed.killer.watch()
        pack(killed, plan, out)

    return not in_child(work)


def main(folder: Path, scenario: str) -> None:
    # Flushing matters when the power goes, not when a process does; here it would take minutes.
    mock.patch.object(os, "fsync").start()
    spec = make_spec(experts=2)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    plan = make_plan(spec, [16, 32])
    source = FakeSource(spec, 1, (tokenizer,))
    older: dict[str, tuple[FakeSource, Plan]] = {
        "relayout": (source, make_plan(spec, [16, 0])),
        # Other weights in files of the same sizes and headers: the hardest to tell apart.
        "replace": (FakeSource(spec, 2, (tokenizer,)), plan),
    }
    pack(source, plan, folder / "expected")
    expected = contents(folder / "expected")
    states: list[dict[str, bytes]] = [{}, expected]
    if scenario in older:
        pack(*older[scenario], folder / "older")
        states = [contents(folder / "older"), expected]

    point = 0
    out = folder / "here" / "out"
    killed = True
    while killed:
        shutil.rmtree(folder / "here", ignore_errors=True)
        if scenario in older:
            shutil.copytree(folder / "older", out)
        killed = packs_killed_at(point, source, plan, out)
        assert contents(out) in states, f"a half-made folder is visible after point {point}"
        if scenario == "again":
            # Killed a second time, elsewhere: while it recovers.
            packs_killed_at(point % 17, source, plan, out)
            assert contents(out) in states, f"a half-made folder is visible after point {point}"
        assert in_child(lambda: pack(source, plan, out))
        assert contents(out) == expected, f"other bytes after point {point}"
        left = sorted(path.name for path in out.parent.iterdir())
        assert left == ["out"], f"{left} after point {point}"
        point += 1
    sys.stdout.write(f"{point}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
