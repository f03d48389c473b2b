"""The corpus: cleaned, deduplicated, split by document, and checked for overlap.

Per domain three parts: *train*; *dev*, to tune the n-gram baselines and to watch training; and
*test*, which is shipped with moepack and looked at once, by the model card.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shipped_model.packages import Package
from shipped_model.sources import Document, Domain, domains, fetch_all

SHINGLE_BYTES = 50
TEST_BYTES = 32 * 1024
DEV_BYTES = 24 * 1024
# A held-out document is a passage of moderate length, so that each part holds several.
HELD_OUT_DOCUMENT_BYTES = (1_200, 14_000)
# Of the shingles of a held-out paragraph, and of a whole held-out document, that training may know.
PARAGRAPH_OVERLAP = 0.2
DOCUMENT_OVERLAP = 0.5
REPEATED_PARAGRAPH_CHARS = 80


@dataclass(frozen=True)
class DomainRecord:
    """What was read for one domain; sizes in bytes of UTF-8."""

    name: str
    title: str
    licence: str
    packages: tuple[Package, ...]
    documents: int
    read_bytes: int
    train_bytes: int
    dev_bytes: int
    test_bytes: int
    test_packages: tuple[str, ...]
    test_overlap: float


def clean(text: str) -> str:
    """Trim line ends, and runs of blank lines down to one."""
    lines = [line.rstrip() for line in text.expandtabs(8).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def shingle_hashes(text: str) -> npt.NDArray[np.uint64]:
    """Hash every run of ``SHINGLE_BYTES`` bytes, white space ignored."""
    data = np.frombuffer(re.sub(r"\s+", " ", text).encode(), dtype=np.uint8).astype(np.uint64)
    count = max(0, len(data) - SHINGLE_BYTES + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(SHINGLE_BYTES):
        hashes = (
            hashes * np.uint64(0x9E3779B97F4A7C15) + data[offset : offset + count] + np.uint64(1)
        )
    return hashes


def overlap(text: str, known: npt.NDArray[np.uint64]) -> float:
    """Return the share of a text's shingles that are in the sorted array ``known``."""
    hashes = shingle_hashes(text)
    if not len(hashes) or not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return float(np.mean(known[places] == hashes))


def _deduplicate(documents: list[Document]) -> list[Document]:
    """Drop repeated documents, and repeats of long paragraphs (licence notices, colophons)."""
    seen_documents: set[bytes] = set()
    seen_paragraphs: Counter[str] = Counter()
    kept = []
    for document in documents:
        text = clean(document.text)
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen_documents:
            continue
        seen_documents.add(digest)
        paragraphs = []
        for paragraph in text.split("\n\n"):
            seen_paragraphs[paragraph] += 1
            if len(paragraph) < REPEATED_PARAGRAPH_CHARS or seen_paragraphs[paragraph] == 1:
                paragraphs.append(paragraph)
        text = clean("\n\n".join(paragraphs))
        if len(text) > 200:
            kept.append(Document(document.package, document.name, text))
    return kept


def _unseen_passages(document: Document, known: npt.NDArray[np.uint64]) -> str | None:
    """Return the document without paragraphs that training knows, or None if it is a near copy."""
    if overlap(document.text, known) > DOCUMENT_OVERLAP:
        return None
    paragraphs = document.text.split("\n\n")
    kept = [text for text in paragraphs if overlap(text, known) <= PARAGRAPH_OVERLAP]
    return clean("\n\n".join(kept))


def _split(domain: Domain, documents: list[Document], seed: int) -> dict[str, list[Document]]:
    """Choose held-out documents at random; everything else is for training.

    Candidates that turn out to be near copies of training text go back to training.
    """
    least, most = HELD_OUT_DOCUMENT_BYTES
    order = list(documents)
    random.Random(f"{seed}/{domain.name}").shuffle(order)
    wanted = 3 * (TEST_BYTES + DEV_BYTES)
    candidates: list[Document] = []
    for document in order:
        if sum(len(d.text) for d in candidates) >= wanted:
            break
        if document.package in domain.held_out_from and least <= len(document.text) <= most:
            candidates.append(document)
    names = {(d.package, d.name) for d in candidates}
    train = [d for d in documents if (d.package, d.name) not in names]
    known = np.sort(np.concatenate([shingle_hashes(d.text) for d in train]))
    parts: dict[str, list[Document]] = {"test": [], "dev": [], "train": train}
    room = {"test": TEST_BYTES, "dev": DEV_BYTES}
    for document in candidates:
        text = _unseen_passages(document, known)
        part = next((name for name, left in room.items() if left > 0), None)
        if text is None or part is None:
            train.append(document)
        elif len(text) >= least:
            parts[part].append(Document(document.package, document.name, text))
            room[part] -= len(text.encode())
    if room["test"] > 0:
        raise ValueError(f"{domain.name}: too little held-out text, {room['test']} bytes short")
    return parts


def _write_domain(
    folder: Path, domain: Domain, root: Path, packages: dict[str, Package], seed: int
) -> None:
    """Read, clean and split one domain; the record is written last and marks it complete."""
    read = [document for document in domain.read(root) if document.text]
    parts = _split(domain, _deduplicate(read), seed)
    known = np.sort(np.concatenate([shingle_hashes(d.text) for d in parts["train"]]))
    for part, part_documents in parts.items():
        lines = [json.dumps(asdict(d), ensure_ascii=False) for d in part_documents]
        (folder / f"{domain.name}.{part}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    size = {part: sum(len(d.text.encode()) for d in parts[part]) for part in parts}
    names = {document.package for document in read} | set(domain.packages)
    record = DomainRecord(
        name=domain.name,
        title=domain.title,
        licence=domain.licence,
        packages=tuple(packages[name] for name in sorted(names)),
        documents=len(read),
        read_bytes=sum(len(d.text.encode()) for d in read),
        train_bytes=size["train"],
        dev_bytes=size["dev"],
        test_bytes=size["test"],
        test_packages=tuple(sorted({d.package for d in parts["test"]})),
        test_overlap=overlap("\n".join(d.text for d in parts["test"]), known),
    )
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False)
    (folder / f"{domain.name}.json").write_text(text + "\n", "utf-8")
    print(f"{domain.name}: {size}, overlap {record.test_overlap:.3f}", flush=True)


def build(folder: Path, seed: int) -> None:
    """Fetch, read, clean and split every domain that is not there yet; write ``corpus/``.

    Documents are JSON lines, ``corpus/<domain>.<part>.jsonl``. Peak memory is about thirty times
    the largest domain's text, for the hashes of its shingles.
    """
    root, packages = fetch_all(folder / "packages")
    out = folder / "corpus"
    out.mkdir(parents=True, exist_ok=True)
    for domain in domains():
        if not (out / f"{domain.name}.json").exists():
            _write_domain(out, domain, root, packages, seed)


def load_records(folder: Path) -> list[DomainRecord]:
    """Read back what `build` recorded, in the domains' order."""
    records = []
    for domain in domains():
        row = json.loads((folder / "corpus" / f"{domain.name}.json").read_text("utf-8"))
        row["packages"] = tuple(Package(**package) for package in row["packages"])
        row["test_packages"] = tuple(row["test_packages"])
        records.append(DomainRecord(**row))
    return records


def load_part(folder: Path, domain: str, part: str) -> list[Document]:
    """Read one part (``train``, ``dev`` or ``test``) of one domain."""
    path = folder / "corpus" / f"{domain}.{part}.jsonl"
    return [Document(**json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]
