"""The command that measures methods: evaluate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardedit.cli.common import (
    HomeOption,
    HparamsOption,
    JsonOption,
    ModelOption,
    Options,
    app,
    console,
    emit,
    from_context,
)
from guardedit.cli.guarding import GUARD, evaluate_the_guard, guard_job

if TYPE_CHECKING:
    from guardedit.evaluation.datasets import Asking
    from guardedit.evaluation.summary import Evaluation

ABILITY = "ability"
"""Stands in place of a data file: the live model itself is measured, nothing is edited."""


@app.command()
def evaluate(
    context: typer.Context,
    dataset: Annotated[
        Path,
        typer.Argument(
            help="A CounterFact, zsRE, KnowEdit, MQuAKE or HalluEditBench file (.json, .jsonl, .jsonl.xz); or the "
            "word ability: arithmetic, syllogisms and more on the live model, without an edit; or the word guard: "
            "edits whose damage is measured beside the guard's scores."
        ),
    ],
    editor: Annotated[
        str, typer.Option("--editor", help="An editor, or in-context: the fact stated in every prompt.")
    ] = "rome",
    limit: Annotated[int | None, typer.Option("--limit", help="How many cases.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Which cases; also of sampling and bootstrap.")] = 0,
    known_only: Annotated[
        bool, typer.Option("--known-only", help="Only facts that the model knows.")
    ] = False,
    split: Annotated[str | None, typer.Option("--split", help="Only this split of the file.")] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            help="Facts solved as one. Repeatable, for a curve; of guard, in place of single edits.",
        ),
    ] = None,
    sequence: Annotated[
        int,
        typer.Option(
            "--sequence",
            help="Edits on top of each other before all are taken back; of guard, in place of single ones.",
        ),
    ] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Also through the chat template.")] = False,
    neighbours: Annotated[
        int, typer.Option("--neighbours", help="Fill the neighborhood up to this number.")
    ] = 0,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="Measure more: distractors, subject, generated, fluency, far, ability, or all. Repeatable.",
        ),
    ] = None,
    blimp: Annotated[
        Path | None, typer.Option("--blimp", help="Minimal pairs (.jsonl), for ability.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Held-out text, for ability.")] = None,
    items: Annotated[int, typer.Option("--items", help="Items a skill, for ability.")] = 100,
    hparams: HparamsOption = None,
    state: Annotated[Path | None, typer.Option("--state", help="File that makes the run resumable.")] = None,
    values: Annotated[
        Path | None,
        typer.Option("--values", help="Folder in which solved values are kept, for other editors too."),
    ] = None,
    facts: Annotated[Path | None, typer.Option("--facts", help="CounterFact, for guard.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the rows and the table, for guard.")
    ] = None,
    stratum: Annotated[
        list[str] | None,
        typer.Option("--stratum", help="known, unknown, adversarial, for guard. Repeatable."),
    ] = None,
    far: Annotated[
        list[str] | None, typer.Option("--far", help="More far text, DOMAIN=FILE, for guard. Repeatable.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw quality against the number of edits (.svg).")
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Edit many facts, alone, in batches or in sequence, and measure what became of them and of everything else."""
    from guardedit.evaluation.datasets import Asking, evaluate_dataset
    from guardedit.evaluation.protocol import Protocol
    from guardedit.evaluation.summary import markdown
    from guardedit.pipeline.hparams import read_hparams

    options = from_context(context, model, home, as_json)
    asking = Asking(extras=tuple(also or ()), ability_items=items, blimp=blimp, text=text)
    if str(dataset) == ABILITY and not dataset.exists():
        _ability(options, asking, seed)
        return
    if str(dataset) == GUARD and not dataset.exists():
        job = guard_job(facts, out, editor, stratum, limit, seed, split or "train", far, batch, sequence)
        evaluate_the_guard(options, replace(job, hparams=read_hparams(hparams, editor)))
        return
    protocols = [Protocol(size, sequence) for size in batch or [1]]
    status = console().status("choosing cases")
    with status:
        found = evaluate_dataset(
            options.guard(),
            dataset,
            editor=editor,
            limit=limit,
            seed=seed,
            known_only=known_only,
            split=split,
            variants=("raw", "chat") if chat else ("raw",),
            neighbours=neighbours,
            protocols=protocols,
            asking=asking,
            hparams=read_hparams(hparams, editor),
            state=state,
            values=values,
            progress=lambda what, i, n: status.update(f"{what}: {i} of {n}"),
        )
    if plot is not None:
        _draw(found, plot)
    emit(options, found.as_json(), markdown(found))


def _ability(options: Options, asking: Asking, seed: int) -> None:
    from guardedit.evaluation.datasets import measure_ability

    with console().status("asking"):
        found = measure_ability(options.guard(), asking, seed)
    document: dict[str, Any] = {
        "metrics": {name: figure.model_dump() if figure else None for name, figure in found.items()},
        "seed": seed,
        "protocol": "right continuation or sentence likelier than the wrong one, teacher-forced; bootstrap over items",
    }
    lines = ["| skill | value | 95 % interval | items |", "|---|---|---|---|"]
    for name, figure in found.items():
        if figure is not None:
            interval = f"{figure.low:.3f} to {figure.high:.3f}"
            lines.append(f"| {name} | {figure.value:.3f} | {interval} | {figure.n} |")
    emit(options, document, "\n".join(lines) + "\n")


def _draw(found: Evaluation, path: Path) -> None:
    from guardedit.audit.files import write_atomic
    from guardedit.evaluation.plot import curve_svg

    edits = found.about["editor"], found.about["dataset"], f"{found.n} cases"
    write_atomic(path, curve_svg(found.curve, ", ".join(edits)).encode())
