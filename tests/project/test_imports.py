"""The directions of import that the design draws, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = sorted((ROOT / "moepack").rglob("*.py"))
RUNTIME = sorted((ROOT / "runtime" / "moepack_runtime").rglob("*.py"))

#: What the runtime may know of the tool.
SHARED = {
    "errors",
    "units",
    "records",
    "model_spec",
    "encodings",
    "quantise",
    "calibration",
    "segments",
    "layout",
    "trunk",
    "plan",
    "budget",
    "working_memory",
    "ram_tier",
    "formats",
    "manifest",
    "machine",
    "residency",
    "on_miss",
    "mixed_residency",
    "cost",
}


class Import(NamedTuple):
    """One imported module, and whether it is imported with the file or by a function."""

    module: str
    top_level: bool


def imports(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, top_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, top_level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                module = child.module or ""
                yield Import(module, top_level)
                yield from (Import(f"{module}.{alias.name}", top_level) for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue  # never executed
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from visit(child, top_level and not function)

    return visit(ast.parse(path.read_text()), True)


def importers(package: str, files: list[Path], *, top_level_only: bool = False) -> set[str]:
    """The files, relative to the repository, that import a package."""
    return {
        str(path.relative_to(ROOT))
        for path in files
        for found in imports(path)
        if found.module.split(".")[0] == package and (found.top_level or not top_level_only)
    }


def test_the_runtime_knows_only_the_contract_of_the_tool() -> None:
    strays = {
        f"{path.relative_to(ROOT)}: {found.module}"
        for path in RUNTIME
        for found in imports(path)
        if (found.module.startswith("moepack.") and found.module.split(".")[1] not in SHARED)
        or found.module in {"rich", "scipy", "typer"}
    }
    assert not strays


def test_the_tool_loads_torch_and_the_runtime_only_inside_functions() -> None:
    assert not importers("moepack_runtime", TOOL, top_level_only=True)
    assert not importers("torch", TOOL, top_level_only=True)


def test_scipy_belongs_to_the_planner() -> None:
    # routing_fit makes presets, by hand and seldom; nothing that plans or runs imports it.
    allowed = {"moepack/planner.py", "moepack/routing_fit.py"}
    assert importers("scipy", TOOL + RUNTIME) <= allowed
    fitters = {
        str(path.relative_to(ROOT))
        for path in TOOL + RUNTIME
        for found in imports(path)
        if found.module == "moepack.routing_fit"
    }
    assert not fitters


def test_rich_belongs_to_the_commands_and_the_report() -> None:
    allowed = ("moepack/cli/", "moepack/report/")
    assert all(path.startswith(allowed) for path in importers("rich", TOOL + RUNTIME))


def test_transformers_is_only_the_oracle() -> None:
    assert not importers("transformers", TOOL + RUNTIME)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("moepack", {"numpy", "pydantic", "rich", "scipy", "torch"}),
        ("moepack.plan", {"numpy", "pydantic", "rich", "scipy", "torch"}),
        ("moepack.budget", {"pydantic", "rich", "scipy", "torch"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert absent.isdisjoint(loaded)
