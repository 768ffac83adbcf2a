"""One edit, solved, scored by the guard and measured where the guard did not look; nothing is written to the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from guardedit.audit.files import write_atomic
from guardedit.editors import EDITORS
from guardedit.edits.deltas import EditDelta, encode
from guardedit.edits.inputs import SolveInputs
from guardedit.edits.value_shelf import ValueShelf
from guardedit.errors import BadRequestError, GuardeditError, SolveError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.datasets import with_contexts
from guardedit.evaluation.guard.far_sample import FarSample
from guardedit.evaluation.guard.outcome_prompts import Neighbours, named, outcome_prompts
from guardedit.evaluation.guard.predictors import guard_scores, seen_by_the_guard, trivial
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.rowfile import RowFile
from guardedit.models.handle import ModelHandle
from guardedit.models.hooks import key_hook
from guardedit.pipeline.asking import complete
from guardedit.pipeline.measuring import key_layer, risk_contexts
from guardedit.pipeline.planning import statistics_of
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest, RiskReport
from guardedit.risk.compare import Compared, compare
from guardedit.risk.context import RiskContext
from guardedit.risk.key_view import views_of
from guardedit.risk.many import SURROUNDED, sample_requests
from guardedit.risk.measure import measure
from guardedit.risk.rehearsal import RehearsalView

NAMED = 5
"""Neighbours that the request names, as a careful proposer would; the outcome is measured on others."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bench:
    """What the rows of one editor are made with."""

    workspace: Workspace
    editor: str
    pool: Neighbours
    seed: int = 0
    more_far: Mapping[str, Sequence[str]] | None = None
    deltas: Path | None = None
    """Folder in which the solved deltas are kept, for other measurements of the same edits."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    """Settings over the kit's own."""
    values: Path | None = None
    """Folder of the values that locate-then-edit editors find: the same facts, alone and in batches, need them once."""

    @cached_property
    def settings(self) -> Any:
        """The kit's and those over them, with the label contexts drawn."""
        settings = self.workspace.kit.settings(self.editor, self.hparams)
        return with_contexts(self.workspace.handle, settings, self.seed)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers that the editor writes, the one that is screened first."""
        own = getattr(self.settings, "layers", None) or (self.settings.layer,)
        first = key_layer(self.workspace, self.settings)
        return (first, *(layer for layer in own if layer != first))

    @cached_property
    def contexts(self) -> dict[int, RiskContext]:
        """What the guard measures with, as a plan would have it."""
        known = [one for one in self.layers if key_hook(one) in self.workspace.kit.second_moments]
        return risk_contexts(self.workspace, known)

    @cached_property
    def far(self) -> FarSample:
        """Control text that the guard did not calibrate on."""
        return FarSample.of(self.workspace.handle, min(self.layers), self.seed, self.more_far)

    def solve(self, requests: Sequence[EditRequest], earlier: Sequence[EditRequest] = ()) -> EditDelta:
        """The editor's update for these requests on the model as it is now; named neighbours are not seen."""
        bare = tuple(request.model_copy(update={"neighborhood": ()}) for request in requests)
        kit = self.workspace.kit
        shelf = ValueShelf(self.values) if self.values is not None else None
        inputs = SolveInputs(kit.second_moments, self.seed, kit.saes, earlier=tuple(earlier), values=shelf)
        return EDITORS[self.editor].solve(self.workspace.handle, bare, self.settings, inputs)

    def request(self, case: EvalCase) -> EditRequest:
        """The case's request as a careful person files it."""
        return named(complete(self.workspace.handle, case.request), self.pool, NAMED, self.seed)

    def header(self) -> dict[str, Any]:
        """What the rows belong to."""
        named = {"hparams": dict(self.hparams)} if self.hparams else {}
        return named | {
            "model_digest": self.workspace.handle.digest(),
            "editor": self.editor,
            "seed": self.seed,
            "far": self.far.digest,
            "statistics": statistics_of(self.workspace, self.editor),
        }


def run_rows(
    bench: Bench, edits: Iterable[Chosen], rows: RowFile, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """A row an edit, those that are there not again. An edit that cannot be solved is a row that says so."""
    done = rows.load()
    known = {(row["stratum"], row["case_id"]) for row in done}
    todo = [one for one in edits if (one.stratum, one.case.case_id) not in known]
    for number, one in enumerate(todo, start=1):
        row = one_row(bench, one)
        rows.append(row)
        done.append(row)
        if progress is not None:
            progress(f"trying {bench.editor}", number, len(todo))
    return done


def one_row(bench: Bench, one: Chosen) -> dict[str, Any]:
    """Solve one edit, score it and measure it."""
    started = time.process_time()
    case = one.case
    row: dict[str, Any] = {
        "stratum": one.stratum,
        "case_id": case.case_id,
        "editor": bench.editor,
        "error": None,
    }
    try:
        request = bench.request(case)
        row |= {
            "subject": request.subject, "relation": request.prompt,
            "target_new": request.target_new, "target_true": request.target_true,
        }  # fmt: skip
        delta = bench.solve((request,))
    except (SolveError, BadRequestError) as error:
        return row | {"error": str(error), "seconds": time.process_time() - started}
    row["seconds_solving"] = time.process_time() - started
    keep(bench, one, delta)
    return row | measured_together(bench, (request,), delta) | {"seconds": time.process_time() - started}


def keep(bench: Bench, one: Chosen, delta: EditDelta) -> None:
    """Store the edit's update, where the bench has a folder for it."""
    if bench.deltas is not None:
        bench.deltas.mkdir(parents=True, exist_ok=True)
        write_atomic(bench.deltas / f"{one.stratum}-{one.case.case_id}.safetensors", encode(delta))


def measured_together(bench: Bench, requests: Sequence[EditRequest], delta: EditDelta) -> dict[str, Any]:
    """Scores and damage of one delta for one or many requests; the model has to be the unedited one."""
    report, view = _risk(bench, requests, delta)
    handle = bench.workspace.handle
    simple = _trivial(handle, view) if len(requests) == 1 else {}
    texts, groups = _outcome_texts(bench, requests, view)
    try:
        compared = compare(handle, delta, texts, ["near"] * len(texts))
        far = bench.far.moves(delta)
    except (FloatingPointError, GuardeditError) as error:
        return {"error": str(error)}
    return {
        "predictors": {**guard_scores(report), **simple},
        "outcomes": {**by_group(compared, groups), **{f"far/{name}": value for name, value in far.items()}},
        "seconds_scoring": dict(report.seconds),
        "p_new": next(s.value for s in report.scores if s.name == "rehearsed_p_new"),
    }


def _trivial(handle: ModelHandle, view: RehearsalView) -> dict[str, float | None]:
    (one,) = view.views
    return trivial(handle, one.request, [probe.prompt for probe in one.near.probes], view.context.layer)


def _outcome_texts(
    bench: Bench, requests: Sequence[EditRequest], view: RehearsalView
) -> tuple[list[str], list[str]]:
    """Prompts that no score rests on, around each request or a sample of them, and the group of each."""
    seen, about = seen_by_the_guard(view)
    # What a batch edits is no bystander of another of its edits.
    edited = [request.subject for request in requests] if len(requests) > 1 else []
    texts: list[str] = []
    groups: list[str] = []
    for index in sample_requests(len(requests), SURROUNDED, bench.seed):
        found = outcome_prompts(
            bench.workspace.handle, requests[index], bench.pool, seen, [*about, *edited], bench.seed
        )
        for prompt, group in zip(*found.flat(), strict=True):
            texts.append(prompt)
            groups.append(group)
    return texts, groups


def _risk(
    bench: Bench, requests: Sequence[EditRequest], delta: EditDelta
) -> tuple[RiskReport, RehearsalView]:
    """The report that a plan of this edit would hold, and the prompts that it rests on."""
    first, *rest = bench.layers
    context = bench.contexts[first]
    views = views_of(context, requests)
    others = [bench.contexts[layer] for layer in rest if layer in bench.contexts]
    return measure(context, requests, delta, others, views), RehearsalView(context, views, delta)


def by_group(compared: Sequence[Compared], groups: Sequence[str]) -> dict[str, float | int]:
    """Mean KL, worst KL and lost top-1 answers of each group, with the number of its prompts."""
    found: dict[str, list[Compared]] = {}
    for one, group in zip(compared, groups, strict=True):
        found.setdefault(group, []).append(one)
    values: dict[str, float | int] = {}
    for group, several in found.items():
        kls = [one.kl_nats for one in several]
        values |= {
            f"{group}/kl_nats": sum(kls) / len(kls),
            f"{group}/kl_max_nats": max(kls),
            f"{group}/lost_top1": sum(one.top_before != one.top_after for one in several) / len(several),
            f"{group}/n": len(several),
        }
    return values
