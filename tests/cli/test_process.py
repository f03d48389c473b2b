"""The command line as a process: its start, signals and pipes."""

from __future__ import annotations

import json
import resource
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

MOEPACK = (sys.executable, "-m", "moepack")


def help_s(*command: str) -> float:
    """Processor time of ``--help``: what else the machine is doing is not its time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*MOEPACK, *command, "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", [(), ("plan",), ("run",), ("eval",), ("preset", "copy")])
def test_help_answers_within_half_a_second(command: tuple[str, ...]) -> None:
    assert statistics.median(help_s(*command) for _ in range(3)) < 0.5


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, moepack.cli.app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "numpy", "scipy", "pydantic", "rich", "huggingface_hub"}.isdisjoint(loaded)


@pytest.mark.parametrize("command", ["plan", "inspect", "pack", "verify"])
def test_what_plans_and_packs_works_without_torch(
    packed: Path, tmp_path: Path, command: str
) -> None:
    arguments = {
        "plan": ["plan", "--vram", "4M", "--context", "256"],
        "inspect": ["inspect"],
        "pack": ["pack", "--out", str(tmp_path / "again")],
        "verify": ["verify"],
    }[command]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moepack.cli.app import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_text_comes_as_it_is_generated_and_ctrl_c_ends_it_cleanly(
    packed: Path, interruptible: None
) -> None:
    command = [*MOEPACK, "run", "abc", "--max-new-tokens", "250", "--temperature", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)  # the first text is there while the rest is being generated
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode()
    assert process.returncode == 130
    assert told == "interrupted\n"


def test_ctrl_c_while_the_commands_are_being_loaded_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'moepack.cli.verify':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from moepack.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_leaves_a_whole_trace_of_what_there_was(
    packed: Path, tmp_path: Path, interruptible: None
) -> None:
    path = tmp_path / "trace.json"
    command = [*MOEPACK, "run", "abc", "--max-new-tokens", "250", "--trace", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read().decode().splitlines()
    assert process.returncode == 130
    assert told[0].startswith(f"trace written to {path}: ")
    assert told[1:] == ["interrupted"]
    assert json.loads(path.read_bytes())["traceEvents"]
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["trace.json"]


def test_a_reader_that_leaves_causes_no_complaint(packed: Path) -> None:
    command = [*MOEPACK, "inspect", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
    assert process.returncode == 1
    assert complaint == b""
