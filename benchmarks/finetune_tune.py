"""Tune fine-tuning fairly: the same facts, a grid of learning rates and steps, the best harmonic mean wins.

    python -m benchmarks.finetune_tune --data ../shared/data --out OUT

CounterFact `train`, known facts, seed 1 (the reference bank draws with seed 0). Resumable. Prints the table of docs/finetune.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from guardedit.evaluation.datasets import evaluate_dataset
from guardedit.evaluation.summary import Evaluation
from guardedit.pipeline import open as open_guard

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
STEPS = (25,)
SEED = 1


def row(rate: float, steps: int, found: Evaluation) -> str:
    """One line of the table."""
    cells = []
    for name in ("efficacy", "paraphrase", "neighborhood", "neighborhood_base"):
        value = found.metrics.get(name)
        cells.append("–" if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})")
    return f"| {rate:g} | {steps} | {found.n} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    guard = open_guard(home=args.out / "home")
    head = (
        "learning rate",
        "steps at most",
        "n",
        "efficacy",
        "paraphrase",
        "neighborhood",
        "neighborhood, unedited",
    )
    sys.stdout.write("| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n")
    for rate, steps in itertools.product(RATES, STEPS):
        found = evaluate_dataset(
            guard,
            args.data / "counterfact/counterfact_edit_format.jsonl.xz",
            editor="finetune",
            limit=args.facts,
            seed=SEED,
            known_only=True,
            split="train",
            neighbours=5,
            hparams={"learning_rate": rate, "steps": steps},
            state=args.out / f"finetune-{rate:g}-{steps}.jsonl",
        )
        sys.stdout.write(row(rate, steps, found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
