"""What follows from a ROME edit on the default model, and whether anything measured before the write foretells it.

    python -m benchmarks.ripples run OUT --facts FILE [--edits 45]
    python -m benchmarks.ripples measure OUT --facts FILE --to docs/data/ripples.parquet
    python -m benchmarks.ripples table docs/data/ripples.parquet

FILE is KnowEdit's wiki_counterfact_train. `run` solves and scores facts that have questions about what follows, those
that the model knows first, at most fourteen a relation of either kind, as `evaluate guard` does (resumable); `measure`
asks each stored edit its questions: the answer's probability and whether it is said, before and after, and how far the
next-token distribution moves. The editor and the guard see none of the questions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.guard_sections import shown, table
from benchmarks.reference_bank import read_delta
from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import FOLLOWS, CaseSet, EvalCase, Question
from guardedit.evaluation.guard.association import figure, spearman
from guardedit.evaluation.guard.frames import PRED
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench, run_rows
from guardedit.evaluation.guard.strata import KNOWN, UNKNOWN, Chosen, chosen_edits
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.risk.compare import compare

SEED = 0
EDITOR = "rome"
STRATA = (KNOWN, UNKNOWN)
A_RELATION = 14
A_GROUP = 4
"""Questions of a group, an edit."""
SHOWN = 6
GROUPS = {
    "subject_aliasing": "the edit, by another name of the subject",
    "reasoning": "one step further",
    "logical_generalization": "what else follows about the subject and the objects",
    "relation_specificity": "the subject's other facts",
    "forgetfulness": "other objects of the same relation, which stay true",
}
ENTAILED = ("reasoning", "logical_generalization")
"""Groups that an edit entails in other words than its own."""


def candidates(case_set: CaseSet) -> CaseSet:
    """Facts with a question about what follows."""
    cases = tuple(case for case in case_set.cases if any(q.group in ENTAILED for q in case.questions))
    return replace(case_set, cases=cases)


def run(out: Path, facts: Path, edits: int) -> None:
    """A row an edit, and its update: what the model knows first, then facts that it does not."""
    guard, case_set = open_guard(home=out / "home"), read_cases(facts)
    bench = Bench(guard, EDITOR, Neighbours.of(case_set.cases), SEED, deltas=out / f"{EDITOR}-deltas")
    some, left = candidates(case_set), edits
    for stratum in STRATA:
        chosen = spread(list(chosen_edits(guard.handle, some, stratum, len(some.cases), SEED)))[:left]
        left -= len(chosen)
        run_rows(bench, chosen, RowFile(out / f"{EDITOR}-{stratum}.jsonl", bench.header()))


def spread(edits: Sequence[Chosen]) -> list[Chosen]:
    """In their order, at most `A_RELATION` of each relation."""
    seen: Counter[str] = Counter()
    kept = []
    for one in edits:
        seen[one.case.request.prompt] += 1
        if seen[one.case.request.prompt] <= A_RELATION:
            kept.append(one)
    return kept


def measure(out: Path, facts: Path) -> Iterator[dict[str, Any]]:
    """A row a question of every stored edit."""
    handle = open_guard(home=out / "home").handle
    cases = {case.case_id: case for case in read_cases(facts).cases}
    rows = [
        json.loads(line)
        for stratum in STRATA
        for line in (out / f"{EDITOR}-{stratum}.jsonl").read_text("utf-8").splitlines()[1:]
    ]
    for row in rows:
        stored = out / f"{EDITOR}-deltas" / f"{row['stratum']}-{row['case_id']}.safetensors"
        if row["error"] is None and stored.is_file():
            about = {name: row[name] for name in ("editor", "stratum", "case_id", "relation")}
            about |= {f"{PRED}{name}": value for name, value in row["predictors"].items()}
            for found in answers(handle, read_delta(stored, EDITOR), questions(cases[row["case_id"]])):
                yield about | found


def questions(case: EvalCase) -> list[Question]:
    """At most `A_GROUP` of each group that has an answer."""
    rng = random.Random(f"{SEED}/{case.case_id}")
    found = []
    for group in GROUPS:
        some = [q for q in case.questions if q.group == group and q.answers]
        found += rng.sample(some, min(A_GROUP, len(some)))
    return found


def answers(handle: ModelHandle, delta: EditDelta, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Whether any accepted answer is said before and after the edit, what the first one gains, and the divergence."""
    pairs = [(one.prompt, answer) for one in asked for answer in one.answers]
    before = score_pairs(handle, pairs)
    with rehearsed(handle, delta):
        after = score_pairs(handle, pairs)
    moved = compare(handle, delta, [one.prompt for one in asked], ["entailed"] * len(asked))
    rows, at = [], 0
    for one, divergence in zip(asked, moved, strict=True):
        end = at + len(one.answers)
        was, now = before[at].logprob, after[at].logprob
        rows.append({
            "group": one.group, "kl_nats": divergence.kl_nats,
            "says_before": any(s.greedy for s in before[at:end]), "says_after": any(s.greedy for s in after[at:end]),
            "gain_nats": None if was is None or now is None else now - was,
        })  # fmt: skip
        at = end
    return rows


def section_ripples(rows: pd.DataFrame) -> str:
    """Shares by group, then which scores order how far entailed answers move."""
    body = []
    for group, words in GROUPS.items():
        some = rows[rows["group"] == group]
        if len(some):
            relations = some["relation"].to_numpy().astype(str)
            figures = (
                shown(figure(lambda a, _: float(a.mean()), *[some[name].to_numpy(dtype=float)] * 2, relations, SEED))
                for name in ("says_before", "says_after", "gain_nats", "kl_nats")
            )  # fmt: skip
            body.append([words, str(len(some)), str(some["case_id"].nunique()), *figures])
    head = (
        "what is asked",
        "questions",
        "edits",
        "right before",
        "right after",
        "log P gained, nats",
        "divergence, nats",
    )
    follows = [group for group in GROUPS if group in FOLLOWS]
    note = (
        f"\nIn the first {len(follows)} rows *right* is what follows from the edit, in the others what was right "
        "before it.\n"
    )
    return table(head, body) + note + "\n" + _foretold(rows)


def _foretold(rows: pd.DataFrame) -> str:
    """By edit: what orders how far the entailed answers move."""
    some = rows[rows["group"].isin(ENTAILED)]
    edits = some.groupby("case_id").agg({**{c: "first" for c in rows if c.startswith(PRED)}, "relation": "first",
                                         "kl_nats": "mean"})  # fmt: skip
    outcome, relations = edits["kl_nats"].to_numpy(), edits["relation"].to_numpy().astype(str)
    found = {
        c.removeprefix(PRED): figure(spearman, edits[c].to_numpy(dtype=float), outcome, relations, SEED)
        for c in edits if c.startswith(PRED)
    }  # fmt: skip
    ordered = sorted(
        ((name, one) for name, one in found.items() if one is not None and np.isfinite(one.value)),
        key=lambda pair: -abs(pair[1].value),
    )
    first = [name for name, _ in ordered[:SHOWN]]
    body = [
        [f"`{name}`", shown(one)] for name, one in ordered if name in first or name == "rehearsed_entailed_kl"
    ]
    mean = estimate(outcome.tolist(), SEED)
    said = "–" if mean is None else f"{mean.value:.2f} ({mean.low:.2f} to {mean.high:.2f})"
    return table(
        (f"score, before the write (n {len(edits)})", "Spearman with the divergence of entailed answers"),
        body,
    ) + (f"\nMean divergence of an edit's entailed answers: {said} nats.\n")


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "measure", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--edits", type=int, default=45)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "run":
        run(args.source, args.facts, args.edits)
    elif args.step == "measure":
        pd.DataFrame(measure(args.source, args.facts)).to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_ripples(pd.read_parquet(args.source)))


if __name__ == "__main__":
    main()
