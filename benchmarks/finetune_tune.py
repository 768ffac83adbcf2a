"""Tune the baselines fairly: the same facts for every setting, the best harmonic mean wins.

    python -m benchmarks.finetune_tune run   --data ../shared/data --out OUT [--editor lora]
    python -m benchmarks.finetune_tune table --data ../shared/data --out OUT

Facts: those that `reference_bank` drew and did not put into the bank (101 to 120 of its list). Forgetting: KL and
perplexity on control text that no edit is about. Resumable case by case; `table` prints
what is there (docs/finetune.md).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_bank import cases_of
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, written
from guardedit.edits.inputs import SolveInputs
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.readers import EvalCase
from guardedit.evaluation.run import Job, measure_case
from guardedit.evaluation.state import CaseResult
from guardedit.evaluation.summary import summarise
from guardedit.models.control import DOMAINS, control_texts
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import canonical

FIRST, LAST = 100, 120
SEED = 0
GRID: dict[str, list[dict[str, Any]]] = {
    "finetune-full": [{"learning_rate": rate} for rate in (1e-5, 3e-6, 3e-5, 1e-6)],
    "lora": [{"learning_rate": rate, "rank": 8} for rate in (3e-4, 1e-4, 1e-3, 3e-5)],
    "finetune-l": [
        *({"learning_rate": 5e-4, "clamp": clamp} for clamp in (1e-3, 2e-3, 5e-4, 5e-3, 1e-2)),
        {"learning_rate": 5e-4, "clamp": 2e-3, "score_at": "prompt_end", "stop_loss": 0.01},
    ],
    "finetune": [{"learning_rate": rate} for rate in (5e-4, 1e-4, 1e-3)],
}
CONTROL_TOKENS = 32
"""Of one text a control domain."""
HEAD = (
    "editor", "setting", "n", "efficacy", "paraphrase", "neighborhood", "unedited", "harmonic mean", "far KL (nats)",
    "perplexity ratio", "steps", "CPU seconds",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Control:
    """Control text and what the unedited model says about it."""

    input_ids: Tensor
    mask: Tensor
    before: Tensor
    """Log-probabilities (tokens, vocab)."""

    def forgetting(self, handle: ModelHandle, delta: EditDelta) -> dict[str, float]:
        """Mean KL(before ‖ after) a token, and log of the perplexity ratio, both in nats."""
        with written(handle, delta):
            after = _logprobs(handle, self.input_ids, self.mask)
        kl = (self.before.exp() * (self.before - after)).sum(-1).mean()
        inside = self.mask[:, 1:].bool()
        nexts = self.input_ids[:, 1:][inside][:, None]
        rows = _predicting(self.mask)[self.mask.bool()]
        change = (self.before - after)[rows].gather(-1, nexts).mean()
        return {"far_kl": float(kl), "log_perplexity_ratio": float(change)}


def control_of(handle: ModelHandle) -> Control:
    """The first tokens of one text of each control domain's second half."""
    texts = [control_texts(handle, domain, 1, SEED, "test")[0] for domain in DOMAINS]
    batch = handle.encode(texts)
    ids, mask = (batch[name][:, :CONTROL_TOKENS] for name in ("input_ids", "attention_mask"))
    return Control(ids, mask, _logprobs(handle, ids, mask))


def _predicting(mask: Tensor) -> Tensor:
    """Positions with a real token behind them."""
    found = torch.zeros_like(mask, dtype=torch.bool)
    found[:, :-1] = mask[:, 1:].bool()
    return found


@torch.no_grad()
def _logprobs(handle: ModelHandle, ids: Tensor, mask: Tensor) -> Tensor:
    return handle.logits_at(handle.hidden(ids, mask), mask.bool()).float().log_softmax(-1)


def folder_of(out: Path, editor: str, setting: Mapping[str, Any]) -> Path:
    """Where the results of one setting lie."""
    return out / "tune" / editor / ",".join(f"{name}={value}" for name, value in setting.items())


def run(guard: Guard, cases: list[EvalCase], out: Path, editors: Sequence[str]) -> None:
    """Edit and measure every case under every setting of the editors, case by case: a run that is cut short has seen
    the same cases everywhere."""
    control = control_of(guard.handle)
    for case in cases:
        for editor, setting in ((one, setting) for one in editors for setting in GRID[one]):
            path = folder_of(out, editor, setting) / f"{case.case_id}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(measure(guard, control, case, editor, setting)))


def measure(
    guard: Guard, control: Control, case: EvalCase, editor: str, setting: Mapping[str, Any]
) -> dict[str, Any]:
    """One case under one setting: a CaseResult, with CPU seconds, and the forgetting beside it."""
    settings = guard.kit.settings(editor, setting)
    start = time.process_time()
    inputs = SolveInputs(guard.kit.second_moments, SEED)
    delta = EDITORS[editor].solve(guard.handle, (case.request,), settings, inputs)
    seconds = time.process_time() - start
    result = measure_case(guard.handle, case, Job(editor, lambda *_: delta))
    plain = json.loads(canonical(result.model_copy(update={"seconds": seconds})))
    return {**plain, **control.forgetting(guard.handle, delta)}


def table(out: Path) -> str:
    """Everything that has been measured, as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for editor, settings in GRID.items():
        for setting in settings:
            found = [
                json.loads(p.read_text()) for p in sorted(folder_of(out, editor, setting).glob("*.json"))
            ]
            if found:
                lines.append(row(editor, setting, found))
    return "\n".join(lines) + "\n"


def row(editor: str, setting: Mapping[str, Any], found: list[dict[str, Any]]) -> str:
    """One line of the table."""
    kls = [one.pop("far_kl") for one in found]
    ratios = [one.pop("log_perplexity_ratio") for one in found]
    results = [CaseResult.model_validate(one) for one in found]
    whole = summarise(results, about={}, n_seen=len(results), seconds=0.0, seed=SEED)
    names = ("efficacy", "paraphrase", "neighborhood", "neighborhood_base")
    cells = [_interval(whole.metrics[name]) for name in names]
    steps = sum(int(result.diagnostics["steps"] or 0) for result in results) / len(results)
    return "| " + " | ".join((
        editor, ", ".join(f"{name} {value}" for name, value in setting.items()), str(whole.n), *cells,
        f"{whole.score.get('raw', 0.0):.3f}", _interval(estimate(kls, SEED, signed=True), ".2g"),
        f"{math.exp(sum(ratios) / len(ratios)):.3f}", f"{steps:.1f}", f"{whole.seconds_per_edit:.1f}",
    )) + " |"  # fmt: skip


def _interval(found: Any, form: str = ".3f") -> str:
    return "–" if found is None else f"{found.value:{form}} ({found.low:{form}}–{found.high:{form}})"


def main() -> None:
    """Run the grid, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--editor", choices=sorted(GRID))
    parser.add_argument("--facts", type=int, default=LAST - FIRST, help="how many of them, the first ones")
    args = parser.parse_args()
    if args.step == "run":
        args.out.mkdir(parents=True, exist_ok=True)
        guard = open_guard(home=args.out / "home")
        cases = cases_of(guard, args.data, args.out, LAST)[FIRST:LAST][: args.facts]
        run(guard, cases, args.out, [args.editor] if args.editor else list(GRID))
    sys.stdout.write(table(args.out))


if __name__ == "__main__":
    main()
