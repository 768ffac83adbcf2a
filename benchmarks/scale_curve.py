"""Where one layer is full: MEMIT and EMMET from ten facts to twice as many as a key has dimensions.

    python -m benchmarks.scale_curve values --data ../shared/data --out OUT [--until 3072]
    python -m benchmarks.scale_curve run    --data ../shared/data --out OUT
    python -m benchmarks.scale_curve table  docs/data/scale_curve.jsonl
    python -m benchmarks.scale_curve plot   docs/data/scale_curve.jsonl --svg docs/data/scale_curve.svg

Facts: CounterFact `train`, drawn by seed 0, known to the model or not, distinct subjects. Every size takes the first B
of them, so sizes share facts. Values are found on the unedited model with fewer contexts and steps than the kit's
(`SETTINGS`): what is compared is how many of them a layer can hold. Quality is read on the first SAMPLE facts of a
batch. Resumable: what lies in OUT is not computed again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from guardedit.editors.emmet import EmmetHparams, emmet
from guardedit.editors.located import LocatedHparams, find_wanted
from guardedit.editors.memit import MemitHparams, memit
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.spreading import Wanted
from guardedit.edits.value_shelf import ValueShelf
from guardedit.errors import GuardeditError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.datasets import Asking
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.readers import choose, read_cases, with_neighbours
from guardedit.evaluation.run import Job, evaluate
from guardedit.pipeline import Guard
from guardedit.pipeline import open as open_guard

SEED, SAMPLE, NEIGHBOURS, FAR_TOKENS = 0, 100, 5, 2048
SIZES = (10, 30, 100, 300, 768, 1536, 3072)
SETTINGS = {"steps": 15, "stop_loss": 0.1, "facts_at_once": 64}
CONTEXTS = 1
"""How many of the kit's contexts are taken: the bare prompt alone."""
METRICS = ("efficacy", "paraphrase", "neighborhood", "efficacy_magnitude", "far_kl_nats", "perplexity_ratio")


def cases_of(data: Path) -> list[EvalCase]:
    """Facts in the seed's order, one a subject."""
    pool = read_cases(data / "counterfact/counterfact_edit_format.jsonl.xz", "train").cases
    first: dict[str, EvalCase] = {}
    for case in choose(pool, SEED):
        first.setdefault(case.request.subject.casefold(), case)
    return list(first.values())


def settings(guard: Guard) -> LocatedHparams:
    """ROME's settings at the kit's layer, made cheaper."""
    kit = guard.kit.settings("rome")
    return replace(kit, contexts=kit.contexts[:CONTEXTS], **SETTINGS)


def wanted_of(guard: Guard, cases: Sequence[EvalCase], out: Path) -> Wanted:
    """Keys and values of all facts; values come from the folder where they are there."""
    hparams, told = settings(guard), time.monotonic()

    def progress(what: str, share: float) -> None:
        nonlocal told
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{what} ({share:.0%} of this block)", file=sys.stderr, flush=True)

    inputs = SolveInputs(guard.kit.second_moments, SEED, values=ValueShelf(out / "values"), progress=progress)
    return find_wanted(guard.handle, [case.request for case in cases], hparams, inputs)


def run(guard: Guard, cases: list[EvalCase], pool: list[EvalCase], out: Path) -> None:
    """Solve and measure every size by both editors."""
    wanted, path = wanted_of(guard, cases, out), out / "rows.jsonl"
    done = {(row["editor"], row["edits"]) for row in rows_of(path)}
    asked = with_neighbours(cases[:SAMPLE], NEIGHBOURS, pool, SEED)
    whole = Asking(extras=("far",), far_tokens=FAR_TOKENS).whole(guard.handle, ("far",), SEED)
    shared: dict[str, Any] = {}
    for size in (size for size in SIZES if size <= len(cases)):
        some = replace(
            wanted, requests=wanted.requests[:size], keys=wanted.keys[:size], values=wanted.values[:size]
        )
        for name in ("emmet", "memit"):
            if (name, size) not in done:
                row = {"editor": name, "edits": size, "share_of_d_in": size / guard.handle.d_in(some.layer)}
                row |= _measured(guard, name, some, asked[:size], whole, shared)
                with path.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(json.dumps(row)[:200], flush=True)


def _solved(guard: Guard, name: str, some: Wanted) -> EditDelta:
    inputs, kit = SolveInputs(guard.kit.second_moments, SEED), guard.kit.settings("memit")
    if name == "emmet":
        return emmet(guard.handle, some, EmmetHparams(layer=some.layer), inputs)
    return memit(guard.handle, some, MemitHparams(layer=some.layer, ridge=kit.ridge), inputs)


def _measured(
    guard: Guard, name: str, some: Wanted, asked: Sequence[EvalCase], whole: Any, shared: dict[str, Any]
) -> dict[str, Any]:
    """Solve, then the model's figures; a refusal is a result, too."""
    started = time.process_time()
    try:
        delta = _solved(guard, name, some)
    except GuardeditError as error:
        return {"refused": str(error)}
    spent = time.process_time() - started
    job = Job(
        name, lambda *_: delta, joint=True, whole=whole, remembered=shared, protocol=Protocol(len(asked))
    )
    found = evaluate(guard.handle, list(asked), job)
    figures = {key: found.metrics[key] for key in (*METRICS, "neighborhood_base") if found.metrics.get(key)}
    about = {key: delta.diagnostics[key] for key in ("missed_share", "gram_condition", "gram_rank")}
    ratio = delta.changes[0].update.dense().norm() / guard.handle.weight(some.layer).double().norm()
    return {
        **{key: figure.model_dump() for key, figure in figures.items() if figure}, **about,
        "delta_norm_ratio": float(ratio), "solve_cpu_seconds": spent,
        "solve_cpu_ms_per_edit": 1e3 * spent / len(some.requests),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What is measured already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(path: Path) -> str:
    """Value and 95 % interval of each size."""
    head = (
        "editor",
        "edits",
        "of d_in",
        *METRICS,
        "‖ΔW‖/‖W‖",
        "condition",
        "missed",
        "solve, CPU ms an edit",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows_of(path), key=lambda row: (row["editor"], row["edits"])):
        start = [row["editor"], str(row["edits"]), f"{row['share_of_d_in']:.2f}"]
        if "refused" in row:
            lines.append("| " + " | ".join([*start, "refused", *[""] * (len(head) - 4)]) + " |")
            continue
        figures = [row[key] for key in METRICS]
        cells = [f"{f['value']:.3g} ({f['low']:.2g}–{f['high']:.2g})" for f in figures]
        tail = [
            row["delta_norm_ratio"],
            row["gram_condition"],
            row["missed_share"],
            row["solve_cpu_ms_per_edit"],
        ]
        lines.append("| " + " | ".join([*start, *cells, *(f"{value:.2g}" for value in tail)]) + " |")
    return "\n".join(lines)


def plot(path: Path, svg: Path) -> None:
    """Efficacy, neighborhood and perplexity ratio against B / d_in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 3), ("efficacy", "neighborhood", "perplexity_ratio"), strict=True
    ):
        for editor in ("emmet", "memit"):
            rows = [r for r in rows_of(path) if r["editor"] == editor and "refused" not in r]
            rows.sort(key=lambda row: row["edits"])
            xs = [row["share_of_d_in"] for row in rows]
            low, value, high = ([row[name][end] for row in rows] for end in ("low", "value", "high"))
            axes.plot(xs, value, marker="o", label=editor)
            axes.fill_between(xs, low, high, alpha=0.2)
        axes.set(xscale="log", xlabel="facts / d_in", title=name.replace("_", " "))
        axes.set_yscale("log" if name == "perplexity_ratio" else "linear")
        axes.legend()
    figure.savefig(svg, format="svg", metadata={"Date": None})


def main() -> None:
    """Parse and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("values", "run"):
        step = steps.add_parser(name)
        step.add_argument("--data", type=Path, required=True)
        step.add_argument("--out", type=Path, required=True)
        step.add_argument("--until", type=int, default=SIZES[-1])
    steps.add_parser("table").add_argument("rows", type=Path)
    drawing = steps.add_parser("plot")
    drawing.add_argument("rows", type=Path)
    drawing.add_argument("--svg", type=Path, required=True)
    args = parser.parse_args()
    if args.step == "table":
        print(table(args.rows))
    elif args.step == "plot":
        plot(args.rows, args.svg)
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        guard, pool = open_guard(home=args.out / "home"), cases_of(args.data)
        cases = pool[: args.until]
        if args.step == "values":
            wanted_of(guard, cases, args.out)
        else:
            run(guard, cases, pool, args.out)


if __name__ == "__main__":
    main()
