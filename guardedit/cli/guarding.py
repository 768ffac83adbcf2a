"""Commands about the guard itself: `evaluate guard` tries it, `calibrate` fits its expectations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardedit.cli.common import (
    HomeOption,
    JsonOption,
    ModelOption,
    Options,
    app,
    console,
    emit,
    from_context,
)
from guardedit.errors import BadRequestError

if TYPE_CHECKING:
    import pandas as pd

    from guardedit.evaluation.guard.command import GuardJob

GUARD = "guard"
"""Stands in place of a data file: the guard is measured, by edits whose damage is measured beside its scores."""


def evaluate_the_guard(options: Options, job: GuardJob) -> None:
    """Try the edits and print how each score orders their damage."""
    from guardedit.evaluation.guard.command import TABLE, evaluate_guard

    status = console().status("choosing edits")
    with status:
        frame = evaluate_guard(
            options.guard(), job, progress=lambda what, i, n: status.update(f"{what}: {i} of {n}")
        )
    document: dict[str, Any] = {
        "rows": len(frame), "not_solved": int(frame["error"].notna().sum()), "table": str(job.out / TABLE),
        "editors": {editor: _figures(frame, editor) for editor in job.editors},
    }  # fmt: skip
    emit(options, document, _as_text(document))


def guard_job(
    facts: Path | None, out: Path | None, editor: str, strata: Sequence[str] | None, limit: int | None, seed: int,
    split: str | None, far: Sequence[str] | None, batch: Sequence[int] | None, sequence: int,
) -> GuardJob:  # fmt: skip
    """The job that the options describe; raises BadRequestError where one is missing."""
    from guardedit.evaluation.guard.command import GuardJob
    from guardedit.evaluation.guard.strata import STRATA
    from guardedit.evaluation.protocol import Protocol

    together = [*(Protocol(size) for size in batch or () if size > 1)]
    together += [Protocol(1, sequence)] if sequence > 1 else []
    if facts is None or out is None:
        raise BadRequestError(
            "evaluate guard needs --facts FILE (CounterFact) and --out FOLDER, where its rows are kept"
        )
    return GuardJob(
        facts=facts,
        out=out,
        editors=(editor,),
        strata=tuple(strata or STRATA),
        limit=limit or 100,
        split=split,
        seed=seed,
        far=dict(map(_named_file, far or ())),
        together=tuple(together),
    )


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise BadRequestError(f"--far {text!r}: give it as DOMAIN=FILE, e.g. fiction=novels.jsonl")
    return name, Path(path)


def _figures(frame: pd.DataFrame, editor: str) -> dict[str, Any]:
    """The best single scores by outcome."""
    from guardedit.evaluation.guard.association import spearman
    from guardedit.evaluation.guard.findings import alone, asdict_or_none
    from guardedit.evaluation.guard.fitting import OUTCOMES
    from guardedit.evaluation.guard.frames import measured
    from guardedit.evaluation.guard.strata import kinds

    found: dict[str, Any] = {}
    tried = measured(frame, editor, kinds())
    for outcome in OUTCOMES.values() if len(tried) >= 10 else ():
        best = list(alone(tried, outcome, spearman).items())[:5]
        found[outcome] = {score: asdict_or_none(rho) for score, rho in best}
    return found


def _as_text(document: dict[str, Any]) -> str:
    lines = [f"{document['rows']} edits, {document['not_solved']} not solved; table: {document['table']}"]
    for editor, outcomes in document["editors"].items():
        for outcome, scores in outcomes.items():
            lines += ["", f"{editor}, {outcome}: Spearman, 95 % interval over relations"]
            lines += [
                f"  {name:32} {f['value']:+.2f} ({f['low']:+.2f} to {f['high']:+.2f}), n {f['n']}"
                for name, f in scores.items()
            ]
        if not outcomes:
            lines += ["", f"{editor}: fewer than ten edits, no figures"]
    return "\n".join(lines)


@app.command()
def calibrate(
    context: typer.Context,
    rows: Annotated[Path, typer.Argument(help="A table of `evaluate guard`.")],
    out: Annotated[Path, typer.Option("--out", help="Where the risk model is written (.json).")],
    editor: Annotated[str, typer.Option("--editor", help="Whose edits.")] = "rome",
    seed: Annotated[int, typer.Option("--seed", help="Of the folds.")] = 0,
    harm_as: Annotated[
        Path | None,
        typer.Option(
            "--harm-as", help="A risk model: what is harm there is harm here. [its own worst tenth]"
        ),
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit expected damage by scope on edits whose damage was measured, and say how it does on unseen relations."""
    from guardedit.audit.files import write_atomic
    from guardedit.evaluation.guard.calibrating import calibrated
    from guardedit.evaluation.guard.frames import read_rows
    from guardedit.records import canonical
    from guardedit.risk.calibration import RiskModel

    options = from_context(context, model, home, as_json)
    settings = options.guard().kit.settings(editor)
    layers = getattr(settings, "layers", None) or (settings.layer,)
    as_there = RiskModel.load(harm_as) if harm_as is not None else None
    fitted, figures = calibrated(read_rows(rows), options.model, editor, layers, seed, as_there)
    write_atomic(out, canonical(fitted))
    document = {"risk_model": str(out), "digest": fitted.digest, "scopes": figures}
    emit(options, document, _model_as_text(document))


def _model_as_text(document: dict[str, Any]) -> str:
    lines = [f"risk model: {document['risk_model']} ({document['digest'][:19]})"]
    for scope, figures in document["scopes"].items():
        rho, area = figures["spearman"], figures["auroc"]
        lines.append(
            f"{scope}: n {figures['n']}, on unseen relations Spearman {rho['value']:.2f} "
            f"({rho['low']:.2f} to {rho['high']:.2f}), worst tenth AUROC {area['value']:.2f} "
            f"({area['low']:.2f} to {area['high']:.2f})"
        )
        lines += [f"    {weight:+.2f}  {score}" for score, weight in figures["weights"].items()]
    return "\n".join(lines)
