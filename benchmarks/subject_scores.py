"""Scores of the rehearsal about the subject, measured again for the guard table's single edits.

    python -m benchmarks.solve_again docs/data/guard_rows.parquet --facts FILE --out OUT --editor rome
    python -m benchmarks.subject_scores run OUT --facts FILE --editor rome
    python -m benchmarks.subject_scores into docs/data/guard_rows.parquet --source OUT [--to FILE]

For when a plan rehearses other sentences about the subject, or more of them, than the table's rows did. `into` takes
over what `run` measured and leaves every other column, and every other row, as it is. Resumable.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.outcome_noise import KEYS
from benchmarks.solve_again import edits_of, lines_of, measure_solved
from benchmarks.subject_rehearsal import about_subject
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.frames import PRED, read_rows, write_rows
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.neighbours import ProbeSizes

SEED = 0
SIZES = ProbeSizes()


def scores(handle: ModelHandle, request: EditRequest, delta: EditDelta) -> dict[str, float]:
    """As a plan of this one edit would hold them."""
    found = about_subject(handle, request, delta, SIZES.subject)
    lost = [one.top_before != one.top_after for one in found]
    return {
        "rehearsed_subject_kl": sum(one.kl_nats for one in found) / len(found),
        "rehearsed_subject_lost_top1": sum(lost) / len(found),
    }


def run(out: Path, rows: Path, facts: Path, editor: str) -> None:
    """A row for every single edit whose update is there."""
    edits, pool = edits_of(read_rows(rows), facts, editor)
    bench = Bench(open_guard(home=out / "home-scores"), editor, pool, SEED, deltas=out / f"{editor}-deltas")
    handle = bench.workspace.handle
    header = {"model": handle.digest(), "sentences": SIZES.subject}
    file = RowFile(out / f"{editor}-subject-scores.jsonl", header)

    def measured_of(request: EditRequest, delta: EditDelta) -> dict[str, Any]:
        return scores(handle, request, delta)

    measure_solved(bench, edits, file, measured_of)


def taken_over(rows: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """The table with what was measured again. Raises SystemExit for an edit that the table does not have."""
    found = rows.set_index(KEYS)
    fresh = again.set_index(KEYS).rename(columns=lambda name: PRED + name)
    if strange := [key for key in fresh.index if key not in found.index]:
        raise SystemExit(f"the table has no row of {strange[0]}; take the rows that were solved again")
    for name in fresh.columns:
        found.loc[fresh.index, name] = fresh[name]
    new = [name for name in fresh.columns if name not in rows.columns]
    return found.reset_index()[[*rows.columns, *new]]


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    running.add_argument("--facts", type=Path, required=True)
    running.add_argument("--editor", default="rome")
    taking = steps.add_parser("into")
    taking.add_argument("rows", type=Path)
    taking.add_argument("--source", type=Path, required=True)
    taking.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "run":
        run(args.out, args.rows, args.facts, args.editor)
        return
    files = sorted(args.source.glob("*-subject-scores.jsonl"))
    again = pd.DataFrame([line for path in files for line in lines_of(path)])
    write_rows(taken_over(read_rows(args.rows), again), args.to or args.rows)


if __name__ == "__main__":
    main()
