"""What sparing namesakes costs and brings: updates for the same values (by ROME or guarded), at several weights.

    python -m benchmarks.sparing run OUT --data DATA --facts 24
    python -m benchmarks.sparing table docs/data/sparing.jsonl

Known CounterFact `train` facts whose subject has two words or more. An editor spares `namesakes.SPARED`; what it is
judged by here are `namesakes.WATCHED`, real subjects of the data that end in the same word, twelve other neighbours,
other questions about the subject, the fact said before six neighbours, and far text. Resumable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.solve_again import lines_of
from guardedit.editors.located import find_wanted, solve_wanted
from guardedit.edits.deltas import EditDelta, rehearsed
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.namesakes import namesakes
from guardedit.edits.solvers import solve_batch
from guardedit.edits.sparing import spared
from guardedit.edits.value_shelf import ValueShelf
from guardedit.evaluation.cases import CaseSet, EvalCase
from guardedit.evaluation.guard.association import figure
from guardedit.evaluation.guard.outcome_prompts import Neighbours, outcome_prompts
from guardedit.evaluation.guard.rows import Bench, by_group
from guardedit.evaluation.guard.strata import KNOWN, chosen_edits
from guardedit.evaluation.readers import read_cases
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import open as open_guard
from guardedit.records import EditRequest
from guardedit.risk.compare import compare

SEED, REAL = 7, 12
SETTINGS = (
    (0.0, 0.0), (0.01, 0.0), (0.003, 1.0), (0.01, 1.0), (0.03, 1.0), (0.003, 10.0), (0.01, 10.0), (0.03, 10.0),
    (0.1, 10.0),
)  # fmt: skip
"""Weights of the namesakes, each with `steady`."""
GROUPS = ("namesakes", "real", "near", "distractor", "subject")


def run(out: Path, data: Path, editor: str, n_facts: int) -> None:
    """A row a fact and setting."""
    guard, case_set = open_guard(home=out / "home"), read_cases(data / _FACTS, "train")
    bench = Bench(guard, editor, Neighbours.of(case_set.cases), SEED, values=out / "values")
    file = RowFile(
        out / f"{editor}-sparing.jsonl", {"model": guard.handle.digest(), "seed": SEED, "editor": editor}
    )
    done = {(row["case_id"], row["weight"], row["steady"]) for row in file.load()}
    for number, case in enumerate(cases_of(guard.handle, case_set, n_facts), start=1):
        settings = [one for one in SETTINGS if (case.case_id, *one) not in done]
        for row in rows_of(bench, case, case_set, settings) if settings else ():
            file.append(row)
        print(f"{number} of {n_facts}", file=sys.stderr, flush=True)


_FACTS = "counterfact/counterfact_edit_format.jsonl.xz"


def cases_of(handle: ModelHandle, case_set: CaseSet, n_facts: int) -> list[EvalCase]:
    """The first known facts, in an order drawn by the seed, that have namesakes."""
    found = (one.case for one in chosen_edits(handle, case_set, KNOWN, 20 * n_facts, SEED))
    named = (case for case in found if namesakes(case.request.subject))
    return [case for case, _ in zip(named, range(n_facts), strict=False)]


def rows_of(
    bench: Bench, case: EvalCase, case_set: CaseSet, settings: Sequence[tuple[float, float]]
) -> Iterator[dict[str, Any]]:
    """One fact at each of the settings; the value is found once."""
    handle, request = bench.workspace.handle, bench.request(case)
    bare = request.model_copy(update={"neighborhood": ()})
    kit, shelf = bench.workspace.kit, ValueShelf(bench.values) if bench.values else None
    inputs = SolveInputs(kit.second_moments, SEED, kit.saes, values=shelf)
    wanted, layer = find_wanted(handle, [bare], bench.settings, inputs), bench.settings.layer
    moment, groups = inputs.moment(handle, layer), prompts_of(bench, case, request, case_set)
    for weight, steady in settings:
        used = spared(handle, [bare], wanted.contexts, moment, layer, weight, steady)
        delta = solve_wanted(
            handle, wanted, bench.editor, bench.settings, inputs,
            lambda problem, used=used: solve_batch(problem.keys, problem.residuals, used),
        )  # fmt: skip
        yield {
            "case_id": case.case_id, "weight": weight, "steady": steady, "relation": request.prompt,
            **held(handle, delta, request, case), **moved(handle, delta, groups),
            "far": bench.far.moves(delta)["kl_nats"],
        }  # fmt: skip


def prompts_of(bench: Bench, case: EvalCase, request: EditRequest, case_set: CaseSet) -> dict[str, list[str]]:
    """What the update is judged by."""
    last, own = request.subject.split()[-1], request.subject
    subjects = sorted({one.request.subject for one in case_set.cases} - {own})
    real = [who for who in subjects if len(who.split()) > 1 and who.split()[-1] == last][:REAL]
    found = outcome_prompts(bench.workspace.handle, request, bench.pool, [], [], SEED).groups
    return {
        "namesakes": [request.prompt.replace("{}", who) for who in namesakes(own)],
        "real": [request.prompt.replace("{}", who) for who in real],
        **{name: list(found.get(name, ())) for name in ("near", "distractor", "subject")},
    }


def held(handle: ModelHandle, delta: EditDelta, request: EditRequest, case: EvalCase) -> dict[str, Any]:
    """Whether the new answer beats the old one, and P(new)."""
    prompts = [request.asked, *request.paraphrases, *case.paraphrases]
    with rehearsed(handle, delta):
        new, old = (
            [float(one.double().sum()) for one in handle.token_logprobs(prompts, [target] * len(prompts))]
            for target in (request.target_new, case.target_true)
        )
    beats = [a > b for a, b in zip(new, old, strict=True)]
    others = beats[1:]  # a case without paraphrases has no share of them
    return {
        "efficacy": float(beats[0]),
        "p_new": float(np.exp(new[0])),
        "paraphrase": float(np.mean(others)) if others else None,
    }


def moved(handle: ModelHandle, delta: EditDelta, groups: dict[str, list[str]]) -> dict[str, float]:
    """Mean KL and lost top-1 answers by group."""
    asked = [(group, prompt) for group, prompts in groups.items() for prompt in prompts]
    found = compare(handle, delta, [prompt for _, prompt in asked], ["near"] * len(asked))
    values = by_group(found, [group for group, _ in asked])
    there = [group for group in groups if groups[group]]
    return {group: values[f"{group}/kl_nats"] for group in there} | {
        f"{group}_lost": values[f"{group}/lost_top1"] for group in there
    }


def section_sparing(rows: Sequence[dict[str, Any]]) -> str:
    """Means over facts with 95 % intervals over relations, a line a setting; KL in nats, lost answers behind it."""
    names = ("efficacy", "paraphrase", "p_new", *GROUPS, "far")
    n = len({row["case_id"] for row in rows})
    with_real = len({row["case_id"] for row in rows if "real" in row})
    lines = [f"| weight | steady | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for weight, steady in SETTINGS:
        some = [row for row in rows if (row["weight"], row["steady"]) == (weight, steady)]
        cells = [cell(some, name) for name in names]
        lines.append(f"| {weight:g} | {steady:g} | {' | '.join(cells)} |")
    told = f"n {n} facts, seed {SEED}; real namesakes: the {with_real} that have any."
    beside = f"In the median, beside the same fact not spared: {'; '.join(_times(rows))}."
    return "\n".join([*lines, "", f"{told} {beside}", ""])


def _times(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How many times as far neighbours and far text move, and the largest far divergence, nats."""
    plain = {row["case_id"]: row for row in rows if not row["weight"]}
    for weight, steady in SETTINGS[1:]:
        some = [row for row in rows if (row["weight"], row["steady"]) == (weight, steady)]
        near, far = (
            np.median([row[of] / plain[row["case_id"]][of] for row in some]) for of in ("near", "far")
        )
        most = max(row["far"] for row in some)
        yield f"weight {weight:g}, steady {steady:g}: near {near:.1f}, far {far:.1f} times as much (at most {most:.2g})"


def cell(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Mean of one figure with its 95 % interval over relations, and the share of lost answers where there is one."""
    known = [row for row in rows if row.get(name) is not None]
    if not known:
        return "–"
    relations = np.array([row["relation"] for row in known])

    def mean(of: str) -> str:
        values = np.array([row[of] for row in known])
        found = figure(lambda a, _: float(a.mean()), values, values, relations, SEED)
        if found is None:  # too few for an interval
            return f"{values.mean():.3g}"
        return f"{found.value:.3g} ({found.low:.2g} to {found.high:.2g})"

    if f"{name}_lost" not in known[0]:
        return mean(name)
    return f"{mean(name)}; {np.mean([row[f'{name}_lost'] for row in known]):.2f}"


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--editor", default="rome", choices=("rome", "guarded"))
    args = parser.parse_args()
    if args.step == "run":
        run(args.source, args.data, args.editor, args.facts)
    else:
        print(section_sparing(lines_of(args.source)))


if __name__ == "__main__":
    main()
