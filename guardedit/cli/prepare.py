"""Commands that prepare: stats collect, stats control, sae train | evaluate | show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

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

stats = typer.Typer(
    help="Second moments that edits are solved in.", no_args_is_help=True, rich_markup_mode=None
)
sae = typer.Typer(
    help="Sparse autoencoders that risk and drift are read with.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(stats, name="stats")
app.add_typer(sae, name="sae")

TextsArgument = Annotated[
    list[Path] | None, typer.Argument(help="Files (.txt, .jsonl, .jsonl.xz) or folders of them.")
]
LayerOption = Annotated[int, typer.Option("--layer", help="The layer that edits write to.")]


def _handle(options: Options) -> Any:
    from guardedit.models.sources import load

    return load(options.model)


@stats.command("collect")
def stats_collect(
    context: typer.Context,
    layer: LayerOption,
    texts: TextsArgument = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="At least 10 per dimension of the key space.")
    ] = 80_000,
    seed: Annotated[int, typer.Option("--seed", help="Order of the texts, or of what is sampled.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Kit folder; default: where the model's kit lies.")
    ] = None,
    band: Annotated[
        bool,
        typer.Option("--band", help="Add a layer for editors that write several; the kit stays at its own."),
    ] = False,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Collect the second moment of a layer's key space from text, or from the model's own words without any."""
    from guardedit.pipeline.preparing import collect_statistics

    options = from_context(context, model, home, as_json)
    status = console().status("collecting")
    with status:
        found = collect_statistics(
            _handle(options),
            layer,
            texts or (),
            tokens,
            seed,
            out,
            lambda n: status.update(f"{n} of {tokens} tokens"),
            band=band,
        )
    document = {
        "hook_name": found.hook_name,
        "n_tokens": found.n_tokens,
        "n_excluded": found.n_excluded,
        "digest": found.digest,
        "corpus_digest": found.corpus_digest,
        "warning": found.warning,
    }
    emit(options, document, f"{found.hook_name}: {found.n_tokens} tokens. {found.warning or ''}")


@stats.command("control")
def stats_control(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: where guardedit looks for it.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", help="Facts to protect, as CounterFact has them; default: well-known ones."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many of those facts.")] = 300,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample the control text that side effects are looked for in, from the model itself."""
    from guardedit.evaluation.readers import control_facts
    from guardedit.models.control import prepared_folder
    from guardedit.models.control_making import make_control

    options = from_context(context, model, home, as_json)
    handle = _handle(options)
    folder = out or prepared_folder(handle)
    status = console().status("sampling")
    with status:
        make_control(
            handle,
            folder,
            seed=seed,
            facts=control_facts(facts, limit, seed) if facts else None,
            progress=lambda what, n: status.update(f"{what}: {n}"),
        )
    emit(options, {"folder": str(folder)}, str(folder))


@sae.command("train")
def sae_train(
    context: typer.Context,
    layer: LayerOption,
    texts: Annotated[
        list[Path], typer.Option("--texts", help="File or folder of text, a file a domain. Repeatable.")
    ],
    tokens: Annotated[int, typer.Option("--tokens", help="Training tokens to gather.")] = 2_100_000,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Tokens to train on, with repeats.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Order of the tokens, and the first weights.")
    ] = None,
    latents: Annotated[
        int | None, typer.Option("--latents", min=1, help="Width of the dictionary, d_sae.")
    ] = None,
    active: Annotated[
        int | None, typer.Option("--active", min=1, help="Latents active a token, on average.")
    ] = None,
    facts: Annotated[Path | None, typer.Option("--facts", help="JSON lines with prompt and subject.")] = None,
    hook: Annotated[
        list[str] | None, typer.Option("--hook", help="A hook; default: the four that guard a layer.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the checkpoints.")] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gather activations, train, calibrate, grade and label; may be interrupted and goes on where it was."""
    from guardedit.saes.command import train_all
    from guardedit.saes.plan import TrainPlan
    from guardedit.saes.train import TrainSettings

    options = from_context(context, model, home, as_json)
    named: dict[str, Any] = {"samples": samples, "seed": seed, "d_sae": latents, "k": active}
    settings = replace(TrainSettings(), **{name: value for name, value in named.items() if value is not None})
    plan = TrainPlan(
        texts=tuple(texts),
        layer=layer,
        hook_names=tuple(hook or ()),
        settings=settings,
        tokens=tokens,
        facts=facts,
        out=out,
    )
    status = console().status("reading texts")
    with status:
        made = train_all(_handle(options), plan, lambda what, i, n: status.update(f"{what}: {i} of {n}"))
    emit(
        options,
        {"saes": {name: str(path) for name, path in made.items()}},
        "\n".join(map(str, made.values())),
    )


@sae.command("show")
def sae_show(
    context: typer.Context,
    hook: Annotated[str | None, typer.Argument(help="A hook; without one, all are listed.")] = None,
    latent: Annotated[
        list[int] | None, typer.Option("--latent", help="A latent to explain. Repeatable.")
    ] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quality card of the model's SAEs, and what single latents stand for."""
    from guardedit.errors import NotFoundError
    from guardedit.saes.checkpoints import load_all
    from guardedit.saes.command import show

    options = from_context(context, model, home, as_json)
    saes = load_all(options.model)
    if hook is not None and hook not in saes:
        raise NotFoundError(f"no SAE at {hook!r} for {options.model}; there are {', '.join(saes) or 'none'}")
    chosen = {name: found for name, found in saes.items() if hook in (None, name)}
    document = {name: show(found, latent or ()) for name, found in chosen.items()}
    emit(options, document, json.dumps(document, indent=1, ensure_ascii=False, default=str))


@sae.command("evaluate")
def sae_evaluate(
    context: typer.Context,
    layer: LayerOption,
    texts: Annotated[
        list[Path], typer.Option("--texts", help="File or folder of text, a file a domain. Repeatable.")
    ],
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure again how much of held-out text the model's SAEs explain, by domain."""
    from guardedit.saes.checkpoints import load_all, root
    from guardedit.saes.command import evaluate
    from guardedit.saes.plan import TrainPlan

    options = from_context(context, model, home, as_json)
    plan = TrainPlan(texts=tuple(texts), layer=layer)
    handle = _handle(options)
    with console().status("grading"):
        document = {
            name: evaluate(handle, plan, root() / options.model / name) for name in load_all(options.model)
        }
    emit(options, document, json.dumps(document, indent=1, ensure_ascii=False))
