"""Are the neighbours that an edit hurts those whose name ends as the edited one's does?

    python -m benchmarks.namesakes run OUT --facts FILE --to docs/data/namesakes.parquet
    python -m benchmarks.namesakes table docs/data/namesakes.parquet

OUT is a folder of `evaluate guard` or of `benchmarks.near_rehearsal`: edits whose update is stored there are looked
at, the others keep the row that they have. Of real neighbours (up to sixty other subjects of the relation) those that
end in the edited subject's last word are held against the others. A *made-up namesake* has another first word before
that last one ("Victoria Glacier" for "Hood Glacier"); nobody has to know such a name for the key at its last token to
be like the edited one's. Each edit's own prompt is rehearsed on the dozen that the guard reads, on a dozen that it does
not, and on up to a dozen real subjects of any relation that end in the same word.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.guard_sections import shown
from benchmarks.near_rehearsal import SEED
from benchmarks.reference_bank import read_delta
from guardedit.edits.namesakes import SPARED, namesakes
from guardedit.evaluation.guard.association import auroc_worst, figure, spearman
from guardedit.evaluation.guard.fitting import natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.readers import read_cases
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.asking import complete
from guardedit.records import EditRequest
from guardedit.risk.compare import compare

REAL = 60
"""Real neighbours an edit, those of the same old object first."""
ANYWHERE = 12
"""Real subjects of any relation that end in the same word."""
FAR_GONE = 2.0
"""Nats from which on an answer counts as gone."""


def rows_of(out: Path, table: pd.DataFrame, facts: Path) -> Iterator[dict[str, Any]]:
    """A row for each edit whose update is stored: how far the answer moves for each subject of each group, in nats."""
    guard, case_set = open_guard(home=out / "home-near"), read_cases(facts, "train")
    pool, by_id = Neighbours.of(case_set.cases), {case.case_id: case for case in case_set.cases}
    subjects = sorted({case.request.subject for case in case_set.cases})
    edits = natural_edits(table, "rome")
    for case_id, stratum in zip(edits["case_id"], edits["stratum"], strict=True):
        stored = out / "rome-deltas" / f"{stratum}-{case_id}.safetensors"
        if not stored.is_file():
            continue
        request = complete(guard.handle, by_id[case_id].request)
        groups = groups_of(request, pool, subjects)
        asked = [(group, request.prompt.replace("{}", who)) for group, some in groups.items() for who in some]
        delta = read_delta(stored, "rome")
        found = compare(guard.handle, delta, [prompt for _, prompt in asked], ["near"] * len(asked))
        row: dict[str, Any] = {"case_id": case_id, **{group: [] for group in groups}}
        for (group, _), one in zip(asked, found, strict=True):
            row[group].append(one.kl_nats)
        yield row


def groups_of(request: EditRequest, pool: Neighbours, subjects: Sequence[str]) -> dict[str, list[str]]:
    """Subjects by group: made-up namesakes that the guard reads (`moved`) and others, real neighbours that are
    namesakes (`real`) and not, real namesakes of any relation."""
    around, own = list(pool.around(request, SEED))[:REAL], request.subject
    alike = [who for who in subjects if _last(who) == _last(own) and who != own] if namesakes(own) else []
    return {
        "moved": list(namesakes(own)),
        "unread": list(namesakes(own, SPARED)),
        "real": [who for who in around if _last(who) == _last(own)],
        "others": [who for who in around if _last(who) != _last(own)],
        "anywhere": random.Random(SEED).sample(alike, min(ANYWHERE, len(alike))),
    }


def _last(name: str) -> str:
    return name.split()[-1].casefold()


def section_namesakes(moved: pd.DataFrame, table: pd.DataFrame) -> str:
    """Which real neighbours move; then how well made-up namesakes order near damage, beside what the guard rehearses,
    for edits of subjects of two words or more."""
    edits = natural_edits(table, "rome").merge(moved, on="case_id")
    return _real(edits) + "\n" + _made_up(edits) + "\n" + _foretold(edits)


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


def _foretold(edits: pd.DataFrame) -> str:
    """How well the dozen that the guard reads foretells namesakes that it does not."""
    lines = ["| damage to | n | Spearman | AUROC, worst tenth | median, nats |", "|---|---|---|---|---|"]
    for name, column in (
        ("another dozen made-up namesakes", "unread"),
        ("real namesakes of any relation", "anywhere"),
    ):
        some = edits[[len(_known(a)) > 0 and len(_known(b)) > 0
                      for a, b in zip(edits["moved"], edits[column], strict=True)]]  # fmt: skip
        read, damage = (
            np.array([np.mean(values) for values in some[one]], dtype=float) for one in ("moved", column)
        )
        groups = some["relation"].to_numpy().astype(str)
        cells = [shown(figure(one, read, damage, groups, SEED)) for one in (spearman, auroc_worst)]
        middle = f"{np.median(damage):.1f}" if len(damage) else "–"
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} | {middle} |")
    return "\n".join(lines) + "\n"


def _known(values: Any) -> Any:
    """Nothing where the row is from before there was this column."""
    return () if values is None or np.ndim(values) == 0 else values


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
        if args.to.is_file():
            before = pd.read_parquet(args.to)
            found = pd.concat([before[~before["case_id"].isin(found["case_id"])], found], ignore_index=True)
        found.to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_namesakes(pd.read_parquet(args.source), table))


if __name__ == "__main__":
    main()
