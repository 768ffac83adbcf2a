"""How well would damage foretell itself? Every outcome measured a second time, on as much that is new.

    python -m benchmarks.outcome_noise run OUT --rows docs/data/guard_rows.parquet --facts FILE
                                               --far fiction=FILE --far encyclopedia=FILE
    python -m benchmarks.outcome_noise keep OUT --to docs/data/outcome_noise.parquet
    python -m benchmarks.outcome_noise table docs/data/outcome_noise.parquet

For natural ROME edits whose update is in OUT (`benchmarks.solve_again`): far on other rows of the same six kinds of
text, the subject in twelve other sentences. Near is measured a second time by `benchmarks.near_rehearsal`. No score of
an edit can be expected to say more of a measurement than a second measurement of the same thing does. Resumable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.near_rehearsal import REPEATS
from benchmarks.reference_bank import read_delta
from benchmarks.solve_again import delta_file, edits_of, told
from guardedit.evaluation.guard.association import Statistic, auroc_worst, figure, spearman
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
from guardedit.records import Scope
from guardedit.risk.compare import compare
from guardedit.risk.stems import article_of

SEED, FIFTH, PASSED = 0, 0.2, 40
"""Of text from files, so many pieces are passed over: the outcome was measured on the first."""
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
    done = {(row["stratum"], row["case_id"]) for row in file.load()}
    for number, one in enumerate(edits, start=1):
        path = delta_file(bench, one)
        if (one.stratum, one.case.case_id) not in done and path.is_file():
            delta, request = read_delta(path, "rome"), bench.request(one.case)
            who = article_of(request) + request.subject
            said = [stem.replace("{}", who) for stem in SAID_AGAIN]
            kls = [found.kl_nats for found in compare(handle, delta, said, ["subject"] * len(said))]
            about = {"editor": "rome", "stratum": one.stratum, "case_id": one.case.case_id}
            file.append(about | {"subject": kls, "far": far.moves(delta)["kl_nats"]})
        told(number, edits)


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
    head = (
        "scope", "n", "foretold by", "Spearman", "AUROC, worst tenth", "inside a relation", "stopping a fifth avoids",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for scope in OUTCOMES:
        again = seconds(scope, edits, kept, near)
        there = np.isfinite(again[0])
        guard = np.exp(cross_validated(edits, scope, MEANT[scope], SEED).log_expected)
        for name, draws in (("a second measurement", again), ("the guard, before the write", [guard])):
            cells = _cells(edits[there], scope, [one[there] for one in draws])
            lines.append(f"| {scope} | {int(there.sum())} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(edits: pd.DataFrame, scope: Scope, draws: Sequence[np.ndarray]) -> list[str]:
    damage, groups = np.exp(log_damage(edits, scope)), edits["relation"].to_numpy()
    inner = [found for one in draws if (found := inside(one, damage, groups)) is not None]
    share = [avoided(one, damage)[round(FIFTH * len(damage))] for one in draws]
    within = f"{np.mean([one['value'] for one in inner]):.2f}" if inner else "–"
    return [
        *(_mean_figure(one, draws, damage, groups) for one in (spearman, auroc_worst)),
        within,
        f"{np.mean(share):.2f}",
    ]


def _mean_figure(
    statistic: Statistic, draws: Sequence[np.ndarray], damage: np.ndarray, groups: np.ndarray
) -> str:
    found = [one for own in draws if (one := figure(statistic, own, damage, groups, SEED)) is not None]
    value, low, high = (
        float(np.mean([getattr(one, name) for one in found])) for name in ("value", "low", "high")
    )
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


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
        lines: list[Any] = (args.source / "noise.jsonl").read_text("utf-8").splitlines()[1:]
        pd.DataFrame([json.loads(line) for line in lines]).to_parquet(
            args.to, compression="zstd", index=False
        )
    else:
        print(section_noise(read_rows(args.rows), pd.read_parquet(args.source), pd.read_parquet(args.near)))


if __name__ == "__main__":
    main()
