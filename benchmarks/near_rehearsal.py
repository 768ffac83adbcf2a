"""How many neighbours have to be rehearsed, and which? Each prompt's own movement, for edits tried before.

    python -m benchmarks.near_rehearsal run OUT --facts FILE
    python -m benchmarks.near_rehearsal keep OUT --to docs/data/near_rehearsal.parquet
    python -m benchmarks.near_rehearsal table docs/data/near_rehearsal.parquet

Every natural ROME edit of the guard's table is solved again, and KL(before ‖ rehearsed) of the next token is kept for
each near prompt that the guard rehearses, those that the request names apart, and for up to eighty other subjects of
the relation. Of those, the first twelve are what `near/kl_nats` of the table is the mean of. Resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from guardedit.evaluation.guard.association import Statistic, auroc_worst, figure, spearman
from guardedit.evaluation.guard.fitting import natural_edits
from guardedit.evaluation.guard.frames import OUT, PRED, read_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours, outcome_prompts
from guardedit.evaluation.guard.predictors import seen_by_the_guard
from guardedit.evaluation.guard.rows import NAMED, Bench, keep
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.pipeline import open as open_guard
from guardedit.risk.compare import compare
from guardedit.risk.key_view import views_of
from guardedit.risk.rehearsal import RehearsalView

SEED, MOST = 0, 80
COUNTS = (2, 5, 12, 24)
REPEATS = 20
"""Random draws of so many neighbours a figure."""


def run(out: Path, rows: pd.DataFrame, facts: Path) -> None:
    """A row an edit."""
    guard, case_set = open_guard(home=out / "home-near"), read_cases(facts, "train")
    bench = Bench(guard, "rome", Neighbours.of(case_set.cases), SEED, deltas=out / "rome-deltas")
    by_id = {case.case_id: case for case in case_set.cases}
    file = RowFile(out / "near.jsonl", {"model": guard.handle.digest(), "seed": SEED, "most": MOST})
    done = {row["case_id"] for row in file.load()}
    edits = natural_edits(rows, "rome")
    for number, (case_id, stratum) in enumerate(
        zip(edits["case_id"], edits["stratum"], strict=True), start=1
    ):
        if case_id not in done:
            file.append({"case_id": case_id} | _moved(bench, Chosen(stratum, by_id[case_id])))
            print(f"{number} of {len(edits)}", file=sys.stderr, flush=True)


def _moved(bench: Bench, one: Chosen) -> dict[str, Any]:
    handle, request = bench.workspace.handle, bench.request(one.case)
    delta = bench.solve((request,))
    keep(bench, one, delta)
    context = bench.contexts[bench.layers[0]]
    view = RehearsalView(context, views_of(context, (request,)), delta)
    named = set(request.neighborhood)
    rehearsed = [(one.prompt in named, one.kl_nats) for one in view.of("near")]
    seen, about = seen_by_the_guard(view)
    first = outcome_prompts(handle, request, bench.pool, seen, about, SEED).groups["near"]
    rest = [request.prompt.replace("{}", who) for who in bench.pool.around(request, SEED)]
    others = [prompt for prompt in dict.fromkeys(rest) if prompt not in {*seen, *first}]
    prompts = [*first, *others][:MOST]
    found = compare(handle, delta, prompts, ["near"] * len(prompts))
    return {
        "rehearsed": [kl for _, kl in rehearsed],
        "named": [is_named for is_named, _ in rehearsed],
        "outcome": [one.kl_nats for one in found[: len(first)]],
        "others": [one.kl_nats for one in found[len(first) :]],
    }


def kept(out: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Figures only, with each edit's relation as a number."""
    lines = (out / "near.jsonl").read_text("utf-8").splitlines()[1:]
    relations = dict(zip(rows["case_id"], pd.factorize(rows["relation"])[0], strict=True))
    return pd.DataFrame(
        [row | {"relation": int(relations[row["case_id"]])} for row in map(json.loads, lines)]
    )


# -- figures


def section_rehearsal(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """How well means over prompts of each kind order the outcome, and how well the outcome orders itself; edits with
    enough other subjects only, so that all lines are about the same ones. `rows` are the guard's, for comparison."""
    rng, apart = np.random.default_rng(SEED), _apart(table, rows)
    table = table[[len(own) >= max(COUNTS) for own in table["others"]]].reset_index(drop=True)
    outcome, groups = _means(table["outcome"]), table["relation"].to_numpy().astype(str)
    lines = ["| mean KL over | n | Spearman with the outcome | AUROC, worst tenth |", "|---|---|---|---|"]
    for name, draws in _predictors(table, rng):
        n, *cells = len(table), *(mean_figure(one, draws, outcome, groups) for one in (spearman, auroc_worst))
        lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    agree = float(np.mean([_halves(table["outcome"], rng) for _ in range(REPEATS)]))
    return "\n".join(lines) + (
        f"\n\nTwo halves of the outcome's own prompts agree with a Spearman of {agree:.2f} (mean of {REPEATS} ways to "
        f"halve them), so all with as many others by about {2 * agree / (1 + agree):.2f} (Spearman and Brown). "
        f"Solved again, outcome and rehearsed mean are the guard's table's to {apart:.1e} of their value.\n"
    )


def _apart(table: pd.DataFrame, rows: pd.DataFrame) -> float:
    """Largest relative difference between the means of the kept prompts and what the guard's table has."""
    known = natural_edits(rows, "rome").set_index("case_id").loc[table["case_id"]]
    pairs = ((table["outcome"], f"{OUT}near/kl_nats"), (table["rehearsed"], f"{PRED}rehearsed_near_kl"))
    return max(float(np.abs(_means(own) / known[name].to_numpy() - 1).max()) for own, name in pairs)


def mean_figure(
    statistic: Statistic, draws: Sequence[np.ndarray], outcome: np.ndarray, groups: np.ndarray
) -> str:
    """The statistic with its interval, each the mean over the draws."""
    found = [one for values in draws if (one := figure(statistic, values, outcome, groups, SEED)) is not None]
    value, low, high = (float(np.mean([getattr(one, n) for one in found])) for n in ("value", "low", "high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _predictors(table: pd.DataFrame, rng: np.random.Generator) -> Iterator[tuple[str, list[np.ndarray]]]:
    yield "all that the guard rehearses", [_means(table["rehearsed"])]
    for name, wanted in (
        (f"the {NAMED} that the request names", True),
        ("those that the guard finds", False),
    ):
        pairs = (zip(*one, strict=True) for one in zip(table["rehearsed"], table["named"], strict=True))
        yield name, [_means([[kl for kl, is_named in pair if is_named == wanted] for pair in pairs])]
    for count in COUNTS:
        draws = [
            _means([rng.choice(own, count, replace=False) for own in table["others"]]) for _ in range(REPEATS)
        ]
        yield f"{count} other subjects of the relation, drawn", draws


def _halves(columns: Sequence[Sequence[float]], rng: np.random.Generator) -> float:
    left, right = [], []
    for values in columns:
        order = rng.permutation(len(values))
        half = len(values) // 2
        left.append(_mean([values[i] for i in order[:half]]))
        right.append(_mean([values[i] for i in order[half : 2 * half]]))
    a, b = np.array(left), np.array(right)
    there = np.isfinite(a) & np.isfinite(b)
    return spearman(a[there], b[there])


def _means(columns: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([_mean(values) for values in columns])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


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
    keeping = steps.add_parser("keep")
    keeping.add_argument("out", type=Path)
    keeping.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    keeping.add_argument("--to", type=Path, required=True)
    showing = steps.add_parser("table")
    showing.add_argument("figures", type=Path)
    showing.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    args = parser.parse_args()
    if args.step == "run":
        run(args.out, read_rows(args.rows), args.facts)
    elif args.step == "keep":
        kept(args.out, read_rows(args.rows)).to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_rehearsal(pd.read_parquet(args.figures), read_rows(args.rows)))


if __name__ == "__main__":
    main()
