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
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.context_gates import GATES, SEED, Trained, shipped, trained
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
from guardedit.evaluation.bootstrap import estimate
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

OUTSIDE = ("bare", "paraphrase", "plain opening")
"""Roles of prompts about the fact in no context at all."""


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


def fired(row: Mapping[str, Any], gate: str, limit: float, least: float) -> bool:
    """Whether the edit acts on the prompt."""
    return row["logit"][gate] >= limit and row["match"] >= least


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


# -- figures


def table(path: Path) -> str:
    """Gates, then edits."""
    about, rows = _rows(path)
    return "\n".join([firing_table(path), "", *_edits(rows, about)])


def _rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file says of its run, and its rows."""
    data = path.read_bytes()
    text = lzma.decompress(data) if path.suffix == ".xz" else data
    about, *rows = [json.loads(line) for line in text.decode().splitlines()]
    return about, rows


def firing_table(path: Path) -> str:
    """Where each gate fires; what is said there too, where the rows know it."""
    about, rows = _rows(path)
    said = "after" in rows[0]
    lines = [
        "| context | gate | AUROC, held-out wordings | fires inside | fires outside (false) | bare prompts and "
        "paraphrases | other contexts | same context, other fact |"
        + (" efficacy in context |" if said else ""),
        "|" + "---|" * (9 if said else 8),
    ]
    for kind in (*KINDS, "all"):
        mine = [row for row in rows if kind in (row["edit"], "all")]
        for gate in (one for one in GATES if one in about["limits"][KINDS[0]]):
            cells = [_auroc(mine, gate) if kind != "all" else "–", *_firing(mine, gate, about, said)]
            lines.append(f"| {kind} | {gate} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _firing(mine: Sequence[dict[str, Any]], gate: str, about: Mapping[str, Any], said: bool) -> list[str]:
    """Shares of prompts in which the edit acts, by role."""
    least = about["match_least"]
    acts = [{**row, "fires": fired(row, gate, about["limits"][row["edit"]][gate], least)} for row in mine]
    shown = []
    for want in (
        lambda r: r["inside"], lambda r: not r["inside"], lambda r: r["role"] in ("bare", "paraphrase"),
        lambda r: r["role"] == "context" and not r["inside"],
        lambda r: r["role"] == "other fact" and r["kind"] == r["edit"],
    ):  # fmt: skip
        shown.append(_share([row for row in acts if want(row)], lambda row: float(row["fires"])))
    inside = [row for row in acts if row["inside"]]
    if said:
        shown.append(_share(inside, lambda row: float(row["after" if row["fires"] else "before"]["gap"] > 0)))
    return shown


def _edits(rows: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> list[str]:
    """The edit beside its baselines: what is said in the context and outside of it."""
    least, limits = about["match_least"], about["limits"]
    outside = [row for row in rows if row["role"] in OUTSIDE]
    inside = [row for row in rows if row["inside"]]
    stated = [row for row in inside if row["stated"]]

    def gated(row: Mapping[str, Any]) -> dict[str, Any]:
        gate = shipped(limits[row["edit"]])
        fires = fired(row, gate, limits[row["edit"]][gate], least)
        found: dict[str, Any] = row["after" if fires else "before"]
        return found

    told: list[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]], Sequence[dict[str, Any]]]] = [
        ("unedited", lambda row: row["before"], inside), ("the fact in the prompt", lambda row: row["stated"], stated),
        ("plain ROME (the same update, no gate)", lambda row: row["after"], inside), ("contextual", gated, inside),
    ]  # fmt: skip
    lines = [
        "| method | in context: P(new) > P(old) | says the new one | outside: P(old) > P(new) | says the old one |"
    ]
    lines.append("|" + "---|" * 5)
    for name, side, some in told:
        beside = outside if name != "the fact in the prompt" else []
        cells = [
            _share(some, lambda row, side=side: float(side(row)["gap"] > 0)),  # type: ignore[misc]
            _share(some, lambda row, side=side: float(side(row)["new"])),  # type: ignore[misc]
            _share(beside, lambda row, side=side: float(side(row)["gap"] < 0)),  # type: ignore[misc]
            _share(beside, lambda row, side=side: float(side(row)["old"])),  # type: ignore[misc]
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _share(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """Mean over prompts, with the interval over facts."""
    if not rows:
        return "–"
    by_case: dict[Any, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(value(row))
    found = estimate([sum(values) / len(values) for values in by_case.values()], SEED)
    return "–" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f}; n {len(rows)})"


def _auroc(rows: Sequence[dict[str, Any]], gate: str) -> str:
    """In the context against bare, paraphrased, plainly opened prompts and other contexts, of the same facts."""
    from sklearn.metrics import roc_auc_score

    used = [row for row in rows if row["role"] != "other fact"]
    cases = sorted({row["case"] for row in used})
    by_case = {case: [row for row in used if row["case"] == case] for case in cases}

    def area(some: Sequence[Any]) -> float:
        drawn = [row for case in some for row in by_case[case]]
        return float(roc_auc_score([row["inside"] for row in drawn], [row["logit"][gate] for row in drawn]))

    rng = np.random.default_rng(SEED)
    draws = [area(rng.choice(cases, len(cases))) for _ in range(300)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{area(cases):.3f} ({low:.3f} to {high:.3f})"


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
