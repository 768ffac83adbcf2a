"""Commands of REMEDI's map: remedi train | show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guardedit.cli.common import HomeOption, JsonOption, ModelOption, app, console, emit, from_context

if TYPE_CHECKING:
    from guardedit.edits.remedi_map import RemediMap
    from guardedit.records import EditRequest

remedi = typer.Typer(
    help="The map that `plan --editor remedi` takes its directions from.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(remedi, name="remedi")


@remedi.command("train")
def remedi_train(
    context: typer.Context,
    facts: Annotated[Path, typer.Argument(help="A CounterFact file, .json, .jsonl or .jsonl.xz.")],
    split: Annotated[str | None, typer.Option("--split", help="Only this split of the file.")] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, help="Whose output is read and pushed.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=10, help="Facts, one a subject.")] = 1500,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="At most.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="AdamW's first.")] = None,
    kept_weight: Annotated[
        float | None, typer.Option("--kept-weight", help="Of the KL between subject and prompt's end.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Which facts, which are held out, and their order.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the map. Default: the model's kit; the home, where that is shipped."
        ),
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the map on facts, a tenth of the subjects held out; may be interrupted and goes on where it was."""
    from guardedit.edits.remedi_training import RemediTraining
    from guardedit.models.sources import load
    from guardedit.pipeline.kit import MAPS, is_shipped
    from guardedit.pipeline.remedi import train_remedi

    options = from_context(context, model, home, as_json)
    named: dict[str, Any] = {
        "layer": layer, "epochs": epochs, "learning_rate": learning_rate, "kept_weight": kept_weight, "seed": seed,
    }  # fmt: skip
    settings = replace(
        RemediTraining(), **{name: value for name, value in named.items() if value is not None}
    )
    name, requests = _facts(facts, split, limit, seed)
    own = options.home / MAPS if is_shipped(options.model) else None
    status = console().status("reading facts")
    with status:
        made = train_remedi(
            load(options.model), requests, settings, data_name=name, out=out or own,
            told=lambda what, done, of: status.update(f"{what} ({done} of {of} steps)"),
        )  # fmt: skip
    emit(options, _document(made), _text(made))


@remedi.command("show")
def remedi_show(
    context: typer.Context,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cards of the maps that plans find: the home's own, then those of the model's kit."""
    from guardedit.edits.remedi_map import load_map
    from guardedit.errors import NotFoundError
    from guardedit.pipeline.kit import MAPS, kit_folder, map_folders

    options = from_context(context, model, home, as_json)
    folders = [f for place in (options.home, kit_folder(options.model)) for f in map_folders(place / MAPS)]
    if not folders:
        raise NotFoundError(
            f"{options.model} has no REMEDI map; train one with `guardedit remedi train FACTS`"
        )
    found = [load_map(folder) for folder in folders]
    emit(options, {"maps": [_document(one) for one in found]}, "\n\n".join(map(_text, found)))


def _facts(path: Path, split: str | None, limit: int, seed: int) -> tuple[str, list[EditRequest]]:
    """The first `limit` facts in the seed's order, one a subject, with their paraphrases."""
    from guardedit.evaluation.readers import choose, read_cases

    case_set = read_cases(path, split)
    first: dict[str, EditRequest] = {}
    for case in choose(case_set.cases, seed):
        request = case.request.model_copy(update={"paraphrases": case.paraphrases})
        first.setdefault(request.subject.casefold(), request)
    name = case_set.name if split is None else f"{case_set.name}, split {split}"
    return name, list(first.values())[:limit]


def _document(made: RemediMap) -> dict[str, Any]:
    return {"digest": made.digest, **made.card.model_dump(mode="json")}


def _text(made: RemediMap) -> str:
    card = made.card
    shares = {
        "efficacy": card.efficacy, "paraphrase": card.paraphrase, "P(new)": card.p_new,
        "KL between subject and prompt's end, nats": card.kept_kl_nats,
    }  # fmt: skip
    rows = [
        f"{name}: {s.value:.3f} ({s.low:.3f} to {s.high:.3f}, n {s.n})"
        for name, s in shares.items()
        if s is not None
    ]
    head = (
        f"{card.hook_name}: {card.n_train} facts of {card.data_name}, epoch {card.best_epoch} of {card.epochs}, "
        f"seed {card.seed}; on {card.n_held_out} held-out facts:"
    )
    return "\n".join([head, *rows])
