"""Where contextual edits act, by set of wordings: gates and key match alone, no values (docs/contextual.md).

    python -m benchmarks.context_firing run   --data ../shared/data --out OUT --split edit --wordings last --facts 60
    python -m benchmarks.context_firing table docs/data/contexts_last.jsonl.xz

Each kind's gate, fitted as an edit fits it, and the key of each fact, found as an edit finds it; an edit acts where
both say so. Resumable fact by fact. Rows hold figures, no text of the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.context_figures import firing_table
from benchmarks.context_gates import SEED, Trained, shipped, trained
from benchmarks.context_prompts import KINDS, SETS, asked
from benchmarks.context_table import cases_of, read
from guardedit.editors.contextual import ContextualHparams, gate_hook
from guardedit.edits.context_texts import openings_of
from guardedit.edits.keys import keys_of
from guardedit.edits.solvers import solve
from guardedit.edits.updates import LowRank
from guardedit.evaluation.cases import EvalCase
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard


def read_outs(guard: Guard, case: EvalCase, hparams: ContextualHparams) -> Tensor:
    """Of each kind the fact's read-out, of which p(x) is the product with a key: no value is needed for it."""
    moment, found = guard.kit.second_moments[f"blocks.{hparams.layer}.mlp.hook_post"], []
    for kind in KINDS:
        request = case.request.model_copy(update={"context": kind})
        before = openings_of(request, hparams.openings, SEED)
        (key,) = keys_of(guard.handle, [request], hparams.layer, ("", *before))
        unit = torch.zeros(guard.handle.d_model, 1, dtype=torch.float64)
        unit[0] = 1.0
        update = solve(key.k_star[:, None], unit, moment)
        if not isinstance(update, LowRank):
            raise SystemExit("the update of one fact is not of rank one")
        found.append(update.right[0])
    return torch.stack(found)


def rows_of(
    guard: Guard, cases: Sequence[EvalCase], number: int, gates: Mapping[str, Trained],
    hparams: ContextualHparams, wordings: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every prompt of one fact under the edits of every kind."""
    prompts = asked(cases, number, wordings)
    acts, latents, matches = read(
        guard, [one.text for one in prompts], hparams, read_outs(guard, cases[number], hparams)
    )
    found = []
    for index, kind in enumerate(KINDS):
        logits = {name: logit(acts, latents) for name, logit in gates[kind].logits.items()}
        found += [
            {
                "case": cases[number].case_id, "edit": kind, "kind": one.kind, "role": one.role,
                "inside": (one.kind, one.role) == (kind, "context"), "match": round(float(matches[i, index]), 4),
                "logit": {name: round(float(values[i]), 4) for name, values in logits.items()},
            }
            for i, one in enumerate(prompts)
        ]  # fmt: skip
    return found


def run(guard: Guard, data: Path, out: Path, split: str, wordings: str, count: int) -> None:
    """All facts, fact by fact."""
    cases, hparams = cases_of(guard, data, out, split, count), guard.kit.settings("contextual")
    gates = {kind: trained(guard, kind, hparams, out) for kind in KINDS}
    about = {
        "limits": {kind: one.limits for kind, one in gates.items()}, "gates": {k: o.about for k, o in gates.items()},
        "match_least": hparams.match_least, "split": split, "wordings": wordings, "seed": SEED,
        "hook": gate_hook(guard.handle, hparams), "shipped": shipped(gates[KINDS[0]].gates),
        "model": guard.handle.digest(),
    }  # fmt: skip
    path = out / f"firing_{split}_{wordings}.jsonl"
    if not path.is_file():
        path.write_text(json.dumps(about) + "\n")
    done = {json.loads(line)["case"] for line in path.read_text().splitlines()[1:]}
    for number, case in enumerate(cases):
        if case.case_id not in done:
            with torch.no_grad():
                rows = rows_of(guard, cases, number, gates, hparams, wordings)
            with path.open("a") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"fact {number + 1} of {len(cases)}", file=sys.stderr, flush=True)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--split", choices=("train", "edit"), required=True)
    running.add_argument("--wordings", choices=tuple(SETS), required=True)
    running.add_argument("--facts", type=int, default=60)
    steps.add_parser("table").add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(firing_table(args.rows))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        run(open_guard(home=args.out / "home"), args.data, args.out, args.split, args.wordings, args.facts)


if __name__ == "__main__":
    main()
