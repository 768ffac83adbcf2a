"""Where the gates of contextual edits fire, by set of wordings (docs/contextual.md).

    python -m benchmarks.context_firing --data ../shared/data --out OUT [--facts 40] [--bank old.json]

Gates alone, no edit: each kind's gate, fitted as an edit fits it, on prompts about facts of the `train` split
behind the wordings of benchmarks.context_prompts. With `--bank` another bank of openings stands in for the shipped one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.context_prompts import KINDS, SETS, Asked, asked
from benchmarks.context_table import SEED, trained
from guardedit.edits import context_texts
from guardedit.edits.gates import Pooled, pooled
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.readers import choose, read_cases
from guardedit.models.control import relations
from guardedit.models.hooks import key_hook
from guardedit.pipeline import open as open_guard


def facts(data: Path, count: int) -> list[EvalCase]:
    """Facts about subjects that no gate is fitted with, known to the model or not: gates read the context."""
    told = {subject for row in relations() for subject in row["pairs"]}
    pool = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", "train").cases
    return [case for case in choose(pool, SEED + 1) if case.request.subject not in told][:count]


def shares(fired: torch.Tensor, prompts: Sequence[Sequence[Asked]], kind: str, inside: bool) -> str:
    """Share of prompts inside or outside the kind in which the gate fires, with an interval over facts."""
    rows, at = [], 0
    for of_fact in prompts:
        mine = fired[at : at + len(of_fact)].tolist()
        at += len(of_fact)
        wanted = [
            f
            for f, one in zip(mine, of_fact, strict=True)
            if (one.kind == kind) == inside and (not inside or one.role == "context")
        ]
        rows.append(sum(wanted) / len(wanted))
    found = estimate(rows, SEED)
    if found is None:
        return "–"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}; {found.n} facts)"


def main() -> None:
    """Print a table row for each kind and set of wordings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--bank", type=Path)
    args = parser.parse_args()
    if args.bank:
        other = json.loads(args.bank.read_text("utf-8"))
        context_texts._bank = lambda: other
    args.out.mkdir(parents=True, exist_ok=True)
    guard = open_guard(home=args.out / "home")
    hparams = guard.kit.settings("contextual")
    hook = key_hook(hparams.layer)
    sae, cases = guard.kit.saes[hook], facts(args.data, args.facts)
    sets = {name: [asked(cases, i, name) for i in range(len(cases))] for name in SETS}
    means: dict[str, Pooled] = {
        name: pooled(guard.handle, [one.text for row in rows for one in row], hook, sae)
        for name, rows in sets.items()
    }
    print("| kind | wordings | fires inside | fires outside |\n|---|---|---|---|")
    for kind in KINDS:
        gates = trained(guard, kind, hparams, args.out)
        for name, rows in sets.items():
            fired = gates.logits["both"](means[name].acts, means[name].latents) > gates.limits["both"]
            inside, outside = (shares(fired, rows, kind, where) for where in (True, False))
            print(f"| {kind} | {name} | {inside} | {outside} |", flush=True)


if __name__ == "__main__":
    main()
