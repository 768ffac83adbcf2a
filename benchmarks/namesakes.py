"""Are the neighbours that an edit hurts those whose name ends as the edited one's does?

    python -m benchmarks.namesakes run OUT --facts FILE --to docs/data/namesakes.parquet
    python -m benchmarks.namesakes table docs/data/namesakes.parquet

OUT is the folder of `benchmarks.near_rehearsal`, whose stored updates are taken up. Of real neighbours (up to sixty
other subjects of the relation) those that end in the edited subject's last word are held against the others. A *made-up
namesake* has another first word before that last one ("Victoria Glacier" for "Hood Glacier"); nobody has to know such a
name for the key at its last token to be like the edited one's. Each edit's own prompt is rehearsed on a dozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.guard_sections import shown
from benchmarks.near_rehearsal import SEED
from benchmarks.reference_bank import read_delta
from guardedit.evaluation.guard.association import auroc_worst, figure, spearman
from guardedit.evaluation.guard.fitting import natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.readers import read_cases
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.asking import complete
from guardedit.risk.compare import compare

FIRST = (
    "Victoria", "Green", "Hudson", "Miller", "Northern", "Saint Anna", "Golden", "Harper", "Silver", "Oak Hill",
    "Marlow", "Upper",
)  # fmt: skip
"""First words of namesakes, drawn from no data: names of people, colours, directions."""


REAL = 60
"""Real neighbours an edit, those of the same old object first."""
FAR_GONE = 2.0
"""Nats from which on an answer counts as gone."""


def namesakes(subject: str) -> list[str]:
    """Made-up subjects that end in the same word; none for a subject of one word."""
    words = subject.split()
    if len(words) < 2:
        return []
    return [f"{first} {words[-1]}" for first in FIRST if first.split()[0] not in words]


def rows_of(out: Path, table: pd.DataFrame, facts: Path) -> Iterator[dict[str, Any]]:
    """A row an edit: how far each made-up namesake's answer moves, each real one's, and each other neighbour's."""
    guard, case_set = open_guard(home=out / "home-near"), read_cases(facts, "train")
    pool, by_id = Neighbours.of(case_set.cases), {case.case_id: case for case in case_set.cases}
    edits = natural_edits(table, "rome")
    for case_id, stratum in zip(edits["case_id"], edits["stratum"], strict=True):
        request = complete(guard.handle, by_id[case_id].request)
        delta = read_delta(out / "rome-deltas" / f"{stratum}-{case_id}.safetensors", "rome")
        groups: dict[str, list[str]] = {"moved": namesakes(request.subject), "real": [], "others": []}
        for who in pool.around(request, SEED)[:REAL]:
            groups["real" if _last(who) == _last(request.subject) else "others"].append(who)
        asked = [(group, request.prompt.replace("{}", who)) for group, some in groups.items() for who in some]
        found = compare(guard.handle, delta, [prompt for _, prompt in asked], ["near"] * len(asked))
        row: dict[str, Any] = {"case_id": case_id, **{group: [] for group in groups}}
        for (group, _), one in zip(asked, found, strict=True):
            row[group].append(one.kl_nats)
        yield row


def _last(name: str) -> str:
    return name.split()[-1].casefold()


def section_namesakes(moved: pd.DataFrame, table: pd.DataFrame) -> str:
    """Which real neighbours move; then how well made-up namesakes order near damage, beside what the guard rehearses,
    for edits of subjects of two words or more."""
    edits = natural_edits(table, "rome").merge(moved, on="case_id")
    return _real(edits) + "\n" + _made_up(edits)


def _real(edits: pd.DataFrame) -> str:
    lines = [
        f"| real neighbours | edits that have any | neighbours | moved by more than {FAR_GONE:g} nats |",
        "|---|---|---|---|",
    ]
    for name, column in (("that end in the same word", "real"), ("all others", "others")):
        some = edits[[len(values) > 0 for values in edits[column]]]
        shares = np.concatenate([np.asarray(values) > FAR_GONE for values in some[column]]).astype(float)
        relations = np.repeat(
            some["relation"].to_numpy().astype(str), [len(values) for values in some[column]]
        )
        share = figure(lambda a, _: float(a.mean()), shares, shares, relations, SEED)
        moved = f"{shares.sum():.0f}: {shown(share)}"
        lines.append(f"| {name} | {len(some)} | {len(shares)} | {moved} |")
    return "\n".join(lines) + "\n"


def _made_up(edits: pd.DataFrame) -> str:
    edits = edits[[len(values) > 0 for values in edits["moved"]]].reset_index(drop=True)
    outcome, groups = edits[f"{OUT}near/kl_nats"].to_numpy(), edits["relation"].to_numpy().astype(str)
    own = np.array([np.mean(values) for values in edits["moved"]])
    guard = edits[f"{PRED}rehearsed_near_kl"].to_numpy()
    lines = ["| mean KL over | n | Spearman with near damage | AUROC, worst tenth |", "|---|---|---|---|"]
    for name, values in (
        ("the 24 that the guard rehearses", guard),
        ("a dozen made-up namesakes", own),
        ("both (the geometric mean)", np.sqrt(own * guard)),
    ):
        cells = (shown(figure(one, values, outcome, groups, SEED)) for one in (spearman, auroc_worst))
        lines.append(f"| {name} | {len(edits)} | {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\nMedian over edits of the mean over made-up namesakes: {np.median(own):.1f} nats; above 1 nat in "
        f"{np.mean(own > 1):.2f} of the edits (near damage in the table: {np.median(outcome):.4f} and "
        f"{np.mean(outcome > 1):.2f}).\n"
    )


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    table = read_rows(args.rows)
    if args.step == "run":
        found = pd.DataFrame(rows_of(args.source, table, args.facts))
        found.to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_namesakes(pd.read_parquet(args.source), table))


if __name__ == "__main__":
    main()
