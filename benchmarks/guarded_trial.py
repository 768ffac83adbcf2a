"""Values of `rome` and `guarded` side by side on facts of the reference bank: does guarding pay?

    python -m benchmarks.guarded_trial --bank OUT --first 10 --facts 8 --set keep_weight=8

`OUT` is the folder of `benchmarks.reference_bank solve` (its cases.jsonl). Prints one JSON line a method; same-subject
and near figures are rehearsed on the stems of docs/probes.md, which no editor sees.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from guardedit.edits.deltas import EditDelta, WeightChange, rehearsed
from guardedit.edits.keys import keys_of
from guardedit.edits.solvers import solve
from guardedit.edits.values import Value, optimise_values
from guardedit.evaluation.metrics import CaseScores, PromptScore, case_metrics
from guardedit.evaluation.readers import EvalCase
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.hooks import key_hook
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.pipeline.measuring import risk_context
from guardedit.risk.rehearsal import rehearse

SCORES = ("subject_kl", "subject_lost_top1", "near_kl", "near_lost_top1")


def row(guard: Guard, case: EvalCase, key: Any, value: Value) -> dict[str, float]:
    """What one value does, rehearsed: success at prompt and paraphrases, neighbours, same subject."""
    handle, layer = guard.handle, guard.kit.layer
    update = solve(key.k_star[:, None], value.residual[:, None], guard.kit.second_moments[key_hook(layer)])
    change = WeightChange(handle.rewrite_parameter(layer), layer, update)
    delta = EditDelta((change,), "trial", {}, {})
    kinds = {
        "rewrite": (case.request.filled,),
        "paraphrase": case.paraphrases,
        "neighborhood": case.neighborhood,
    }
    found: dict[str, tuple[PromptScore, ...]] = {}
    with rehearsed(handle, delta):
        for kind, prompts in kinds.items():
            new, true = (
                score_pairs(handle, [(prompt, target) for prompt in prompts])
                for target in (case.request.target_new, case.target_true)
            )
            found[kind] = tuple(PromptScore(new=n, true=t) for n, t in zip(new, true, strict=True))
    metrics = case_metrics(CaseScores(**found))
    request = case.request.model_copy(update={"neighborhood": case.neighborhood[:5]})
    scores = {s.name: s.value for s in rehearse(risk_context(guard), [request], delta).scores}
    named = {name: scores[f"rehearsed_{name}"] for name in SCORES}
    chosen = {name: metrics[name] for name in ("efficacy", "paraphrase", "neighborhood")}
    return {**chosen, **named, "p_new": value.p_new, "kept_nats": value.kept_nats}  # type: ignore[dict-item]


def main() -> None:
    """Run both methods on the same facts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--first", type=int, default=10)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], help="settings of `guarded`, name=value")
    args = parser.parse_args()
    guard = open_guard(home=args.bank / "home")
    lines = (args.bank / "cases.jsonl").read_text().splitlines()[args.first : args.first + args.facts]
    cases = [EvalCase.model_validate_json(line) for line in lines]
    requests = [case.request for case in cases]
    named = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in args.set)}
    guarded = replace(guard.kit.settings("guarded"), **named)
    for label, settings in (("rome", guard.kit.settings("rome")), ("guarded", guarded)):
        keys = keys_of(guard.handle, requests, settings.layer, settings.contexts)
        started = time.process_time()
        values = optimise_values(guard.handle, requests, keys, settings.layer, settings.contexts, settings)
        seconds = (time.process_time() - started) / len(cases)
        rows = [row(guard, *one) for one in zip(cases, keys, values, strict=True)]
        means = {name: round(fmean(r[name] for r in rows if r[name] is not None), 3) for name in rows[0]}
        print(json.dumps({"method": label, "n": len(rows), "cpu_s_per_edit": round(seconds, 1), **means}))


if __name__ == "__main__":
    main()
