"""REMEDI with the shipped map on known facts, and how well its belief detector tells claims apart (docs/remedi.md).

    python -m benchmarks.remedi_table facts    --data ../shared/data --out OUT [--of contexts]
    python -m benchmarks.remedi_table detector --data ../shared/data --out OUT
    python -m benchmarks.remedi_table write    --out OUT --to docs/data/remedi_60.json
    python -m benchmarks.remedi_table table    docs/data/remedi_60.json

The facts are the first sixty of docs/editors.md, or those of docs/contextual.md (`--of contexts`): known ones of the
`edit` split, which no map was trained on. Detectors are fitted to claims about `train` facts and graded on claims about
`edit` facts of other subjects: each fact with its old and with its new object, and believed is the one that the model
finds likelier. Resumable case by case and block by block; `write` keeps figures only, no text of the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks import context_table
from benchmarks.editors_table import cases_of
from guardedit.edits.belief_detector import Kind, fit_detector, grade
from guardedit.edits.representations import Representations, represent
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.datasets import method
from guardedit.evaluation.metrics import beats
from guardedit.evaluation.readers import choose, read_cases
from guardedit.evaluation.run import Selection, evaluate
from guardedit.evaluation.scoring import score_pairs
from guardedit.evaluation.state import CaseResult
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest, digest_of

SEED, N, NEIGHBOURS, BLOCK = 0, 60, 1, 32
N_CLAIMED = {"train": 160, "edit": 300}
BARS = {
    "efficacy": (0.90, 1),
    "paraphrase": (0.70, 1),
    "neighborhood_loss": (0.02, -1),
    "times_smaller": (100, 1),
}
"""Metric -> its bar, and whether more (1) or less (-1) is better."""
SHOWN = (
    "efficacy", "efficacy_base", "paraphrase", "paraphrase_base", "neighborhood", "neighborhood_base",
    "neighborhood_loss", "efficacy_magnitude", "efficacy_magnitude_base",
)  # fmt: skip


# -- facts


def facts(guard: Guard, data: Path, out: Path, of: str) -> None:
    """Edit and measure every fact by itself, as `guardedit evaluate` does."""
    handle, chosen = guard.handle, _chosen(guard, data, out, of)
    cases = tuple(_trimmed(case) for case in chosen.cases[:N])
    layer = guard.kit.settings("remedi").layer
    named = guard.kit.maps[f"blocks.{layer}.hook_resid_post"].digest
    job = replace(
        method(guard, "remedi", SEED), dataset="counterfact, edit",
        dataset_digest=digest_of([named, *(case.case_id for case in cases)]),
    )  # fmt: skip
    found = evaluate(
        handle, Selection(cases, chosen.n_seen), job, state=out / f"facts-{named[7:15]}.jsonl", progress=told
    )
    document = {**found.as_json(), "map": named, "artefact": _artefact(handle, guard, out, named)}
    (out / "facts.json").write_text(json.dumps(document))


def _chosen(guard: Guard, data: Path, out: Path, of: str) -> Selection:
    if of == "editors":
        return cases_of(guard, data, out)
    cases = context_table.cases_of(guard, data, out, "edit", N)
    return Selection(tuple(cases), len(cases))


def _trimmed(case: EvalCase) -> EvalCase:
    """With fewer neighbours, and without prompts that are not reported: nothing is pushed where a subject is not."""
    return case.model_copy(
        update={
            "neighborhood": case.neighborhood[:NEIGHBOURS],
            "distractors": (),
            "questions": (),
        }
    )


def told(what: str, done: int, of: int) -> None:
    """A line on stderr."""
    print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)


def _artefact(handle: ModelHandle, guard: Guard, out: Path, named: str) -> dict[str, Any]:
    """Bytes of an edit as it is stored, against those of the tensor that ROME rewrites."""
    lines = (out / f"facts-{named[7:15]}.jsonl").read_text().splitlines()[1:]
    results = [CaseResult.model_validate_json(line) for line in lines]
    sizes = [float(r.diagnostics["n_bytes"] or 0) for r in results if "n_bytes" in r.diagnostics]
    tensor = handle.model.get_parameter(handle.rewrite_parameter(guard.kit.layer))
    whole = tensor.numel() * tensor.element_size()
    times = estimate([whole / size for size in sizes], SEED, share=False)
    return {
        "rome_bytes": whole,
        "bytes": _plain(estimate(sizes, SEED, share=False)),
        "largest_bytes": max(sizes),
        "times_smaller": _plain(times),
    }


def _plain(found: Any) -> dict[str, Any] | None:
    return None if found is None else dict(found.model_dump(mode="json"))


# -- detector


def claims(
    handle: ModelHandle, data: Path, out: Path, split: str, without: set[str]
) -> list[tuple[EditRequest, bool]]:
    """Facts of a split, one a subject, with whether the model finds the old object likelier; found once."""
    file = data / "counterfact" / "counterfact_edit_format.jsonl.xz"
    first: dict[str, EditRequest] = {}
    for case in choose(read_cases(file, split).cases, SEED):
        if case.request.target_true is not None and case.request.subject.casefold() not in without:
            first.setdefault(case.request.subject.casefold(), case.request)
    requests = list(first.values())[: N_CLAIMED[split]]
    path = out / f"believed-{split}.json"
    known: list[bool] = json.loads(path.read_text()) if path.is_file() else []
    while len(known) < len(requests):
        known += _believed(handle, requests[len(known) : len(known) + BLOCK])
        path.write_text(json.dumps(known))
        told(f"claims, {split}", len(known), len(requests))
    return list(zip(requests, known, strict=True))


def _believed(handle: ModelHandle, requests: Sequence[EditRequest]) -> list[bool]:
    pairs = [(r.filled, target) for r in requests for target in (r.target_true or "", r.target_new)]
    scores = score_pairs(handle, pairs)
    return [bool(beats(old, new)) for old, new in zip(scores[::2], scores[1::2], strict=True)]


def _represented(
    handle: ModelHandle, found: Sequence[tuple[EditRequest, bool]], hook: str
) -> tuple[Representations, list[bool], list[str]]:
    """Two claims a fact: representations, labels, subjects."""
    pairs = [(r, target) for r, _ in found for target in (r.target_true or "", r.target_new)]
    labels = [label for _, old in found for label in (old, not old)]
    return represent(handle, pairs, hook), labels, [r.subject.casefold() for r, _ in pairs]


def detector(guard: Guard, data: Path, out: Path) -> None:
    """Fit both kinds on `train` facts, grade them on `edit` facts about other subjects."""
    handle, layer = guard.handle, guard.kit.settings("remedi").layer
    trained = guard.kit.maps[f"blocks.{layer}.hook_resid_post"]
    seen = claims(handle, data, out, "train", set())
    held = claims(handle, data, out, "edit", {request.subject.casefold() for request, _ in seen})
    fitted, labels, _ = _represented(handle, seen, trained.hook_name)
    asked, answers, subjects = _represented(handle, held, trained.hook_name)
    kinds: dict[str, Any] = {}
    for kind in get_args(Kind):
        made = fit_detector(fitted, labels, trained.hook_name, kind, trained, SEED)
        kinds[kind] = asdict(grade(made, asked, answers, subjects, SEED))
    old = sum(label for _, label in held) / len(held)
    document = {
        "kinds": kinds,
        "n_train_facts": len(seen),
        "old_likelier": old,
        "hook": trained.hook_name,
        "map": trained.digest,
    }
    (out / "detector.json").write_text(json.dumps(document))


# -- figures


def write(out: Path, to: Path) -> None:
    """Figures with intervals, settings and digests of what was measured."""
    found = json.loads((out / "facts.json").read_text())
    metrics = {name: found["metrics"][name] for name in SHOWN if found["metrics"].get(name)}
    kept = ("n", "n_seen", "failed", "hparams", "model_digest", "map", "artefact", "seconds_per_edit")
    document: dict[str, Any] = {"metrics": metrics, **{key: found[key] for key in kept}, "seed": SEED}
    if (out / "detector.json").is_file():
        document["detector"] = json.loads((out / "detector.json").read_text())
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def table(path: Path) -> str:
    """A row a figure, with its bar."""
    found = json.loads(path.read_text())
    rows = {**found["metrics"], **{k: found["artefact"][k] for k in ("bytes", "times_smaller")}}
    lines = ["| figure | value | 95 % interval | n | bar | |", "|---|---|---|---|---|---|"]
    lines += [_line(name, row) for name, row in rows.items()]
    for kind, row in found.get("detector", {}).get("kinds", {}).items():
        named = {**row, "value": row["auroc"], "n": f"{row['n_facts']} facts"}
        lines.append(_line(f"AUROC, {kind}", named))
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, Any]) -> str:
    bar = sign = verdict = ""
    if name in BARS:
        limit, better = BARS[name]
        sign, bar = ("≥ " if better > 0 else "≤ "), f"{limit:g}"
        verdict = "met" if better * (row["value"] - limit) >= 0 else "missed"
    interval = f"{row['low']:.3g} to {row['high']:.3g}"
    return f"| {name} | {row['value']:.3g} | {interval} | {row['n']} | {sign}{bar} | {verdict} |"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("facts", "detector"):
        step = steps.add_parser(name)
        step.add_argument("--data", type=Path, required=True)
        step.add_argument("--out", type=Path, required=True)
        if name == "facts":
            step.add_argument("--of", choices=("editors", "contexts"), default="editors", help="whose facts")
    writing = steps.add_parser("write")
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--to", type=Path, required=True)
    steps.add_parser("table").add_argument("figures", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.figures))
    elif args.step == "write":
        write(args.out, args.to)
    else:
        guard = open_guard(home=args.out / "home")
        if args.step == "facts":
            facts(guard, args.data, args.out, args.of)
        else:
            detector(guard, args.data, args.out)


if __name__ == "__main__":
    main()
