"""Columns of the guard's table measured again, for its single edits, from their updates.

    python -m benchmarks.solve_again docs/data/guard_rows.parquet --facts FILE --out OUT --editor rome
    python -m benchmarks.measured_again run OUT --facts FILE --editor rome --what subject
    python -m benchmarks.measured_again run OUT --facts FILE --editor rome --what far --far fiction=FILE …
    python -m benchmarks.measured_again into docs/data/guard_rows.parquet --source OUT [--to FILE]

*subject*: the two scores of the rehearsal about the subject, for when a plan rehearses other sentences, or more of
them, than the table's rows did. *far*: the outcome far from the edit, for when rows were measured on other text.
`into` takes over what `run` measured and leaves every other column, and every other row, as it is. Resumable; of
edits whose update is not in OUT nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.outcome_noise import KEYS
from benchmarks.solve_again import edits_of, lines_of, measure_solved
from benchmarks.subject_rehearsal import about_subject
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.command import far_texts
from guardedit.evaluation.guard.far_sample import FarSample
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows, same_far_text, write_rows
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.neighbours import ProbeSizes

SEED = 0
SIZES = ProbeSizes()
SUFFIX = "again.jsonl"


def subject_scores(handle: ModelHandle, request: EditRequest, delta: EditDelta) -> dict[str, float]:
    """As a plan of this one edit would hold them."""
    found = about_subject(handle, request, delta, SIZES.subject)
    lost = [one.top_before != one.top_after for one in found]
    return {
        f"{PRED}rehearsed_subject_kl": sum(one.kl_nats for one in found) / len(found),
        f"{PRED}rehearsed_subject_lost_top1": sum(lost) / len(found),
    }


def far_outcome(far: FarSample, delta: EditDelta) -> dict[str, float]:
    """As a row of the table holds it."""
    return {f"{OUT}far/{name}": value for name, value in far.moves(delta).items()}


def run(out: Path, rows: Path, facts: Path, editor: str, what: str, files: dict[str, Path]) -> None:
    """A row for every single edit whose update is there."""
    edits, pool = edits_of(read_rows(rows), facts, editor)
    bench = Bench(
        open_guard(home=out / "home-again"), editor, pool, SEED,
        more_far=far_texts(files), deltas=out / f"{editor}-deltas",
    )  # fmt: skip
    handle = bench.workspace.handle
    about = {"sentences": SIZES.subject} if what == "subject" else {"far": bench.far.digest}

    def measured_of(request: EditRequest, delta: EditDelta) -> dict[str, Any]:
        return subject_scores(handle, request, delta) if what == "subject" else far_outcome(bench.far, delta)

    file = RowFile(out / f"{editor}-{what}-{SUFFIX}", {"model": handle.digest(), **about})
    measure_solved(bench, edits, file, measured_of)


def measured_rows(path: Path) -> pd.DataFrame:
    """The rows of one file; of damage far from the edit, with the text that it was measured on."""
    header = json.loads(path.read_text("utf-8").splitlines()[0])
    named = {"far_text": header["far"]} if "far" in header else {}
    return pd.DataFrame(lines_of(path)).assign(**named)


def taken_over(rows: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """The table with what was measured again. Raises SystemExit for an edit that the table does not have."""
    found, fresh = rows.set_index(KEYS), again.set_index(KEYS)
    if strange := [key for key in fresh.index if key not in found.index]:
        raise SystemExit(f"the table has no row of {strange[0]}; take the rows that were solved again")
    for name in fresh.columns:
        found.loc[fresh.index, name] = fresh[name]
    new = [name for name in fresh.columns if name not in rows.columns]
    return same_far_text(found.reset_index()[[*rows.columns, *new]])


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
    running.add_argument("--what", choices=("subject", "far"), required=True)
    running.add_argument("--far", action="append", default=[], metavar="DOMAIN=FILE")
    taking = steps.add_parser("into")
    taking.add_argument("rows", type=Path)
    taking.add_argument("--source", type=Path, required=True)
    taking.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "run":
        files = {name: Path(path) for name, path in (one.split("=", 1) for one in args.far)}
        run(args.out, args.rows, args.facts, args.editor, args.what, files)
        return
    table = read_rows(args.rows)
    for path in sorted(args.source.glob(f"*-{SUFFIX}")):
        table = taken_over(table, measured_rows(path))
    write_rows(table, args.to or args.rows)


if __name__ == "__main__":
    main()
