r"""A race of the editors here against a public implementation, EasyEdit: same model, facts, layers, type and thread.

    python -m benchmarks.peer_race facts --data ../shared/data --out OUT
    python -m benchmarks.peer_race ours  --out OUT
    OTHER_PYTHON -m benchmarks.peer_race peer --data ../shared/data --out OUT --source EASYEDIT --folder MODEL \
        --method rome
    python -m benchmarks.peer_race score --out OUT
    python -m benchmarks.peer_race table --rows OUT/race.jsonl

docs/peers.md holds the protocol, which was fixed before the race. `peer` needs a Python that can import the other
project from the folder EASYEDIT, and a copy of the model in a folder with "llama" in its name. One process a method,
one thread (set OMP_NUM_THREADS=1). Each solved edit is a line of `OUT/*-rows.jsonl` and a file of weight changes that
one scorer judges; what is there is not done again. Linux only: peak memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peer_easyedit import PEERS, peer
from benchmarks.peer_rows import Line, Rows, Solved, cases_of
from benchmarks.peer_table import costs, table
from guardedit.editors.emmet import emmet
from guardedit.editors.located import find_wanted, solve_wanted
from guardedit.editors.memit import memit
from guardedit.editors.rome import solve_rome
from guardedit.edits.deltas import Dense, EditDelta, change_of
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.solvers import Solution, solve_batch
from guardedit.edits.spreading import Problem, Wanted
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.far import FarText
from guardedit.evaluation.measuring import Probing, Unedited, edited_side, unedited_side
from guardedit.evaluation.methods import Session
from guardedit.evaluation.metrics import CaseScores, case_metrics
from guardedit.evaluation.readers import choose, read_cases, with_neighbours
from guardedit.evaluation.run import select
from guardedit.models.handle import ModelHandle
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard
from guardedit.records import canonical

SEED, RACE, TUNE = 7, 20, 24
FAR = 256
"""Tokens of control text."""
METRICS = ("efficacy", "paraphrase", "neighborhood", "distractor_neighborhood", "neighborhood_kl_nats")


def facts(data: Path, out: Path) -> None:
    """Draw the race's facts (split `edit`) and those that a setting of the peer is chosen on (split `train`)."""
    handle = open_guard(home=out / "home").handle
    short = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz")
    split = {case.case_id: case.split for case in short.cases}
    long = read_cases(data / "counterfact/counterfact_rome_format_plus.jsonl.xz").cases
    raced = [case for case in long if case.distractors and split.get(case.case_id) == "edit"]
    train = [case for case in short.cases if case.split == "train"]
    for name, pool, n in (("race", raced, RACE), ("tune", train, TUNE)):
        chosen = select(handle, choose(pool, SEED), limit=n, known_only=True)
        nothing: Line = dict.fromkeys(("attributes", "generation", "references", "questions"), ())
        bare = [case.model_copy(update=nothing) for case in chosen.cases]
        cases = bare if name == "race" else with_neighbours(bare, 5, train, SEED)
        text = "".join(canonical(case).decode() + "\n" for case in cases)
        (out / f"{name}-cases.jsonl").write_text(text, encoding="utf-8")
        print(name, len(cases), "of", chosen.n_seen, "looked at")


# -- ours


def ours(out: Path, name: str, first: int | None, stops: Sequence[float | None]) -> None:
    """All values in batches and every solver's update from them, for each loss at which a value stops (None: as the
    kit ships); then ROME a fact at a time, the `first` facts."""
    guard, cases, rows = open_guard(home=out / "home"), cases_of(out, name), Rows(out, f"{name}-ours")
    inputs, settings = SolveInputs(guard.kit.second_moments), guard.kit.settings("rome")
    for moment in guard.kit.second_moments.values():
        moment.leverage(
            torch.ones(moment.width, 1, dtype=torch.float64)
        )  # factorised before any time is taken
    for stop in stops:
        _shared(guard, cases, rows, inputs, stop)
    for case in cases[:first]:
        alone = partial(solve_rome, guard.handle, [case.request], settings, inputs)
        rows.solve("guardedit ROME", [case.case_id], partial(_ours, alone, {}))


def _shared(
    guard: Guard, cases: Sequence[EvalCase], rows: Rows, inputs: SolveInputs, stop: float | None
) -> None:
    """ROME's values and those of the batch editors, and the updates from them."""
    early = "" if stop is None else f" stopped at {stop:g}"
    found = {
        name: _values(guard, cases, kit_name, inputs, stop)
        for name, kit_name in (("ROME", "rome"), ("", "memit"))
    }
    for method, solve in _solvers(guard, inputs).items():
        wanted, shared = found.get(method, found[""])
        for number, case in enumerate(cases):
            single = partial(solve, _part(wanted, number))
            if method != "EMMET" or stop is not None:  # as shipped it is, of one fact, all but ROME
                label = f"guardedit {method}{early}, shared values"
                rows.solve(label, [case.case_id], partial(_ours, single, shared))
        if method != "ROME":
            ids = [case.case_id for case in cases]
            label = f"guardedit {method}{early}, one batch"
            rows.solve(label, ids, partial(_ours, partial(solve, wanted), shared))


def _values(
    guard: Guard, cases: Sequence[EvalCase], editor: str, inputs: SolveInputs, stop: float | None
) -> tuple[Wanted, dict[str, float]]:
    """Keys and values of all facts with the editor's settings (MEMIT's and EMMET's are the same), and their cost."""
    settings = guard.kit.settings(editor, {} if stop is None else {"stop_loss": stop})
    started = time.process_time()
    wanted = find_wanted(guard.handle, [case.request for case in cases], settings, inputs)
    return wanted, {"values_cpu_s": (time.process_time() - started) / len(cases)}


def _solvers(guard: Guard, inputs: SolveInputs) -> dict[str, Callable[[Wanted], EditDelta]]:
    handle, kit = guard.handle, guard.kit
    moment, settings = inputs.moment(handle, kit.layer), kit.settings("rome")

    def exact(problem: Problem) -> Solution:
        return solve_batch(problem.keys, problem.residuals, moment)

    return {
        "ROME": lambda wanted: solve_wanted(handle, wanted, "rome", settings, inputs, exact),
        "MEMIT": lambda wanted: memit(handle, wanted, kit.settings("memit"), inputs),
        "EMMET": lambda wanted: emmet(handle, wanted, kit.settings("emmet"), inputs),
    }


def _part(wanted: Wanted, n: int) -> Wanted:
    some = slice(n, n + 1)
    return replace(wanted, requests=wanted.requests[some], keys=wanted.keys[some], values=wanted.values[some])


def _ours(solve: Callable[[], EditDelta], more: Mapping[str, Any]) -> Solved:
    delta = solve()
    changes = {change.parameter: change.update.dense() for change in delta.changes}
    return changes, {"steps": delta.diagnostics["steps"], **more}


# -- one scorer for both


def score(out: Path, name: str) -> None:
    """Judge every solved edit that is there by the same prompts and the same control text; a line a fact."""
    handle, cases = open_guard(home=out / "home").handle, cases_of(out, name)
    far, probing = FarText.of(handle, FAR), Probing()
    rows = [row for side in ("ours", "peer") for row in Rows(out, f"{name}-{side}").load()]
    edited = {case_id for row in rows for case_id in row["cases"]}
    before = {c.case_id: unedited_side(handle, c, probing) for c in cases if c.case_id in edited}
    path = out / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(line["label"], line["case"]) for line in lines}
    with path.open("a", encoding="utf-8") as file:
        if not lines:
            for case_id, side in before.items():
                file.write(json.dumps(_line("unedited", case_id, side.scores["raw"])) + "\n")
        for row, cost in zip(rows, costs(rows), strict=True):
            if (row["label"], row["cases"][0]) not in done:
                for line in _judged(handle, row, before, far, probing, out):
                    file.write(json.dumps({**line, **cost[line["case"]]}) + "\n")
                file.flush()


def _judged(
    handle: ModelHandle, row: Line, before: Mapping[str, Unedited], far: FarText, probing: Probing, out: Path
) -> Iterator[Line]:
    found = load_file(out / row["delta"])
    changes = tuple(change_of(handle, name, Dense(matrix)) for name, matrix in sorted(found.items()))
    ratio = max(float(m.norm() / handle.oriented(name).detach().norm()) for name, m in found.items())
    with Session(handle) as session:
        session.add(EditDelta(changes, "race", {}, {}))
        moved = far.moves(session).get("perplexity_ratio")
        about = {"nll_change": None if moved is None else fmean(moved), "delta_norm_ratio": ratio}
        for case_id in row["cases"]:
            scores = edited_side(session, before[case_id], probing)["raw"]
            yield {**_line(row["label"], case_id, scores), **about}


def _line(label: str, case_id: str, scores: CaseScores) -> Line:
    metrics = case_metrics(scores)
    rewrite = scores.rewrite[0].new.probability
    return {
        "label": label,
        "case": case_id,
        **{name: metrics.get(name) for name in METRICS},
        "p_new": rewrite,
    }


def _stop(text: str) -> float | None:
    return None if text == "shipped" else float(text)


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("facts", "ours", "peer", "score", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--facts", choices=("race", "tune"), default="race", help="which of the drawn facts")
    parser.add_argument("--source", type=Path, help="folder of the other project")
    parser.add_argument("--folder", type=Path, help="copy of the model for it")
    parser.add_argument("--method", choices=sorted(PEERS))
    parser.add_argument("--first", type=int, help="only so many facts; of ours, one at a time")
    parser.add_argument("--stop", type=_stop, nargs="+", help="losses at which a value stops, or shipped")
    parser.add_argument("--ridge", type=float, help="MEMIT's mom2_update_weight")
    parser.add_argument("--joint", action="store_true", help="all facts as one solve")
    parser.add_argument("--rows", type=Path, help="what `score` wrote")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.step == "table":
        print(table(args.rows))
    elif args.step == "facts":
        args.out.mkdir(parents=True, exist_ok=True)
        facts(args.data, args.out)
    elif args.step == "ours":
        ours(args.out, args.facts, args.first, args.stop or [None])
    elif args.step == "peer":
        peer(args)
    else:
        score(args.out, args.facts)


if __name__ == "__main__":
    main()
