"""Tune fine-tuning fairly: the same facts for each learning rate, the best harmonic mean wins.

    python -m benchmarks.finetune_tune --data ../shared/data --out OUT

Facts: those that `reference_bank` drew and did not put into the bank (101 to 120 of its list). Resumable. Prints
the table of docs/finetune.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.reference_bank import cases_of
from guardedit.edits.inputs import SolveInputs
from guardedit.evaluation.datasets import bind, plain
from guardedit.evaluation.run import Job, evaluate
from guardedit.evaluation.summary import Evaluation
from guardedit.pipeline import open as open_guard

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
FIRST, LAST = 100, 120
SEED = 0


def row(rate: float, found: Evaluation) -> str:
    """One line of the table."""
    cells = []
    for name in ("efficacy", "paraphrase", "neighborhood", "neighborhood_base"):
        value = found.metrics.get(name)
        cells.append("–" if value is None else f"{value.value:.3f} ({value.low:.3f}–{value.high:.3f})")
    score = found.score.get("raw", 0.0)
    return (
        f"| {rate:g} | {found.n} | " + " | ".join(cells) + f" | {score:.3f} | {found.seconds_per_edit:.1f} |"
    )


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    guard = open_guard(home=args.out / "home")
    cases = cases_of(guard, args.data, args.out, LAST)[FIRST:LAST]
    head = (
        "learning rate",
        "n",
        "efficacy",
        "paraphrase",
        "neighborhood",
        "unedited",
        "harmonic mean",
        "seconds",
    )
    sys.stdout.write("| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n")
    for rate in args.rates:
        settings = guard.kit.settings("finetune", {"learning_rate": rate})
        solve = bind("finetune", settings, SolveInputs(guard.kit.second_moments, SEED))
        job = Job("finetune", solve, plain(settings), seed=SEED)
        found = evaluate(guard.handle, cases, job, state=args.out / f"finetune-{rate:g}.jsonl")
        sys.stdout.write(row(rate, found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
