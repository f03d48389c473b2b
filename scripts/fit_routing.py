"""Write the presets of profiles/routing, fitted to recordings of real models.

    python scripts/fit_routing.py RECORDINGS [--only NAME] [--out FOLDER]

Without --out: profiles/routing of this repository. Nobody edits those files: what they are fitted
to, and every source, is in routing_recipes.py and routing_published.py. Prints each figure as
recorded and as fitted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from routing_published import mixtral_paper, qwen3, qwen_paper, uniform
from routing_recipes import glm, mixtral, olmoe, qwen, switch
from routing_targets import Recipe

from moepack.routing_model import RoutingModel

PRESETS = Path(__file__).resolve().parents[1] / "profiles" / "routing"


#: Every preset's recipe, given the folder of the recordings.
RECIPES: dict[str, Callable[[Path], Recipe]] = {
    "uniform": uniform,
    "olmoe-1b-7b": olmoe,
    "qwen1.5-moe-a2.7b": qwen,
    "switch-base-8": switch,
    "mixtral-8x7b": mixtral,
    "glm-5.2": glm,
    "qwen3-30b-a3b": qwen3,
    "qwen1.5-moe-paper": qwen_paper,
    "mixtral-paper": mixtral_paper,
}


def main() -> None:
    """Fit what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--out", type=Path, default=PRESETS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, recipe in RECIPES.items():
        if arguments.only in (None, name):
            began_s = time.perf_counter()
            model = recipe(arguments.recordings).make()
            model.save(arguments.out / f"{model.name}.yaml")
            print_fit(model, time.perf_counter() - began_s)


def print_fit(model: RoutingModel, seconds: float) -> None:
    """Parameters, and the table of the fit."""
    print(f"\n{model.name}, fitted in {seconds:.0f} s")
    for name in ("depths", "popularity", "text", "context", "context_tokens"):
        print(f"    {name:15} {getattr(model, name)}")
    if not model.fit:
        return
    print(f"    {'figure':28} {'depths':>11} {'recorded':>9} {'fitted':>8} {'difference':>11}")
    for line in model.fit:
        depths = f"{line.first_depth:g} to {line.last_depth:g}"
        difference = line.fitted - line.recorded
        print(
            f"    {line.name:28} {depths:>11} {line.recorded:9.4f} {line.fitted:8.4f} "
            f"{difference:+11.4f}"
        )
    worst = max(abs(line.fitted - line.recorded) for line in model.fit)
    mean = sum(abs(line.fitted - line.recorded) for line in model.fit) / len(model.fit)
    print(f"    mean difference {mean:.4f}, largest {worst:.4f}")


if __name__ == "__main__":
    main()
