"""The README tells the truth about what is where."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules() -> set[str]:
    """Every module of both packages, as ``folder/file.py``."""
    folders = (ROOT / "moepack", ROOT / "runtime" / "moepack_runtime")
    return {
        f"{path.parent.name}/{path.name}"
        for folder in folders
        for path in folder.rglob("*.py")
        if not path.name.startswith("__")
    }


def listed() -> list[str]:
    """The same, as the README's tree lists them."""
    tree = (ROOT / "README.md").read_text().split("## The code")[1].split("\n## ")[0]
    found = []
    folders: dict[int, str] = {}
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent < 4:
            continue
        names = re.match(r"[\w./]+(?:, [\w./]+)*", line.strip())
        assert names is not None, line
        for name in names[0].split(", "):
            if name.endswith("/"):
                folders[indent] = Path(name).name
            elif name.endswith(".py"):
                found.append(f"{folders[indent - 4]}/{name}")
    return found


def test_the_tree_lists_every_module_once() -> None:
    assert sorted(listed()) == sorted(modules())


def test_links_lead_to_files() -> None:
    for document in (ROOT / "README.md", ROOT / "docs" / "format.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert "://" in link or (document.parent / link).exists(), link
