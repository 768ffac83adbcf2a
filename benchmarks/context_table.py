"""Facts that hold in a context and not outside: gates, baselines and edits side by side (docs/contextual.md).

    python -m benchmarks.context_table run   --data ../shared/data --out OUT --split edit --wordings last --facts 60
    python -m benchmarks.context_table table docs/data/contexts_60.jsonl.xz

Every fact is edited for each kind of context by the kit's `contextual` settings; wordings, names and openings of the
prompts are benchmarks.context_prompts', which no gate is fitted to. Rows hold figures, no text of the data. Resumable
fact by fact; gates are fitted once a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.context_figures import OUTSIDE, fired, table
from benchmarks.context_gates import SEED, Trained, shipped, trained
from benchmarks.context_prompts import KINDS, SETS, Asked, asked
from guardedit.editors.contextual import ContextualHparams, contextual_change, gate_hook
from guardedit.editors.located import find_wanted, solve_wanted
from guardedit.editors.rome import RomeHparams
from guardedit.edits.activations import ActivationChange, install, uninstall
from guardedit.edits.context_texts import openings_of
from guardedit.edits.deltas import LowRank
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.solvers import solve_batch
from guardedit.edits.value_shelf import ValueShelf
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.readers import choose, read_cases
from guardedit.evaluation.run import select
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.control import relations
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook, record
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest, canonical


def cases_of(guard: Guard, data: Path, out: Path, split: str, count: int) -> list[EvalCase]:
    """Known facts of the split in seed order, one a subject, none whose subject a gate is fitted with."""
    path = out / f"cases_{split}.jsonl"
    if not path.is_file():
        told = {subject for row in relations() for subject in row["pairs"]}
        pool = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", split).cases
        first: dict[str, EvalCase] = {}
        for case in choose(pool, SEED):
            if case.request.subject not in told:
                first.setdefault(case.request.subject.casefold(), case)
        chosen = select(guard.handle, list(first.values()), limit=count, known_only=True)
        path.write_text("".join(canonical(case).decode() + "\n" for case in chosen.cases))
    return [EvalCase.model_validate_json(line) for line in path.read_text().splitlines()][:count]


# -- one fact


def solved(
    guard: Guard, cases: Sequence[EvalCase], kind: str, hparams: ContextualHparams, out: Path
) -> list[LowRank]:
    """Every fact's rank-one update for one kind of context."""
    requests = [case.request.model_copy(update={"context": kind}) for case in cases]
    before = openings_of(requests[0], hparams.openings, SEED)
    return rank_ones(guard, requests, replace(hparams, contexts=("", *before)), out)


def rank_ones(
    guard: Guard, requests: Sequence[EditRequest], settings: RomeHparams, out: Path
) -> list[LowRank]:
    """Every request's rank-one update by itself; values are found together, and kept in OUT."""
    inputs = SolveInputs(guard.kit.second_moments, SEED, values=ValueShelf(out / "values"))
    moment = inputs.moment(guard.handle, settings.layer)
    wanted = find_wanted(guard.handle, requests, settings, inputs)
    updates = []
    for number in range(len(requests)):
        one = replace(
            wanted, requests=wanted.requests[number : number + 1], keys=wanted.keys[number : number + 1],
            values=wanted.values[number : number + 1],
        )  # fmt: skip
        delta = solve_wanted(
            guard.handle, one, "rome", settings, inputs,
            lambda problem: solve_batch(problem.keys, problem.residuals, moment),
        )  # fmt: skip
        updates.append(delta.changes[0].update)  # type: ignore[union-attr]
    return updates  # type: ignore[return-value]


@torch.no_grad()
def read(
    guard: Guard, texts: Sequence[str], hparams: ContextualHparams, read_outs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text: mean activation and mean latents where the gate reads, over all tokens but the first, and the
    largest p(x) of each read-out."""
    handle, hook, key = guard.handle, gate_hook(guard.handle, hparams), key_hook(hparams.layer)
    sae = guard.kit.saes.get(hook)
    means, latents, matches = [], [], []
    batch = handle.encode(texts)
    with record(handle, sorted({hook, key}), stop=True) as seen:
        handle.hidden(batch["input_ids"], batch["attention_mask"])
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        found = seen[hook][row, 1:length].float()
        means.append(found.mean(0))
        latents.append(sae.encode(found).float().mean(0) if sae is not None else found.mean(0))
        matches.append((seen[key][row, :length].float() @ read_outs.float().T).amax(0))
    return torch.stack(means), torch.stack(latents), torch.stack(matches)


def rows_of_fact(
    guard: Guard, cases: Sequence[EvalCase], number: int, gates: Mapping[str, Trained],
    updates: Mapping[str, Sequence[LowRank]], hparams: ContextualHparams, wordings: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every prompt of one fact under the edits of every kind."""
    prompts = asked(cases, number, wordings)
    read_outs = torch.stack([updates[kind][number].right[0] for kind in KINDS])
    acts, latents, matches = read(guard, [one.text for one in prompts], hparams, read_outs)
    before = _leads(guard, cases[number], prompts)
    found = []
    for index, kind in enumerate(KINDS):
        change = contextual_change(
            updates[kind][number], hparams, gates[kind].gates[shipped(gates[kind].gates)], kind
        )
        inside = [i for i, one in enumerate(prompts) if (one.kind, one.role) == (kind, "context")]
        needed = [i for i, one in enumerate(prompts) if i in inside or one.role in OUTSIDE]
        with in_force(guard.handle, replace(change, gate=None)):
            told = _leads(guard, cases[number], [prompts[i] for i in needed])
        after = dict(zip(needed, told, strict=True))
        logits = {name: logit(acts, latents) for name, logit in gates[kind].logits.items()}
        stated = _leads(guard, cases[number], [_stated(prompts[i], cases[number]) for i in inside[:1]])
        for i, one in enumerate(prompts):
            found.append({
                "case": cases[number].case_id, "edit": kind, "kind": one.kind, "role": one.role,
                "inside": i in inside, "match": round(float(matches[i, index]), 4),
                "logit": {name: round(float(values[i]), 4) for name, values in logits.items()},
                "before": before[i], "after": after.get(i), "stated": stated[0] if i == inside[0] else None,
            })  # fmt: skip
        _check_gated(
            guard, change, prompts, cases[number], found[-len(prompts) :], gates[kind].limits, hparams
        )
    return found


@contextmanager
def in_force(handle: ModelHandle, change: ActivationChange) -> Iterator[None]:
    """The model with the edit."""
    install(handle, change)
    try:
        yield
    finally:
        uninstall(handle, change.parameter)


def _stated(one: Asked, case: EvalCase) -> Asked:
    """The fact in the prompt, in the same context."""
    return replace(one, text=f"{one.text} {case.request.target_new.strip()}. {one.text}")


def _leads(guard: Guard, case: EvalCase, prompts: Sequence[Asked]) -> list[dict[str, Any]]:
    """Log P(new) − log P(old) a token, and whether greedy decoding begins with the new one, the old one."""
    new = score_pairs(guard.handle, [(one.text, case.request.target_new) for one in prompts])
    old = score_pairs(guard.handle, [(one.text, case.target_true) for one in prompts])
    return [
        {"gap": round((n.logprob or 0.0) - (o.logprob or 0.0), 5), "new": n.greedy, "old": o.greedy}
        for n, o in zip(new, old, strict=True)
    ]


def _check_gated(
    guard: Guard, change: ActivationChange, prompts: Sequence[Asked], case: EvalCase, rows: Sequence[dict[str, Any]],
    limits: Mapping[str, float], hparams: ContextualHparams,
) -> None:  # fmt: skip
    """The edit as it ships, gate and all, on every second prompt: it must do what the rows say."""
    gate = shipped(limits)
    clear = [
        i for i, row in enumerate(rows)
        if row["after"] and abs(row["logit"][gate] - limits[gate]) > 0.05
        and abs(row["match"] - hparams.match_least) > 0.02
    ]  # fmt: skip
    some = clear[::2]
    with in_force(guard.handle, change):
        found = _leads(guard, case, [prompts[i] for i in some])
    for i, shown in zip(some, found, strict=True):
        fires = fired(rows[i], gate, limits[gate], hparams.match_least)
        wanted = rows[i]["after" if fires else "before"]
        if abs(shown["gap"] - wanted["gap"]) > 2e-3:
            raise SystemExit(f"prompt {i} of case {case.case_id}: gated {shown}, rows say {wanted}")


def run(guard: Guard, data: Path, out: Path, split: str, wordings: str, count: int) -> None:
    """All facts, fact by fact."""
    cases, hparams = cases_of(guard, data, out, split, count), guard.kit.settings("contextual")
    gates = {kind: trained(guard, kind, hparams, out) for kind in KINDS}
    about = {
        "limits": {kind: one.limits for kind, one in gates.items()}, "gates": {k: o.about for k, o in gates.items()},
        "match_least": hparams.match_least, "split": split, "wordings": wordings, "model": guard.handle.digest(),
    }  # fmt: skip
    path = out / f"rows_{split}_{wordings}.jsonl"
    if not path.is_file():
        path.write_text(json.dumps(about) + "\n")
    done = {json.loads(line)["case"] for line in path.read_text().splitlines()[1:]}
    updates = {kind: solved(guard, cases, kind, hparams, out) for kind in KINDS}
    for number, case in enumerate(cases):
        if case.case_id not in done:
            rows = rows_of_fact(guard, cases, number, gates, updates, hparams, wordings)
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
        print(table(args.rows))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        run(open_guard(home=args.out / "home"), args.data, args.out, args.split, args.wordings, args.facts)


if __name__ == "__main__":
    main()
