"""The command `trace`: where a fact's states matter, one fact as a heat map or many as a table."""

from __future__ import annotations

import re
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

_IN_BRACES = re.compile(r"\{([^{}]+)\}")


@app.command()
def trace(
    context: typer.Context,
    fact: Annotated[
        str | None, typer.Argument(help='A prompt with its subject in braces: "The capital of {France} is".')
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", help="The subject, where the prompt has no braces.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help="What the model must say; default: whatever it says.")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option("--facts", help="A file of facts: those are traced, or set the noise for FACT."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split of the file.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many known facts of the file.")] = 50,
    every: Annotated[int, typer.Option("--every", min=1, help="Trace every n-th layer only.")] = 1,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Layers restored together; default 10.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Corrupted rows.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Which facts of the file, and the bootstrap.")] = 0,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the figure into this file.")] = None,
    state: Annotated[Path | None, typer.Option("--state", help="File that makes --facts resumable.")] = None,
    model: ModelOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Causal tracing: corrupt the subject, restore one state at a time, see where the answer comes back."""
    from guardedit.errors import BadRequestError
    from guardedit.models.tracing import TraceSettings

    if fact is None and facts is None:
        raise BadRequestError("give a fact to trace, or a file with --facts")
    options = from_context(context, model, home, as_json)
    settings = TraceSettings(every=every, window=window, samples=samples)
    if fact is not None:
        _one(options, _fact(fact, subject, answer), facts, split, settings, svg)
    elif facts is not None:
        _many(options, facts, split, settings, svg, limit=limit, seed=seed, state=state)


def _fact(text: str, subject: str | None, answer: str | None) -> Any:
    """The fact of a prompt with its subject in braces, or with `subject` somewhere in it."""
    from guardedit.errors import BadRequestError
    from guardedit.models.tracing import Fact

    named = _IN_BRACES.findall(text)
    if subject is None and len(named) == 1:
        return Fact(named[0], _IN_BRACES.sub("{}", text), answer)
    if subject is None:
        raise BadRequestError(f"put the subject of {text!r} in braces, or name it with --subject")
    prompt = text if "{}" in text else text.replace(subject, "{}", 1)
    if "{}" not in prompt:
        raise BadRequestError(f"subject {subject!r} is not in {text!r}")
    return Fact(subject, prompt, answer)


def _one(
    options: Options, fact: Any, facts: Path | None, split: str | None, settings: Any, svg: Path | None
) -> None:
    from guardedit.cli.heatmap import heatmap
    from guardedit.evaluation.facts import read_facts, well_known
    from guardedit.evaluation.trace_figures import draw_fact
    from guardedit.evaluation.traces import CAVEAT, settings_of, traced
    from guardedit.models.tracing import embedding_std
    from guardedit.models.tracing import trace as trace_fact

    subjects = (read_facts(facts, split) if facts is not None else well_known()).subjects
    status = console().status("tracing")
    with status:
        handle = options.guard().handle
        std = embedding_std(handle, subjects)
        run = trace_fact(handle, fact, std, settings, lambda share: status.update(f"tracing: {share:.0%}"))
    found, about = traced(run, fact.subject, fact.prompt), settings_of(handle, settings, std)
    _draw(svg, lambda: draw_fact(found, about["window"]))
    document = {
        **found.model_dump(mode="json"), "total_effect": found.total_effect, **about, "caveat": CAVEAT,
    }  # fmt: skip
    head = (
        f"P({found.answer.strip()}) {found.p_clean:.3f}, with the subject corrupted {found.p_corrupted:.3f}: "
        f"total effect {found.total_effect:.3f}"
    )
    emit(options, document, f"{head}\n{heatmap(found)}\n\n{CAVEAT}")


def _many(
    options: Options, path: Path, split: str | None, settings: Any, svg: Path | None, **how: Any
) -> None:
    from guardedit.evaluation.facts import read_facts
    from guardedit.evaluation.trace_figures import draw_table
    from guardedit.evaluation.traces import markdown, trace_facts

    facts = read_facts(path, split)
    status = console().status("tracing")
    with status:
        handle = options.guard().handle
        table = trace_facts(
            handle, facts, settings, progress=lambda what, i, n: status.update(f"{what}: {i} of {n}"), **how
        )
    _draw(svg, lambda: draw_table(table))
    emit(options, table.as_json(), markdown(table))


def _draw(svg: Path | None, draw: Any) -> None:
    """Write the figure, where one is wanted."""
    if svg is not None:
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(draw(), encoding="utf-8")
