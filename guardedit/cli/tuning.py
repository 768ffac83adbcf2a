"""The command `tune`: which layer and settings for this model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from guardedit.cli.common import HomeOption, JsonOption, ModelOption, app, console, emit, from_context


@app.command()
def tune(
    context: typer.Context,
    facts: Annotated[
        Path | None, typer.Option("--facts", help="A CounterFact file; default: well-known facts that ship.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split of the file.")] = None,
    editor: Annotated[str, typer.Option("--editor", help="The method to tune.")] = "rome",
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers to try, 3,5,7; default: every second of the lower ones."),
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--set", help="Values to try, learning_rate=0.5,1. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Known facts for the finalists.")] = 40,
    first: Annotated[int, typer.Option("--first", min=1, help="Facts of the first round.")] = 6,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--texts", help="Text for second moments of layers without; default: the model's own words."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens for those second moments.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which facts; also of sampling and bootstrap.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Settings file to write, .toml or .json.")] = Path(
        "hparams.toml"
    ),
    state: Annotated[Path | None, typer.Option("--state", help="File that makes the run resumable.")] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try layers and settings on known facts and write the best ones into a file for --hparams."""
    from guardedit.evaluation.tune_cases import cases_of_file, shipped_cases
    from guardedit.evaluation.tune_table import markdown
    from guardedit.evaluation.tuning import TunePlan, start_settings
    from guardedit.models.sources import load
    from guardedit.pipeline.hparams import write_hparams
    from guardedit.pipeline.kit import require_editor

    options = from_context(context, model, home, as_json)
    require_editor(editor)
    plan = TunePlan(editor, _layers(layers), _grid(grid or ()), limit, first, seed)
    cases = cases_of_file(facts, split) if facts is not None else shipped_cases()
    handle = load(options.model)
    start = start_settings(handle, plan, _kit_settings(options.model, editor))
    found = _tuned(handle, cases, plan, start, texts or (), tokens, state)
    best, own = found.best, {name: getattr(start, name) for name in plan.values(start)}
    remark = (
        f"Found by guardedit tune for {handle.name}: harmonic mean of efficacy, paraphrase and neighborhood\n"
        f"{best.score.value:.3f} ({best.score.low:.3f} to {best.score.high:.3f}) on {best.n} known facts, {cases.name}."
    )
    write_hparams(out, editor, {"layer": best.layer}, {**own, **best.changed}, remark)
    emit(options, {**found.as_json(), "hparams": str(out)}, f"{markdown(found)}\n\n{best.name} is in {out}")


def _tuned(
    handle: Any, cases: Any, plan: Any, start: Any, texts: Any, tokens: int | None, state: Path | None
) -> Any:
    """Second moments, then the edits, with the size of the work said first and shown as it goes."""
    from guardedit.edits.inputs import SolveInputs
    from guardedit.evaluation.tuning import edits_planned, tune
    from guardedit.pipeline.preparing import moments_for

    err = console()
    err.print(f"at most {edits_planned(handle, plan, start, plan.facts)} edits")
    with err.status("collecting second moments") as status:
        moments = moments_for(
            handle, plan.candidates(handle), texts, tokens, plan.seed,
            lambda n: status.update(f"collecting second moments: {n} tokens"),
        )  # fmt: skip
        inputs = SolveInputs(moments, plan.seed)
        return tune(handle, cases, plan, start, inputs, state=state, progress=_Clock(err, status))


class _Clock:
    """Says how long tuning will take: as a line once two edits are timed, then beside the edit that is made."""

    def __init__(self, err: Any, status: Any) -> None:
        self._err, self._status = err, status
        self._since, self._done, self._said = 0.0, 0, False

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._done:
            self._since, self._done = time.perf_counter(), done
            return
        each = (time.perf_counter() - self._since) / (done - self._done)
        left = f"some {each * (total - done) / 60:.0f} minutes for at most {total - done} edits more"
        if not self._said:
            self._said = True
            self._err.print(left)
        self._status.update(f"{left}: {what}")


def _kit_settings(model: str, editor: str) -> Mapping[str, Any]:
    """The settings that the model's kit has for the editor; none without a kit."""
    from guardedit.pipeline.kit import KIT_FILE, kit_folder, read_kit

    path = kit_folder(model) / KIT_FILE
    settings: Mapping[str, Any] = read_kit(path)["hparams"].get(editor, {}) if path.is_file() else {}
    return settings


def _layers(text: str | None) -> tuple[int, ...]:
    from guardedit.errors import BadRequestError

    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise BadRequestError(f"--layers {text}: whole numbers with commas between, 3,5,7") from error


def _grid(words: Any) -> dict[str, tuple[float, ...]]:
    """`name=1,2` words as name -> values; whole numbers stay whole."""
    from guardedit.errors import BadRequestError

    found: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            found[name] = tuple(int(v) if v.strip().isdigit() else float(v) for v in values.split(","))
        except ValueError as error:
            raise BadRequestError(f"--set {word}: a setting and its values, learning_rate=0.5,1") from error
    return found
