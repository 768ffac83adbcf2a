"""How well would damage foretell itself? Every outcome measured a second time, on as much that is new.

    python -m benchmarks.outcome_noise run OUT --rows docs/data/guard_rows.parquet --facts FILE
                                               --far fiction=FILE --far encyclopedia=FILE
    python -m benchmarks.outcome_noise keep OUT --to docs/data/outcome_noise.parquet
    python -m benchmarks.outcome_noise table docs/data/outcome_noise.parquet

For natural ROME edits whose update is in OUT (`benchmarks.solve_again`): far on other rows of the same six kinds of
text, the subject in twelve other sentences. Near is measured a second time by `benchmarks.near_rehearsal`. What the two
measurements have in common is the edit's, the rest the sample's: a score that knew the true damage would agree with
either by about the root of what they agree by. Resumable.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.near_rehearsal import REPEATS, mean_figure
from benchmarks.solve_again import edits_of, lines_of, measure_solved
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.guard.association import auroc_worst, spearman
from guardedit.evaluation.guard.far_sample import TOKENS, FarSample
from guardedit.evaluation.guard.features import MEANT
from guardedit.evaluation.guard.findings import avoided, inside
from guardedit.evaluation.guard.fitting import OUTCOMES, cross_validated, log_damage, natural_edits
from guardedit.evaluation.guard.frames import read_rows
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.corpus import read_texts
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest, Scope
from guardedit.risk.compare import compare
from guardedit.risk.stems import article_of

SEED, FIFTH, PASSED = 0, 0.2, 40
"""Of text from files, so many pieces are passed over: the outcome was measured on the first."""
FORETOLD = ("Spearman", "AUROC, worst tenth", "inside a relation", "stopping a fifth avoids")
KEYS = ["editor", "stratum", "case_id"]
SAID_AGAIN = (
    "My neighbour is writing a book about {} and told me that",
    "On the radio they spoke of {} for an hour, and then",
    "I could never explain to my children why {} is",
    "In an old encyclopedia the entry on {} starts with",
    "What surprised the visitors most about {} was the",
    "A postcard that shows {} usually has a",
    "The second question in the quiz was about {}, and the answer was",
    "Compared with others, {} is rather",
    "Long ago people believed that {} had",
    "The lecture on {} lasted two hours and covered",
    "Q: Name one colour that goes with {}.\nA:",
    "Before the war, {} was mostly known for",
)  # fmt: skip
"""Of the subject, worded as neither the outcome nor the rehearsal is."""


def second_text(handle: ModelHandle, files: dict[str, Path]) -> dict[str, list[str]]:
    """Text of the outcome's domains that the outcome was not measured on."""
    found = {}
    for domain in DOMAINS:
        first = set(control_texts(handle, domain, 2 * TOKENS, SEED, half="test"))
        more = control_texts(handle, domain, 8 * TOKENS, SEED, half="test")
        found[domain] = [text for text in more if text not in first]
    return found | {name: list(read_texts(path))[PASSED:] for name, path in files.items()}


def run(out: Path, rows: Path, facts: Path, files: dict[str, Path]) -> None:
    """A row for every natural edit whose update is there."""
    edits, pool = edits_of(read_rows(rows), facts, "rome", natural=True)
    bench = Bench(open_guard(home=out / "home-noise"), "rome", pool, SEED, deltas=out / "rome-deltas")
    handle = bench.workspace.handle
    far = FarSample.only(handle, min(bench.layers), SEED, second_text(handle, files))
    file = RowFile(out / "noise.jsonl", {"model": handle.digest(), "far": far.digest})

    def again(request: EditRequest, delta: EditDelta) -> dict[str, Any]:
        who = article_of(request) + request.subject
        said = [stem.replace("{}", who) for stem in SAID_AGAIN]
        found = compare(handle, delta, said, ["subject"] * len(said))
        return {"subject": [one.kl_nats for one in found], "far": far.moves(delta)["kl_nats"]}

    measure_solved(bench, edits, file, again)


def seconds(scope: Scope, edits: pd.DataFrame, kept: pd.DataFrame, near: pd.DataFrame) -> list[np.ndarray]:
    """The scope's damage measured a second time, one or several ways; NaN where it was not."""
    if scope != "near":
        found = edits[KEYS].merge(kept, on=KEYS, how="left")[scope]
        return [np.array([np.mean(one) for one in found], dtype=float)]
    rng, others = np.random.default_rng(SEED), near.set_index("case_id")["others"]
    enough = {case: own for case, own in others.items() if len(own) >= 12}
    return [
        np.array(
            [
                float(np.mean(rng.choice(enough[case], 12, replace=False))) if case in enough else np.nan
                for case in edits["case_id"]
            ]
        )
        for _ in range(REPEATS)
    ]


def section_noise(frame: pd.DataFrame, kept: pd.DataFrame, near: pd.DataFrame) -> str:
    """By scope: how well a second measurement foretells the outcome, and how well the guard does on the same edits."""
    edits = natural_edits(frame, "rome")
    groups, head = edits["relation"].to_numpy(), ("scope", "n", "foretold by", *FORETOLD)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for scope in OUTCOMES:
        damage, again = np.exp(log_damage(edits, scope)), seconds(scope, edits, kept, near)
        there = np.isfinite(again[0])
        guard = np.exp(cross_validated(edits, scope, MEANT[scope], SEED).log_expected)
        for name, draws in (("a second measurement", again), ("the guard, before the write", [guard])):
            found = cells([one[there] for one in draws], damage[there], groups[there])
            lines.append(f"| {scope} | {int(there.sum())} | {name} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def cells(draws: Sequence[np.ndarray], damage: np.ndarray, groups: np.ndarray) -> list[str]:
    """How well something foretells the damage, the mean over its draws: Spearman and AUROC with their intervals,
    Spearman inside a relation, and the share avoided by stopping the riskiest fifth."""
    inner = [found for one in draws if (found := inside(one, damage, groups)) is not None]
    share = [avoided(one, damage)[round(FIFTH * len(damage))] for one in draws]
    within = f"{np.mean([one['value'] for one in inner]):.2f}" if inner else "–"
    overall = (mean_figure(one, draws, damage, groups) for one in (spearman, auroc_worst))
    return [*overall, within, f"{np.mean(share):.2f}"]


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "keep", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    parser.add_argument("--near", type=Path, default=Path("docs/data/near_rehearsal.parquet"))
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--far", action="append", default=[], metavar="DOMAIN=FILE")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    if args.step == "run":
        files = {name: Path(path) for name, path in (one.split("=", 1) for one in args.far)}
        run(args.source, args.rows, args.facts, files)
    elif args.step == "keep":
        found = pd.DataFrame(lines_of(args.source / "noise.jsonl"))
        found.to_parquet(args.to, compression="zstd", index=False)
    else:
        print(section_noise(read_rows(args.rows), pd.read_parquet(args.source), pd.read_parquet(args.near)))


if __name__ == "__main__":
    main()
