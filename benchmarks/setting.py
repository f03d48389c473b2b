"""What the measurements of one model have in common: the model, its profiles, its prompts."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moepack_runtime.capabilities import CAPABILITIES
from moepack_runtime.tokenizer import Tokenizer

from benchmarks.options import Throttle, at_least, new_tokens
from moepack import machine
from moepack.calibration import CALIBRATION_FILE, Calibration, load_calibration
from moepack.checkpoint import Checkpoint
from moepack.cli.models import open_source
from moepack.compute import ComputeProfile, load_compute
from moepack.errors import MoepackError, WorkspaceError
from moepack.hardware import HardwareProfile, load_hardware
from moepack.measuring import shipped_prompts
from moepack.model_spec import ModelSpec
from moepack.plan_request import PlanRequest
from moepack.routing import RoutingProfile, load_routing
from moepack.shipped import SHIPPED_MODEL
from moepack.workspace import Workspace


class Setting(NamedTuple):
    """A model that has been profiled on this machine.

    Attributes
    ----------
    prompts : list of list of int
        Those of ``moepack bench``.
    calibration : Calibration or None
        What its experts are rounded by; None where that was not measured.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    hardware: HardwareProfile
    compute: ComputeProfile
    routing: RoutingProfile
    prompts: list[list[int]]
    calibration: Calibration | None

    def request(
        self, args: argparse.Namespace, fast_budget_bytes: int, throttle: Throttle | None = None
    ) -> PlanRequest:
        """What ``moepack plan`` would ask."""
        return PlanRequest(
            spec=self.spec,
            hardware=self.hardware,
            hardware_is_this_machine=True,
            compute=self.compute,
            routing=self.routing,
            engine=CAPABILITIES,
            device=self.hardware.device,
            fast_budget_bytes=fast_budget_bytes,
            context_tokens=args.context,
            prompt_tokens=args.prompt,
            new_tokens=args.new,
            link=throttle,
        )


def open_setting(model: str, prompt_tokens: int) -> Setting:
    """Open a model by folder or name, and what ``moepack profile`` has left of it.

    Raises
    ------
    WorkspaceError
        When it has not been profiled.
    CheckpointError
        When there is no such model.
    """
    workspace = Workspace.locate()
    source = open_source(workspace, model, headers_only=False)
    folder = workspace.find(source.record.key)
    if folder is None or not folder.compute_path.exists():
        raise WorkspaceError(f"{model} has no profile here; run moepack profile {model}")
    assert source.checkpoint.folder is not None
    calibrated = (folder.folder / CALIBRATION_FILE).exists()
    return Setting(
        spec=source.spec,
        checkpoint=source.checkpoint,
        hardware=load_hardware(workspace.hardware_path),
        compute=load_compute(folder.compute_path),
        routing=load_routing(folder.routing_path),
        prompts=shipped_prompts(Tokenizer.load(Path(source.checkpoint.folder)), prompt_tokens),
        calibration=load_calibration(folder.folder) if calibrated else None,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all measurements of a model have."""
    parser.add_argument("--model", default=SHIPPED_MODEL, help="a folder; default: the shipped one")
    parser.add_argument("--context", type=at_least(1), default=1024, metavar="TOKENS")
    parser.add_argument("--prompt", type=at_least(1), default=256, metavar="TOKENS")
    parser.add_argument("--new", type=new_tokens, default=128, metavar="TOKENS")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("/var/tmp"),
        metavar="DIR",
        help="for the packs, on the disk that is to be measured",
    )


def named(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Exit status of a measurement: 1 where it ended in a named error, which is printed."""
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except MoepackError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1


def described(args: argparse.Namespace) -> dict[str, object]:
    """Machine and options, for the last line."""
    return {
        "machine": f"{machine.cpu_name()}, {machine.core_count()} cores",
        "options": {name: str(value) for name, value in vars(args).items()},
    }
