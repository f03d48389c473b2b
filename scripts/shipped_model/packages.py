"""Debian packages as a source of text: fetched and unpacked, never installed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


class SourceError(RuntimeError):
    """A package or a program that the corpus needs could not be used."""


@dataclass(frozen=True)
class Package:
    """One package that text was read from."""

    name: str
    version: str


def run_tool(arguments: list[str], *, cwd: Path | None = None, stdin: bytes | None = None) -> bytes:
    """Run a program and return what it wrote.

    Raises
    ------
    SourceError
        When the program is missing or fails.
    """
    try:
        done = subprocess.run(arguments, cwd=cwd, input=stdin, capture_output=True, check=True)
    except FileNotFoundError as missing:
        raise SourceError(f"{arguments[0]} is not installed") from missing
    except subprocess.CalledProcessError as failed:
        message = failed.stderr.decode("utf-8", "replace").strip()
        raise SourceError(f"{' '.join(arguments[:3])} failed: {message}") from failed
    return done.stdout


def unpack(names: list[str], folder: Path) -> tuple[Path, dict[str, Package]]:
    """Download the packages that are not in ``folder`` yet and unpack all of them.

    Returns
    -------
    root : Path
        The folder that holds what the packages would have put in ``/``.
    packages : dict of str to Package
        Name and version of each, as the packages themselves state them.
    """
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not any(archives.glob(f"{name}_*.deb"))]
    if missing:
        run_tool(["apt-get", "download", *missing], cwd=archives)
    packages = {}
    for name in names:
        archive = max(archives.glob(f"{name}_*.deb"))
        version = run_tool(["dpkg-deb", "--field", str(archive), "Version"]).decode().strip()
        packages[name] = Package(name, version)
        root = folder / "unpacked" / name
        if not root.exists():
            root.parent.mkdir(parents=True, exist_ok=True)
            run_tool(["dpkg-deb", "--extract", str(archive), str(root)])
    return folder / "unpacked", packages
