"""Evaluate an editor on a data file with the kit of a workspace: what `guardedit evaluate DATASET` calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from guardedit.editors import EDITORS
from guardedit.edits.contexts import sample_contexts
from guardedit.edits.deltas import EditDelta
from guardedit.edits.inputs import SolveInputs
from guardedit.evaluation.readers import choose, read_cases, with_neighbours
from guardedit.evaluation.run import Job, Progress, Solve, evaluate, select
from guardedit.evaluation.summary import Evaluation
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.workspace import Workspace
from guardedit.records import EditRequest


def evaluate_dataset(
    workspace: Workspace,
    path: Path,
    *,
    editor: str = "rome",
    limit: int | None = 100,
    seed: int = 0,
    known_only: bool = False,
    split: str | None = None,
    variants: tuple[str, ...] = ("raw",),
    neighbours: int = 0,
    hparams: Mapping[str, Any] | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Edit `limit` cases of the file one at a time on the workspace's live model; the model is left as it was.

    `seed` decides which cases are drawn, the editor's sampling and the bootstrap. `neighbours` fills each case's
    neighborhood up to that number from the same split (see `with_neighbours`). `state` makes the run resumable.
    Nothing goes into the ledger: no version is staged.
    """
    case_set = read_cases(path, split)
    settings = workspace.kit.settings(editor, hparams)
    cases = choose(case_set.cases, seed)
    chosen = select(workspace.handle, cases, limit=limit, known_only=known_only, progress=progress)
    if neighbours:
        # From the same split only: another split's facts are not to be looked at, not even as neighbours.
        chosen = replace(chosen, cases=tuple(with_neighbours(chosen.cases, neighbours, case_set.cases, seed)))
    settings = with_contexts(workspace.handle, settings, seed)
    job = Job(
        editor=editor,
        solve=bind(editor, settings, SolveInputs(workspace.kit.second_moments, seed, workspace.kit.saes)),
        hparams=plain(settings),
        dataset=case_set.name if split is None else f"{case_set.name}, split {split}",
        dataset_digest=case_set.digest,
        seed=seed,
        variants=variants,
    )
    found = evaluate(workspace.handle, chosen, job, state=state, progress=progress)
    extra = {"known_only": known_only, "neighbours": neighbours, "left_out": len(case_set.left_out)}
    return found.model_copy(update={"about": {**found.about, **extra}})


def bind(editor: str, settings: Any, inputs: SolveInputs) -> Solve:
    """The editor with everything but model and requests fixed."""

    def solve(handle: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        return EDITORS[editor].solve(handle, requests, settings, inputs)

    return solve


def with_contexts(handle: ModelHandle, settings: Any, seed: int) -> Any:
    """The settings with their sampled prefixes filled in, where the editor uses any: sampled once, not once a case."""
    if getattr(settings, "contexts", None) != () or not hasattr(settings, "n_prefixes"):
        return settings
    return replace(settings, contexts=sample_contexts(handle, settings.n_prefixes, seed))


def plain(settings: Any) -> dict[str, Any]:
    """Settings as plain JSON values, for the record."""
    if not is_dataclass(settings) or isinstance(settings, type):
        return {}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
    }
