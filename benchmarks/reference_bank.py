"""The bank of real edits that limits and percentiles come from, and ROME's table, in one pass over the same facts.

    python -m benchmarks.reference_bank solve  --data ../shared/data --out OUT [--shard 0/2]
    python -m benchmarks.reference_bank scores --data ../shared/data --out OUT [--shard 0/2]
    python -m benchmarks.reference_bank rescore --data ../shared/data --out OUT      (after other SAEs)
    python -m benchmarks.reference_bank drift  --data ../shared/data --out OUT --edits 24
    python -m benchmarks.reference_bank write  --data ../shared/data --out OUT

Facts: CounterFact `train`, true object known to the model, drawn by seed 0; neighbours from `train` alone. Every step
is resumable: what lies in OUT is not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardedit.drift.measure import drift_cache, measure_drift
from guardedit.drift.null import BankEdit, build_null_bank, save_bank
from guardedit.drift.probes import FAR_TOKENS, build_probes
from guardedit.drift.sides import base_side
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, decode, encode
from guardedit.edits.inputs import SolveInputs
from guardedit.evaluation.datasets import plain, with_contexts
from guardedit.evaluation.readers import EvalCase, choose, read_cases, with_neighbours
from guardedit.evaluation.run import Job, measure_case, select
from guardedit.evaluation.state import CaseResult
from guardedit.evaluation.summary import markdown, summarise
from guardedit.gate.reference import ReferenceBank
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.kit import DRIFT_BANK, PREOP_BANK, write_kit
from guardedit.pipeline.measuring import risk_context
from guardedit.pipeline.monitoring import MONITOR_SIZES
from guardedit.records import DeltaRecord, DriftReport, EditRequest, RiskReport, canonical, digest_of_bytes
from guardedit.risk.delta_stage import measure_delta
from guardedit.risk.measure import measure, measure_key
from guardedit.risk.neighbours import generated_probes

SEED = 0
NEIGHBOURS = 5
PROTOCOL = (
    "CounterFact train, true object known to the model (greedy), drawn by seed 0; neighbours: other subjects of the "
    "same relation and object from train"
)


def cases_of(guard: Guard, data: Path, out: Path, n: int) -> list[EvalCase]:
    """The facts of the bank, in order; chosen once and kept in a file."""
    path = out / "cases.jsonl"
    if path.is_file():
        return [EvalCase.model_validate_json(line) for line in path.read_text().splitlines()][:n]
    case_set = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", "train")
    chosen = select(guard.handle, choose(case_set.cases, SEED), limit=n, known_only=True)
    cases = with_neighbours(chosen.cases, NEIGHBOURS, case_set.cases, SEED)
    path.write_text("\n".join(canonical(case).decode() for case in cases) + "\n")
    (out / "n_seen").write_text(str(chosen.n_seen))
    return list(cases)


def solve(guard: Guard, cases: list[EvalCase], out: Path, editor: str) -> None:
    """Solve, evaluate and store each edit."""
    settings = with_contexts(guard.handle, guard.kit.settings(editor), SEED)
    inputs = SolveInputs(guard.kit.second_moments, SEED, guard.kit.saes)
    for case in cases:
        done = out / editor / f"{case.case_id}.json"
        if done.is_file():
            continue
        solved: list[EditDelta] = []

        def run(
            handle: Any, requests: tuple[EditRequest, ...], solved: list[EditDelta] = solved
        ) -> EditDelta:
            solved[:] = [EDITORS[editor].solve(handle, requests, settings, inputs)]
            return solved[0]

        result = measure_case(guard.handle, case, Job(editor, run, variants=("raw", "chat")))
        done.parent.mkdir(parents=True, exist_ok=True)
        if solved:
            (done.parent / f"{case.case_id}.safetensors").write_bytes(encode(solved[0]))
        done.write_bytes(canonical(result))


def stored(out: Path, editor: str, case: EvalCase) -> EditDelta | None:
    """A solved delta from its file."""
    path = out / editor / f"{case.case_id}.safetensors"
    return read_delta(path, editor) if path.is_file() else None


def read_delta(path: Path, editor: str) -> EditDelta:
    """A delta from a file that no plan names."""
    data, zero = path.read_bytes(), "sha256:" + "0" * 64
    digest = digest_of_bytes(data)
    return decode(
        data, DeltaRecord(editor=editor, changes=(), file_digest=digest, hparams={}, model_digest=zero)
    )


def with_probes(case: EvalCase) -> EditRequest:
    """The request with the case's neighbours, as a careful proposer would name them."""
    return case.request.model_copy(update={"neighborhood": case.neighborhood[:NEIGHBOURS]})


def scores(guard: Guard, cases: list[EvalCase], out: Path, editor: str) -> None:
    """Measure each stored delta's risk."""
    context = risk_context(guard)
    folder = out / f"{editor}-risk"
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        delta = stored(out, editor, case)
        path = folder / f"{case.case_id}.json"
        if delta is not None and not path.is_file():
            path.write_bytes(canonical(measure(context, [with_probes(case)], delta)))


def rescore(guard: Guard, cases: list[EvalCase], out: Path, editor: str) -> None:
    """Measure the scores of key and delta again, with the SAEs as they are now; the rehearsal stays."""
    context = risk_context(guard)
    for case in cases:
        path = out / f"{editor}-risk" / f"{case.case_id}.json"
        delta = stored(out, editor, case)
        if delta is None or not path.is_file():
            continue
        report, request = RiskReport.model_validate_json(path.read_bytes()), with_probes(case)
        fresh = (*measure_key(context, request).scores, *measure_delta(context, [request], delta).scores)
        kept = tuple(score for score in report.scores if score.stage == "rehearsal")
        path.write_bytes(canonical(report.model_copy(update={"scores": (*fresh, *kept)})))


def drift(guard: Guard, cases: list[EvalCase], out: Path, editor: str, n: int) -> None:
    """Measure what the first `n` edits do, on the monitor's default probes."""
    hooks = tuple(guard.kit.monitors)

    def report(edit: BankEdit, delta: EditDelta) -> DriftReport:
        probes = build_probes(guard.handle, edit.requests, edit.prompts, far_tokens=FAR_TOKENS, seed=SEED)
        side = base_side(guard.handle, probes, guard.kit.layer, hooks, cache=drift_cache())
        return measure_drift(guard.handle, side, probes, guard.kit.monitors, change=delta, seed=SEED)

    bank = build_null_bank(
        guard.handle,
        list(bank_edits(guard, cases[:n], out, editor)),
        report,
        out / f"{editor}-drift.jsonl",
        layer=guard.kit.layer,
        hook_names=hooks,
        far_tokens=FAR_TOKENS,
        note=PROTOCOL,
    )
    save_bank(bank, guard.kit.folder / DRIFT_BANK)


def bank_edits(guard: Guard, cases: list[EvalCase], out: Path, editor: str) -> Iterator[BankEdit]:
    """The stored deltas as the drift bank wants them."""
    for case in cases:
        delta = stored(out, editor, case)
        if delta is None:
            continue
        request = with_probes(case)
        prompts = generated_probes(guard.handle, request, MONITOR_SIZES, SEED)
        yield BankEdit(case.case_id, "real", (request,), (prompts,), lambda delta=delta: delta)


def write(guard: Guard, cases: list[EvalCase], out: Path, editor: str) -> None:
    """Collect what has been measured into the kit, and ROME's table where `solve` evaluated the edits."""
    write_bank(guard, out, editor)
    results = [
        CaseResult.model_validate_json(path.read_bytes())
        for case in cases
        if (path := out / editor / f"{case.case_id}.json").is_file()
    ]
    if results:
        write_table(guard, results, out, editor)


def write_bank(guard: Guard, out: Path, editor: str) -> None:
    """The values of every score, by name, into the kit."""
    values: dict[str, list[float]] = {}
    reports = sorted((out / f"{editor}-risk").glob("*.json"))
    for path in reports:
        for score in RiskReport.model_validate_json(path.read_bytes()).scores:
            if score.value is not None:
                values.setdefault(f"preop/{score.name}", []).append(score.value)
    bank = ReferenceBank(
        model=guard.handle.name,
        editor=editor,
        layer=guard.kit.layer,
        n=len(reports),
        seed=SEED,
        protocol=PROTOCOL,
        values={name: tuple(sorted(found)) for name, found in sorted(values.items())},
    )
    (guard.kit.folder / PREOP_BANK).write_bytes(json.dumps(bank.model_dump(), indent=0).encode() + b"\n")
    plain_hparams = {name: dict(settings) for name, settings in guard.kit.hparams.items()}
    write_kit(guard.kit.folder, layer=guard.kit.layer, hparams=plain_hparams)


def write_table(guard: Guard, results: list[CaseResult], out: Path, editor: str) -> None:
    """The editor's table beside them."""
    about = {
        "model": guard.handle.name,
        "editor": editor,
        "hparams": plain(guard.kit.settings(editor)),
        "dataset": PROTOCOL,
        "prompts": ["raw", "chat"],
        "editor_seed": SEED,
    }
    seen = int((out / "n_seen").read_text())
    found = summarise(results, about=about, n_seen=seen, seconds=sum(r.seconds for r in results), seed=SEED)
    (out / f"{editor}.md").write_text(markdown(found))
    (out / f"{editor}.evaluation.json").write_text(json.dumps(found.as_json(), indent=1))


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("solve", "scores", "rescore", "drift", "write"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--facts", type=int, default=120)
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--shard", default="0/1", help="this part of how many, e.g. 0/2")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    guard = open_guard(home=args.out / "home")
    cases = cases_of(guard, args.data, args.out, args.facts)
    part, parts = map(int, args.shard.split("/"))
    mine = cases[part::parts]
    if args.step == "solve":
        solve(guard, mine, args.out, args.editor)
    elif args.step == "scores":
        scores(guard, mine, args.out, args.editor)
    elif args.step == "rescore":
        rescore(guard, mine, args.out, args.editor)
    elif args.step == "drift":
        drift(guard, cases, args.out, args.editor, args.edits)
    else:
        write(guard, cases, args.out, args.editor)


if __name__ == "__main__":
    main()
