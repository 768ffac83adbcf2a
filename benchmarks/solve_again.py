"""Solve the single edits of the guard's table again and keep their updates, for scores that came after the rows.

    python -m benchmarks.solve_again docs/data/guard_rows.parquet --facts FILE --out OUT --editor rome

Resumable; an update lies in OUT/<editor>-deltas, where `evaluate guard` puts it too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.reference_bank import read_delta
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.adversarial import adversarial
from guardedit.evaluation.guard.fitting import natural_edits
from guardedit.evaluation.guard.frames import measured, read_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench, keep
from guardedit.evaluation.guard.strata import Chosen, kinds
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest

SEED = 0


def edits_of(
    rows: pd.DataFrame, facts: Path, editor: str, *, natural: bool = False
) -> tuple[list[Chosen], Neighbours]:
    """The table's single edits by one editor as cases, and the pool that their neighbours come from."""
    case_set = read_cases(facts, "train")
    known = (*case_set.cases, *(case for _, case in adversarial()))
    by_id = {str(case.case_id): case for case in known}
    edits = natural_edits(rows, editor) if natural else measured(rows, editor, kinds())
    chosen = [
        Chosen(str(stratum), by_id[str(case_id)])
        for stratum, case_id in zip(edits["stratum"], edits["case_id"], strict=True)
    ]
    return chosen, Neighbours.of(case_set.cases)


def solve(bench: Bench, edits: Sequence[Chosen]) -> None:
    """Keep the update of every edit that is not there yet."""
    for number, one in enumerate(edits, start=1):
        if not delta_file(bench, one).is_file():
            keep(bench, one, bench.solve((bench.request(one.case),)))
        told(number, edits)


def delta_file(bench: Bench, one: Chosen) -> Path:
    """Where `rows.keep` puts it."""
    if bench.deltas is None:
        raise SystemExit("this bench keeps no deltas")
    return bench.deltas / f"{one.stratum}-{one.case.case_id}.safetensors"


def measure_solved(
    bench: Bench,
    edits: Sequence[Chosen],
    file: RowFile,
    measured_of: Callable[[EditRequest, EditDelta], dict[str, Any]],
) -> None:
    """A row for every edit whose update is there, those that the file has not again."""
    done = {(row["stratum"], row["case_id"]) for row in file.load()}
    for number, one in enumerate(edits, start=1):
        path = delta_file(bench, one)
        if (one.stratum, one.case.case_id) not in done and path.is_file():
            about = {"editor": bench.editor, "stratum": one.stratum, "case_id": one.case.case_id}
            file.append(about | measured_of(bench.request(one.case), read_delta(path, bench.editor)))
        told(number, edits)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a row file, without its header."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]


def told(number: int, edits: Sequence[Chosen]) -> None:
    """Say how far it is."""
    print(f"{number} of {len(edits)}", file=sys.stderr, flush=True)


def main() -> None:
    """Solve what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--editor", default="rome")
    args = parser.parse_args()
    edits, pool = edits_of(read_rows(args.rows), args.facts, args.editor)
    bench = Bench(
        open_guard(home=args.out / "home-solved"), args.editor, pool, SEED,
        deltas=args.out / f"{args.editor}-deltas",
    )  # fmt: skip
    solve(bench, edits)


if __name__ == "__main__":
    main()
