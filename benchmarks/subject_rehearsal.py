"""How many sentences about the subject have to be rehearsed? Each one's own movement, for natural ROME edits.

    python -m benchmarks.subject_rehearsal run OUT --rows docs/data/guard_rows.parquet --facts FILE
    python -m benchmarks.subject_rehearsal keep OUT --to docs/data/subject_rehearsal.parquet
    python -m benchmarks.subject_rehearsal table docs/data/subject_rehearsal.parquet

Of edits whose update is in OUT (`benchmarks.solve_again`), KL(before ‖ rehearsed) of the first 64 prompts that the
guard would rehearse about the subject (a plan takes 32 of them, the monitor 96). Resumable.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.guard_sections import table
from benchmarks.outcome_noise import FORETOLD, KEYS, cells
from benchmarks.solve_again import edits_of, lines_of, measure_solved
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.fitting import log_damage, natural_edits
from guardedit.evaluation.guard.frames import PRED, read_rows
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.compare import Compared, compare
from guardedit.risk.neighbours import NearProbes, ProbeSizes, first_tokens, unfiltered_probes
from guardedit.risk.rehearsal import without_own_relation

SEED, MOST = 0, 64
COUNTS = (8, 16, 32, 48, 64)


def about_subject(handle: ModelHandle, request: EditRequest, delta: EditDelta, most: int) -> list[Compared]:
    """The prompts about the subject that a plan with so many would rehearse, in its order."""
    nobody = NearProbes((), "none")
    texts = unfiltered_probes(handle, request, ProbeSizes(subject=most), SEED, nobody).subject
    found = compare(handle, delta, texts, ["subject"] * len(texts))
    return without_own_relation(found, request, first_tokens(handle, request), most)


def moved(handle: ModelHandle, request: EditRequest, delta: EditDelta, most: int = MOST) -> list[float]:
    """KL of each prompt about the subject."""
    return [one.kl_nats for one in about_subject(handle, request, delta, most)]


def run(out: Path, rows: Path, facts: Path) -> None:
    """A row for every natural edit whose update is there."""
    edits, pool = edits_of(read_rows(rows), facts, "rome", natural=True)
    bench = Bench(open_guard(home=out / "home-subject"), "rome", pool, SEED, deltas=out / "rome-deltas")
    handle = bench.workspace.handle
    file = RowFile(out / "subject.jsonl", {"model": handle.digest(), "most": MOST})

    def sentences(request: EditRequest, delta: EditDelta) -> dict[str, Any]:
        return {"subject": moved(handle, request, delta)}

    measure_solved(bench, edits, file, sentences)


def section_subject(frame: pd.DataFrame, kept: pd.DataFrame) -> str:
    """By the number of prompts: how well their mean KL orders the damage to the subject."""
    measured = kept.rename(columns={"subject": "moved"})  # the table's own column is the subject's name
    edits = natural_edits(frame, "rome").merge(measured, on=KEYS, how="inner")
    damage, groups = np.exp(log_damage(edits, "subject")), edits["relation"].to_numpy()
    means = {
        f"{ProbeSizes().subject}, as the table has it": edits[f"{PRED}rehearsed_subject_kl"].to_numpy(float)
    }
    for count in COUNTS:
        means[str(count)] = np.array([float(np.mean(one[:count])) for one in edits["moved"]])
    body = [[name, *cells([mean], damage, groups)] for name, mean in means.items()]
    return f"{table(('prompts', *FORETOLD), body)}\nn {len(edits)}\n"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "keep", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "run":
        run(args.source, args.rows, args.facts)
    elif args.step == "keep":
        found = pd.DataFrame(lines_of(args.source / "subject.jsonl"))
        found.to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_subject(read_rows(args.rows), pd.read_parquet(args.source)))


if __name__ == "__main__":
    main()
