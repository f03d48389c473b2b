"""Make the small mixture-of-experts model that ships with moepack.

Five steps, each of which leaves its result in the working folder and can be run again:

    prepare   fetch packages, build the corpus, train the tokenizer, encode
    train     train until a time of day or for some minutes; resumes from the last checkpoint
    export    write the Hugging Face folder and the held-out texts
    card      measure the exported model and write its card
    all       everything

Needs a Debian system (apt-get, dpkg-deb, groff) and the packages torch, transformers, tokenizers
and numpy. One hour on two cores is enough for a model that clearly beats n-grams.
"""

from __future__ import annotations

import argparse
import time
from datetime import datetime, timedelta
from pathlib import Path

import torch
from shipped_model import card, corpus, export, measure, tokenizer, trainer
from shipped_model.model import ModelConfig
from shipped_model.packages import SourceError
from shipped_model.sources import domains

SEED = 20261
# Share of the batches; the guides are the smallest domain and would repeat too often.
DOMAIN_WEIGHTS = {
    "scripture": 0.11,
    "guides": 0.08,
    "man_en": 0.13,
    "man_fr": 0.13,
    "man_de": 0.13,
    "python": 0.15,
    "c": 0.13,
    "dictionary": 0.14,
}
ASSETS = Path(__file__).resolve().parent.parent / "moepack" / "assets"


def prepare(work: Path) -> None:
    """Build corpus, tokenizer and token streams."""
    corpus.build(work, SEED)
    names = [domain.name for domain in domains()]
    trained = tokenizer.train(work, names, ModelConfig().vocab_size)
    tokenizer.encode_all(trained, work, names)


def train(work: Path, end_s: float) -> None:
    """Train or resume; the schedule completes at ``end_s`` (Unix time)."""
    trainer.train(
        work,
        trainer.TrainingOptions(
            domains=tuple(DOMAIN_WEIGHTS),
            domain_weights=tuple(DOMAIN_WEIGHTS.values()),
            seed=SEED,
            end_s=end_s,
        ),
    )


def write_export(work: Path, assets: Path) -> None:
    """Write ``model/`` and ``texts/`` under the assets folder."""
    export.export(work, assets / "model")
    texts = assets / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    for name in DOMAIN_WEIGHTS:
        (texts / f"{name}.txt").write_text(measure.held_out_text(work, name), "utf-8")
    readme = card.render_texts_readme(work, corpus.load_records(work))
    (texts / "README.md").write_text(readme, "utf-8")


def write_card(work: Path, assets: Path) -> None:
    """Measure the exported model and write its card beside it."""
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    progress, options = state["progress"], state["options"]
    measured = measure.measure(
        work, assets / "model", list(DOMAIN_WEIGHTS), int(options["sequence_length"])
    )
    training = card.TrainingRecord(
        steps=progress["step"],
        tokens=progress["tokens"],
        training_s=progress["training_s"],
        options=options,
        hardware=card.describe_hardware(),
    )
    text = card.render(work, corpus.load_records(work), training, measured)
    (assets / "model" / "README.md").write_text(text, "utf-8")


def _end_s(arguments: argparse.Namespace) -> float:
    if arguments.until is None:
        return time.time() + 60.0 * float(arguments.minutes)
    now = datetime.now()
    clock = datetime.strptime(arguments.until, "%H:%M").time()
    end = datetime.combine(now.date(), clock)
    return (end if end > now else end + timedelta(days=1)).timestamp()


def main() -> None:
    """Parse the command line and run the step it names."""
    parser = argparse.ArgumentParser(description="Make the model that ships with moepack.")
    parser.add_argument("step", choices=["prepare", "train", "export", "card", "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything in between")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where model/ and texts/ go")
    parser.add_argument("--minutes", type=float, default=70.0, help="how long to train")
    parser.add_argument("--until", metavar="HH:MM", help="train until this time of day instead")
    arguments = parser.parse_args()
    work, step = arguments.work, arguments.step
    work.mkdir(parents=True, exist_ok=True)
    try:
        if step in ("prepare", "all"):
            prepare(work)
        if step in ("train", "all"):
            train(work, _end_s(arguments))
        if step in ("export", "all"):
            write_export(work, arguments.assets)
        if step in ("card", "all"):
            write_card(work, arguments.assets)
    except SourceError as error:
        raise SystemExit(f"SourceError: {error}") from error


if __name__ == "__main__":
    main()
