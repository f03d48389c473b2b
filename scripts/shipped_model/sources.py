"""Readers: from unpacked packages to plain-text documents, one list for each domain."""

from __future__ import annotations

import gzip
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from shipped_model.packages import Package, SourceError, run_tool, unpack

# Lines of running text, no hyphenation, no justification: what `man` shows, without its stretching.
ROFF_PREAMBLE = b".ad l\n.nh\n.rm ad\n.rm hy\n"
ROFF_PUNCTUATION = str.maketrans({"\u2010": "-", "\u2011": "-", "\u2212": "-", "\u00a0": " "})


@dataclass(frozen=True)
class Document:
    """One text as it was found: a file, a dictionary's run of entries, a book."""

    package: str
    name: str
    text: str


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes
    ----------
    packages
        Debian packages it is read from.
    held_out_from
        Of the packages, those whose text may be held out and shipped.
    licence
        Licence of the held-out text, in words.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    held_out_from: tuple[str, ...]
    licence: str
    read: Callable[[Path], Iterator[Document]]


def _decode(path: Path) -> str | None:
    """Return the text of a file, plain or gzipped, or None if it is not UTF-8."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _render_manual_page(path: Path) -> str:
    source = gzip.decompress(path.read_bytes())
    if source.lstrip().startswith(b".so "):
        return ""
    roff = run_tool(["preconv", "-e", "utf8"], stdin=source)
    command = ["groff", "-t", "-mandoc", "-Tutf8", "-P-c", "-P-b", "-P-u", "-rLL=80n", "-rHY=0"]
    text = run_tool(command, stdin=ROFF_PREAMBLE + roff).decode("utf-8", "replace")
    text = text.translate(ROFF_PUNCTUATION)
    # The first and last lines are the page's running head and foot.
    return "\n".join(text.strip("\n").split("\n")[1:-1])


def _manual_pages(
    section_root: str, packages: tuple[str, ...]
) -> Callable[[Path], Iterator[Document]]:
    def read(root: Path) -> Iterator[Document]:
        for package in packages:
            pages = sorted((root / package / section_root).glob("man*/*.gz"))
            pages = [page for page in pages if not page.is_symlink()]
            with ThreadPoolExecutor() as pool:
                for page, text in zip(pages, pool.map(_render_manual_page, pages), strict=True):
                    yield Document(package, page.name.removesuffix(".gz"), text)

    return read


def _scripture(root: Path) -> Iterator[Document]:
    program = root / "bible-kjv" / "usr" / "bin" / "bible"
    data = root / "bible-kjv-text" / "usr" / "lib"
    lines = run_tool([str(program), "-f", "-l10000", "-p", str(data), "gen1:1-rev22:21"]).decode()
    chapters: dict[str, list[str]] = {}
    for line in lines.splitlines():
        place, _, verse = line.partition(" ")
        chapter, _, _ = place.partition(":")
        if verse:
            chapters.setdefault(chapter, []).append(verse.strip())
    for chapter, verses in chapters.items():
        # Paragraphs of four verses read as prose and keep the verses' own punctuation.
        groups = [" ".join(verses[i : i + 4]) for i in range(0, len(verses), 4)]
        yield Document("bible-kjv-text", chapter, "\n\n".join(groups))


def _split_at_headings(text: str, heading: str, least_chars: int) -> Iterator[str]:
    """Cut a book before headings, into sections of at least ``least_chars`` characters."""
    section = ""
    for piece in re.split(rf"(?m)^(?={heading})", text):
        section += piece
        if len(section) >= least_chars:
            yield section
            section = ""
    if section:
        yield section


def _guides(root: Path) -> Iterator[Document]:
    books = {
        "debian-reference-en": ["usr/share/debian-reference/debian-reference.en.txt.gz"],
        "maint-guide": ["usr/share/doc/maint-guide/maint-guide.en.txt.gz"],
        "debian-faq": ["usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"],
        "developers-reference": ["usr/share/developers-reference/_sources/*.rst.txt"],
        "doc-debian": ["usr/share/doc/debian/*.txt*", "usr/share/doc/debian/debian-manifesto.gz"],
    }
    for package, patterns in books.items():
        paths = sorted(path for pattern in patterns for path in (root / package).glob(pattern))
        if not paths:
            raise SourceError(f"{package}: no text at {patterns}")
        for path in paths:
            sections = _split_at_headings(_decode(path) or "", r"(?:Chapter )?\d+\.[\d.]* ", 2000)
            for number, section in enumerate(sections):
                yield Document(package, f"{path.name}#{number}", section)


def _python(_: Path) -> Iterator[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    installed = Path(sysconfig.get_paths()["purelib"])
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
    }
    for package, folder in (("python", library), ("numpy", installed / "numpy")):
        for path in sorted(folder.rglob("*.py")):
            if skipped.isdisjoint(path.relative_to(folder).parts[:-1]):
                yield Document(package, str(path.relative_to(folder)), _decode(path) or "")


def _c_headers(root: Path) -> Iterator[Document]:
    for package in ("linux-libc-dev", "libc6-dev"):
        folder = root / package / "usr" / "include"
        for path in sorted(folder.rglob("*.h")):
            yield Document(package, str(path.relative_to(folder)), _decode(path) or "")


def _dictionary(root: Path) -> Iterator[Document]:
    # Every third run of entries of the large dictionary is as much text as another domain has.
    for package, name, stride in (("dict-gcide", "gcide", 3), ("dict-jargon", "jargon", 1)):
        path = root / package / "usr" / "share" / "dictd" / f"{name}.dict.dz"
        # The dictionary has a few damaged bytes.
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
        text = re.sub(r"(?m)^ +\[[^\]\n]{2,30}\]\n", "", text)  # sources of entries
        for number, section in enumerate(_split_at_headings(text, r"\S", 4000)):
            if number % stride == 0 and not section.startswith("00-database"):
                yield Document(package, f"{name}#{number}", section)


def domains() -> tuple[Domain, ...]:
    """Return the kinds of text that the model is trained on."""
    french, german = ("manpages-fr", "manpages-fr-dev"), ("manpages-de", "manpages-de-dev")
    english = ("manpages", "manpages-dev")
    books = ("debian-reference-en", "maint-guide", "debian-faq", "developers-reference")
    return (
        Domain(
            "scripture",
            "English prose: the King James Bible",
            ("bible-kjv-text", "bible-kjv"),
            ("bible-kjv-text",),
            "public domain",
            _scripture,
        ),
        Domain(
            "guides",
            "English technical guides",
            (*books, "doc-debian"),
            books,
            "GPL-2.0-or-later",
            _guides,
        ),
        Domain(
            "man_en",
            "manual pages, English",
            english,
            english,
            "Linux-man-pages-copyleft and other licences permitting verbatim copies, by page",
            _manual_pages("usr/share/man", english),
        ),
        Domain(
            "man_fr",
            "manual pages, French",
            french,
            french,
            "GPL-3.0-or-later (translation); Linux-man-pages-copyleft and others (original)",
            _manual_pages("usr/share/man/fr", french),
        ),
        Domain(
            "man_de",
            "manual pages, German",
            german,
            german,
            "GPL-3.0-or-later (translation); Linux-man-pages-copyleft and others (original)",
            _manual_pages("usr/share/man/de", german),
        ),
        Domain("python", "Python source", (), ("python",), "PSF-2.0", _python),
        Domain(
            "c",
            "C headers",
            ("linux-libc-dev", "libc6-dev"),
            ("linux-libc-dev",),
            "GPL-2.0 WITH Linux-syscall-note, some files also MIT",
            _c_headers,
        ),
        Domain(
            "dictionary",
            "dictionaries",
            ("dict-gcide", "dict-jargon"),
            ("dict-gcide", "dict-jargon"),
            "GPL-2.0-or-later (GCIDE, after Webster 1913); public domain (Jargon File)",
            _dictionary,
        ),
    )


def python_packages() -> dict[str, Package]:
    """Return the Python packages read by the ``python`` domain, with their versions."""
    interpreter = ".".join(str(part) for part in sys.version_info[:3])
    return {"python": Package("python", interpreter), "numpy": Package("numpy", version("numpy"))}


def fetch_all(folder: Path) -> tuple[Path, dict[str, Package]]:
    """Fetch and unpack every Debian package that any domain names."""
    names = [name for domain in domains() for name in domain.packages]
    root, packages = unpack(names, folder)
    return root, packages | python_packages()
