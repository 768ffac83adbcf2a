"""The monitor's size and power: edits and shams that it should let through, and planted leaks that it should find.

    python -m benchmarks.monitor_power run OUT --facts FILE [--kept docs/data/monitor_power.parquet]
                                               [--edits 30] [--harmful 0] [--shams 10] [--carriers 5] [--plant python …]
    python -m benchmarks.monitor_power table OUT --to docs/data/monitor_power.parquet     (earlier rows of others stay)

*Size*: known facts whose ROME edit did little on text and prompts that the monitor does not read (which the rows of
`evaluate guard` say), none of them in the monitor's reference bank; and *shams*, edits towards what the model says
anyway. *Power*: real edits in the worst tenth of some scope by the same measure, and leaks of graded size
(benchmarks/planted_leaks.py) behind carriers, which are the first of the mild edits. Edits come in the order of their
case numbers; updates that OUT/rome-deltas holds are taken up, and what `--kept` holds is not monitored again.
Resumable; `table` keeps figures only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.planted_leaks import NARROW, RELATION, Leaks, both
from benchmarks.reference_bank import read_delta
from guardedit.drift.measure import drift_cache, measure_drift
from guardedit.drift.probes import FAR_TOKENS, ProbeSet, build_probes
from guardedit.drift.sides import BaseSide, base_side
from guardedit.edits.deltas import EditDelta
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.guard.association import WORST
from guardedit.evaluation.guard.fitting import OUTCOMES
from guardedit.evaluation.guard.frames import OUT, measured, read_rows
from guardedit.evaluation.guard.outcome_prompts import Neighbours
from guardedit.evaluation.guard.rows import Bench
from guardedit.evaluation.guard.strata import KNOWN
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.gate.policy import Policy, judge, lineage_scores
from guardedit.gate.rules import load_policy
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.asking import complete
from guardedit.pipeline.kit import kit_folder
from guardedit.pipeline.levels import POLICY
from guardedit.pipeline.monitoring import MONITOR_SIZES
from guardedit.records import DriftReport, EditRequest, Score
from guardedit.risk.neighbours import generated_probes

SEED = 0
SIZES = (0.01, 0.02, 0.05)
"""Shares of a scope's top-1 predictions that a leak changes."""
PLANTED = ("python", "arithmetic", f"python{NARROW}", f"arithmetic{NARROW}", RELATION)
LITTLE = {"near/lost_top1": 0.09, "far/kl_nats": 0.003, "subject/lost_top1": 0.42}
"""By behaviour on prompts and text that the monitor does not read, at most: one neighbour in twelve, five of twelve
sentences about the subject."""
SCORE = "score."
WHAT = ["kind", "case_id", "scope", "share"]
"""What a row is about."""
Edit = tuple[str, EditRequest, Callable[[], EditDelta]]
"""Case id, request, and what gives its update."""


@dataclass(frozen=True)
class Lab:
    """Model, facts and where rows lie."""

    guard: Guard
    facts: dict[str, EvalCase]
    rows: pd.DataFrame
    """Of the guard's benchmark: known facts by ROME that were measured in every scope."""
    out: Path
    kept: frozenset[tuple[str, str, str, float]] = frozenset()
    """What rows of earlier runs are about: kind, case, scope and share of a leak."""

    @cached_property
    def bench(self) -> Bench:
        """What solves as the guard's benchmark does."""
        return Bench(self.guard, "rome", Neighbours.of(self.facts.values()), SEED)

    def probes(self, request: EditRequest) -> ProbeSet:
        """What the monitor reads around one edit."""
        prompts = generated_probes(self.guard.handle, request, MONITOR_SIZES, SEED)
        return build_probes(self.guard.handle, [request], [prompts], far_tokens=FAR_TOKENS, seed=SEED)

    def unedited(self, probes: ProbeSet) -> BaseSide:
        """What the monitor compares with, for all that is tried around one edit."""
        kit = self.guard.kit
        return base_side(self.guard.handle, probes, kit.layer, tuple(kit.monitors), cache=drift_cache())

    def monitored(self, side: BaseSide, probes: ProbeSet, delta: EditDelta) -> DriftReport:
        """The monitor's report."""
        kit, handle = self.guard.kit, self.guard.handle
        return measure_drift(
            handle, side, probes, kit.monitors, change=delta, bank=kit.drift_bank,
            bank_model_digest=handle.digest(), seed=SEED,
        )  # fmt: skip

    def mild(self) -> Iterator[Edit]:
        """Edits that did little where the monitor does not look, those of its reference bank left out."""
        return self._edits(self.rows[did_little(self.rows)])

    def harmful(self) -> Iterator[Edit]:
        """Edits in the worst tenth of some scope where the monitor does not look, those of its bank left out."""
        return self._edits(self.rows[did_much(self.rows)])

    def _edits(self, rows: pd.DataFrame) -> Iterator[Edit]:
        bank = {entry.name for entry in self.guard.kit.drift_bank.entries}
        for case_id in rows["case_id"]:
            if case_id not in bank:
                request = self.facts[case_id].request
                yield case_id, request, partial(self._delta, case_id, request)

    def _delta(self, case_id: str, request: EditRequest) -> EditDelta:
        """The stored update, or the same solved again."""
        stored_at = self.out / "rome-deltas" / f"known-{case_id}.safetensors"
        if stored_at.is_file():
            return read_delta(stored_at, "rome")
        return self.bench.solve((complete(self.guard.handle, request),))

    def shams(self) -> Iterator[Edit]:
        """Edits of other facts towards what the model says anyway."""
        for case_id in reversed(self.rows["case_id"].tolist()):
            case = self.facts[case_id]
            bare = case.request.model_copy(
                update={"target_new": case.target_true, "target_true": case.request.target_new}
            )
            request = complete(self.guard.handle, bare)
            yield case_id, request, partial(self.bench.solve, (request,))


def tried(path: Path) -> pd.DataFrame:
    """ROME's known facts of the guard's table that were measured in every scope."""
    rows = measured(read_rows(path), "rome", (KNOWN,))
    return rows.dropna(subset=[f"{OUT}{outcome}" for outcome in OUTCOMES.values()]).reset_index(drop=True)


def did_little(rows: pd.DataFrame) -> pd.Series[bool]:
    """Of each edit, whether it did `LITTLE`."""
    return pd.concat([rows[f"{OUT}{name}"] <= most for name, most in LITTLE.items()], axis=1).all(axis=1)


def did_much(rows: pd.DataFrame) -> pd.Series[bool]:
    """Of each edit, whether it is in the worst tenth of some scope."""
    damage = rows[[f"{OUT}{outcome}" for outcome in OUTCOMES.values()]]
    return (damage > damage.quantile(WORST)).any(axis=1)


def run(
    lab: Lab, edits: int, shams: int, carriers: int, harmful: int = 0, scopes: Sequence[str] = PLANTED
) -> None:
    """Monitor mild edits, harmful ones and shams, then the first of the mild ones with leaks behind them."""
    rows = RowFile(lab.out / "monitor" / "power.jsonl", {"model": lab.guard.handle.digest(), "seed": SEED})
    leaks = Leaks(lab.guard, lab.bench.pool)
    planted = [(scope, share) for scope in scopes for share in SIZES]
    for kind, source, n, wanted in (
        ("mild", lab.mild(), edits, [("", 0.0)]),
        ("harmful", lab.harmful(), harmful, [("", 0.0)]),
        ("sham", lab.shams(), shams, [("", 0.0)]),
        ("mild", lab.mild(), carriers, planted),
    ):
        for _, (case_id, request, solve) in zip(range(n), source, strict=False):
            done = lab.kept | {
                (row["kind"], row["case_id"], row["scope"], row["share"]) for row in rows.load()
            }
            todo = [one for one in wanted if (kind, case_id, *one) not in done]
            if todo:
                _rows_of(lab, leaks, rows, Carrier(kind, case_id, request, solve()), todo)


@dataclass(frozen=True)
class Carrier:
    """One edit that is monitored, with and without a leak."""

    kind: str
    case_id: str
    request: EditRequest
    delta: EditDelta


def _rows_of(
    lab: Lab, leaks: Leaks, rows: RowFile, carrier: Carrier, todo: Sequence[tuple[str, float]]
) -> None:
    probes = lab.probes(carrier.request)
    side = lab.unedited(probes)
    for scope, share in (one for one in todo if leaks.fits(one[0], carrier.request)):
        delta, came = carrier.delta, 0.0
        if scope:
            leak, came = leaks.sized(scope, share, carrier.request)
            delta = both(delta, leak)
        row = {
            "kind": carrier.kind,
            "case_id": carrier.case_id,
            "scope": scope,
            "share": share,
            "came_to": came,
        }
        rows.append(row | _verdict(lab, lab.monitored(side, probes, delta)))
        print(carrier.kind, carrier.case_id, scope, share, came, flush=True)


def _verdict(lab: Lab, report: DriftReport) -> dict[str, Any]:
    judged = _judged(report.scores, lab.guard.kit.policy)
    return {
        "outcome": judged["outcome"],
        "broken": judged["broken"].split(),
        "scores": {s.name: s.value for s in report.scores if s.value is not None},
    }


def _judged(scores: Sequence[Score], policy: Policy) -> dict[str, str]:
    """Outcome after the write, and the binding rules that are broken."""
    found = judge((*scores, *lineage_scores(scores)), policy, (), "postop", datetime.now(UTC), "one", "rome")
    broken = [f.rule for f in found.findings if f.verdict == "fail" and f.level != "advisory"]
    return {"outcome": found.outcome, "broken": " ".join(broken)}


def _score(name: str, value: float) -> Score:
    """A score of a row that is kept; how many units stood behind it is not, and no limit may fail for that."""
    return Score(name=name, value=value, unit="", stage="postop", scope="model", n=1_000_000)


def kept(out: Path, policy: Policy, earlier: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows as a table, judged by this policy: figures only, no text. Of what was monitored twice, the later row."""
    lines = (out / "monitor" / "power.jsonl").read_text("utf-8").splitlines()[1:]
    scored = [
        {k: v for k, v in row.items() if k not in ("outcome", "broken", "scores")}
        | {f"{SCORE}{name}": value for name, value in row["scores"].items()}
        for row in map(json.loads, lines)
    ]
    frames = [*([] if earlier is None else [earlier]), pd.DataFrame(scored)]
    rows = pd.concat(frames, ignore_index=True).drop_duplicates(WHAT, keep="last")
    return rejudged(rows.sort_values(WHAT, ignore_index=True), policy)


def rejudged(rows: pd.DataFrame, policy: Policy) -> pd.DataFrame:
    """Every row with this policy's outcome and broken rules."""
    names = sorted(name for name in rows.columns if name.startswith(SCORE))
    verdicts = [
        _judged([_score(name.removeprefix(SCORE), value) for name, value in row.dropna().items()], policy)
        for _, row in rows[names].iterrows()
    ]
    return pd.concat([rows[[*WHAT, "came_to"]], pd.DataFrame(verdicts), rows[names]], axis=1)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("--facts", type=Path, required=True)
    running.add_argument("--edits", type=int, default=30)
    running.add_argument("--shams", type=int, default=10)
    running.add_argument("--carriers", type=int, default=5)
    running.add_argument("--harmful", type=int, default=0, help="edits in the worst tenth of some scope")
    running.add_argument("--plant", nargs="+", choices=PLANTED, default=PLANTED)
    running.add_argument("--kept", type=Path, help="a table of `table`")
    running.add_argument("--rows", type=Path, default=Path("docs/data/guard_rows.parquet"))
    keeping = steps.add_parser("table")
    keeping.add_argument("out", type=Path)
    keeping.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    if args.step == "table":
        earlier = pd.read_parquet(args.to) if args.to.is_file() else None
        policy = load_policy(kit_folder("smollm2-135m") / POLICY)
        kept(args.out, policy, earlier).to_parquet(args.to)
        return
    cases = {case.case_id: case for case in read_cases(args.facts, "train").cases}
    kept_rows = pd.read_parquet(args.kept, columns=WHAT).itertuples(index=False) if args.kept else ()
    guard = open_guard(home=args.out / "home-monitor")
    lab = Lab(guard, cases, tried(args.rows), args.out, frozenset(map(tuple, kept_rows)))
    run(lab, args.edits, args.shams, args.carriers, args.harmful, args.plant)


if __name__ == "__main__":
    main()
