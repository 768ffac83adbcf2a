"""What overwriting a strongly held belief breaks, beside the form that holds in a context (docs/conflict.md).

    python -m benchmarks.belief_damage run   --data ../shared/data --out OUT
    python -m benchmarks.belief_damage write --out OUT --to docs/data/belief_damage.jsonl
    python -m benchmarks.belief_damage table docs/data/belief_damage.jsonl

Beliefs: of the 240 commonsense truths of benchmarks.belief_strength those with the largest `overwritten_belief`, one a
subject, ten a relation at most, 40 in all; the new answer is another object of the relation, drawn with the seed. Both
forms are ROME's update by the kit's settings: in the weights, and behind the gate of a hypothesis. Damage is measured
as `evaluate guard` measures it. One row a belief, resumable; rows hold figures, no text of the data.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.belief_strength import Fact, facts
from benchmarks.context_gates import SEED, trained
from benchmarks.context_table import rank_ones
from guardedit.editors.contextual import ContextualHparams, contextual_change
from guardedit.edits.activation_parts import Gate
from guardedit.edits.context_texts import asked_openings, behind, openings_of
from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.edits.updates import LowRank, WeightChange
from guardedit.evaluation.bootstrap import estimate
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.datasets import with_contexts
from guardedit.evaluation.guard.far_sample import FarSample
from guardedit.evaluation.guard.outcome_prompts import Neighbours, outcome_prompts
from guardedit.evaluation.guard.rows import by_group
from guardedit.evaluation.rowfile import RowFile
from guardedit.evaluation.scoring import score_pairs
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.beliefs import held_logprobs
from guardedit.risk.compare import compare

N, A_RELATION, CONTEXT, FAR_TOKENS = 40, 10, "hypothesis", 160
GROUPS = ("near", "near in context", "distractor", "subject")
"""Prompts whose answers the edit was not to move."""
FORMS = ("overwrite", "context")


@dataclass(frozen=True)
class Belief:
    """A truth, how firmly it is held, and what shall be said instead."""

    relation: str
    belief: float
    request: EditRequest


@dataclass(frozen=True, eq=False)
class Bench:
    """What every row is made with."""

    handle: ModelHandle
    pool: Neighbours
    far: FarSample


# -- beliefs


def chosen(handle: ModelHandle, path: Path, out: Path) -> list[Belief]:
    """The beliefs by the rule of the module's head; their strengths are found once."""
    truths = [fact for fact in facts(path) if fact[0] == "truth"]
    kept = out / "strengths.json"
    held: list[float] = json.loads(kept.read_text()) if kept.is_file() else []
    for _, _, request in truths[len(held) :]:
        found = held_logprobs(handle, request, str(request.target_true))
        held.append(math.exp(math.fsum(found) / len(found)))
    kept.write_text(json.dumps(held))
    order = sorted(range(len(truths)), key=lambda i: -held[i])
    objects = _objects(truths)
    found_: list[Belief] = []
    for i in order:
        _, relation, request = truths[i]
        crowded = Counter(one.relation for one in found_)[relation] >= A_RELATION
        if crowded or any(one.request.subject == request.subject for one in found_):
            continue
        new = random.Random(f"{SEED} {request.filled}").choice(objects[relation, request.target_true])
        found_.append(Belief(relation, held[i], request.model_copy(update={"target_new": new})))
    return found_[:N]


def _objects(truths: Sequence[Fact]) -> dict[tuple[str, str | None], list[str]]:
    """Relation and object -> the relation's other objects."""
    every: dict[str, set[str]] = {}
    for _, relation, request in truths:
        every.setdefault(relation, set()).add(str(request.target_true))
    return {
        (relation, one): sorted(objects - {one}) for relation, objects in every.items() for one in objects
    }


# -- one belief


def one_row(
    bench: Bench, belief: Belief, number: int, update: LowRank, held: LowRank, gate: Gate,
    hparams: ContextualHparams,
) -> dict[str, Any]:  # fmt: skip
    """Both forms of one belief's edit: what they say, and what they move."""
    parameter = bench.handle.rewrite_parameter(hparams.layer)
    change = contextual_change(held, hparams, gate, CONTEXT)
    deltas = {
        "overwrite": EditDelta((WeightChange(parameter, hparams.layer, update),), "rome", {}, {}),
        "context": EditDelta((change,), "contextual", {}, {}),
    }
    row: dict[str, Any] = {"number": number, "relation": belief.relation, "belief": round(belief.belief, 5)}
    texts, groups = _prompts(bench, belief.request)
    openings = asked_openings(CONTEXT)
    asked = [belief.request.filled, *(behind(before, belief.request.filled) for before in openings)]
    row["before"] = _says(bench.handle, belief.request, asked)
    for form, delta in deltas.items():
        with rehearsed(bench.handle, delta):
            said = _says(bench.handle, belief.request, asked)
        compared = compare(bench.handle, delta, texts, ["near"] * len(texts))
        far = bench.far.moves(delta)
        row[form] = {
            **said,
            **{name: round(value, 6) for name, value in by_group(compared, groups).items()},
            "far/kl_nats": far["kl_nats"],
            "far/lost_top1": far["lost_top1"],
        }
    return row


def _prompts(bench: Bench, request: EditRequest) -> tuple[list[str], list[str]]:
    """Prompts and their groups; behind openings of the context stand the neighbours once more."""
    found = outcome_prompts(bench.handle, request, bench.pool, (), (), SEED).groups
    openings = asked_openings(CONTEXT)
    groups = {name: found[name] for name in ("near", "distractor", "subject")}
    groups["near in context"] = tuple(
        behind(openings[i % len(openings)], prompt) for i, prompt in enumerate(found["near"])
    )
    pairs = [(prompt, name) for name, prompts in groups.items() for prompt in prompts]
    return [prompt for prompt, _ in pairs], [name for _, name in pairs]


def _says(handle: ModelHandle, request: EditRequest, asked: Sequence[str]) -> dict[str, float]:
    """Whether P(new) > P(old) at the bare prompt, and behind what share of the context's openings."""
    new, old = (
        [one.logprob or 0.0 for one in score_pairs(handle, [(text, target) for text in asked])]
        for target in (request.target_new, str(request.target_true))
    )
    told = [float(n > o) for n, o in zip(new, old, strict=True)]
    return {"bare": told[0], "in context": sum(told[1:]) / len(told[1:])}


def run(guard: Guard, data: Path, out: Path) -> None:
    """All beliefs, one by one."""
    handle, hparams = guard.handle, guard.kit.settings("contextual")
    path = data / "relations" / "relations.jsonl.xz"
    beliefs = chosen(handle, path, out)
    requests = [one.request for one in beliefs]
    updates = rank_ones(guard, requests, with_contexts(handle, guard.kit.settings("rome"), SEED), out)
    told = [one.model_copy(update={"context": CONTEXT}) for one in requests]
    before = openings_of(told[0], hparams.openings, SEED)
    held = rank_ones(guard, told, replace(hparams, contexts=("", *before)), out)
    gate = trained(guard, CONTEXT, hparams, out).gates["both"]
    every = [request for group, _, request in facts(path, each=10_000) if group == "truth"]
    pool = Neighbours.of(EvalCase(case_id=str(i), request=one) for i, one in enumerate(every))
    far = FarSample.of(handle, hparams.layer, SEED, n_tokens=FAR_TOKENS)
    bench = Bench(handle, pool, far)
    rows = RowFile(out / "rows.jsonl", {"model": handle.digest(), "far": far.digest, "seed": SEED, "n": N})
    for number in range(len(rows.load()), len(beliefs)):
        rows.append(one_row(bench, beliefs[number], number, updates[number], held[number], gate, hparams))
        print(f"belief {number + 1} of {len(beliefs)}", file=sys.stderr, flush=True)


# -- figures


def write(out: Path, to: Path) -> None:
    """The rows as they are: there is no text in them."""
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text((out / "rows.jsonl").read_text("utf-8"))


def table(path: Path) -> str:
    """A row a figure, both forms and their paired difference, with intervals over beliefs."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]]
    lines = ["| figure | overwrite | in its context | overwrite less context |", "|---|---|---|---|"]
    names = ["bare", "in context"] + [f"{g}/{f}" for g in (*GROUPS, "far") for f in ("kl_nats", "lost_top1")]
    for name in names:
        values = {form: [row[form].get(name) for row in rows] for form in FORMS}
        pairs = [(a, b) for a, b in zip(*values.values(), strict=True) if None not in (a, b)]
        share = not name.endswith("kl_nats")
        cells = [_cell([pair[side] for pair in pairs], share=share) for side in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell([a - b for a, b in pairs], share=False)} |")
    before = {
        name: _cell([row["before"][name] for row in rows], share=True) for name in ("bare", "in context")
    }
    return "\n".join([*lines, "", f"Before: {before}; n {len(rows)}"])


def _cell(values: Sequence[float], *, share: bool) -> str:
    found = estimate(values, SEED, share=share)
    return "–" if found is None else f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f}; n {found.n})"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    running = steps.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    writing = steps.add_parser("write")
    writing.add_argument("--out", type=Path, required=True)
    writing.add_argument("--to", type=Path, required=True)
    steps.add_parser("table").add_argument("rows", type=Path)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.rows))
    elif args.step == "write":
        write(args.out, args.to)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        run(open_guard(home=args.out / "home"), args.data, args.out)


if __name__ == "__main__":
    main()
