"""Edit many facts one at a time, each on the unedited model, and measure what became of them and their neighbours.

Base metrics, edit written into the weights, metrics, old bytes back: the model is the same after every case, and that
is checked at the end. Results go to a state file as they come, so a run can be interrupted and taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardedit.edits.deltas import EditDelta, written
from guardedit.errors import BadRequestError, IntegrityError, SolveError
from guardedit.evaluation.metrics import KINDS, CaseScores, PromptScore
from guardedit.evaluation.readers import EvalCase
from guardedit.evaluation.scoring import Layout, TargetScore, lay_out, score, score_pairs
from guardedit.evaluation.state import CaseResult, StateFile
from guardedit.evaluation.summary import Evaluation, summarise
from guardedit.executors import Executor, LocalExecutor
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of

Solve = Callable[[ModelHandle, tuple[EditRequest, ...]], EditDelta]
"""An editor with its settings, second moments and seed bound: solves, writes nothing."""
Progress = Callable[[str, int, int], None]
"""Called with (what, cases done, cases in all)."""

VARIANTS: dict[str, Callable[[ModelHandle, str], str]] = {
    "raw": lambda handle, prompt: prompt,
    "chat": lambda handle, prompt: handle.chat(prompt) + prompt,
    "chat-bare": lambda handle, prompt: handle.chat(prompt),
}
"""How a stem is put to the model: as it is; as a user's message whose sentence the assistant has begun to repeat, so
that the target is its continuation; as a user's message, the target being the whole answer."""


@dataclass(frozen=True)
class Selection:
    """Cases to edit and how many were looked at to find them."""

    cases: tuple[EvalCase, ...]
    n_seen: int


@dataclass(frozen=True)
class Job:
    """What is evaluated and under which name it is on record."""

    editor: str
    solve: Solve
    hparams: Mapping[str, Any] = field(default_factory=dict)
    """Plain values, for the record only: `solve` has them bound already."""
    dataset: str = ""
    dataset_digest: str = ""
    seed: int = 0
    variants: tuple[str, ...] = ("raw",)
    """The first one is the headline."""
    batch_size: int = 32


def select(
    handle: ModelHandle,
    cases: Iterable[EvalCase],
    *,
    limit: int | None = None,
    known_only: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """The first `limit` cases in the order given; `known_only` takes those whose true object the model says by itself.

    Known means that greedy decoding of the prompt begins with `target_true`; P(true) > P(new) would not be enough.
    """
    taken: list[EvalCase] = []
    seen = 0
    for block in _blocks(cases, 64):
        if limit is not None and len(taken) >= limit:
            break
        known = _known(handle, block) if known_only else [True] * len(block)
        for case, keep in zip(block, known, strict=True):
            if limit is not None and len(taken) >= limit:
                break
            seen += 1
            taken += [case] if keep else []
        if progress is not None:
            progress("choosing cases", len(taken), limit if limit is not None else seen)
    return Selection(tuple(taken), seen)


def evaluate(
    handle: ModelHandle,
    selection: Selection | Sequence[EvalCase],
    job: Job,
    *,
    state: Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Edit and measure every case of the selection; see the module's head.

    Raises BadRequestError for no cases or an unknown variant, StaleError where `state` belongs to another run, and
    IntegrityError if the model is not what it was at the end. A case that cannot be solved is recorded and counted.
    """
    chosen = selection if isinstance(selection, Selection) else Selection(tuple(selection), len(selection))
    _check(chosen, job)
    started, before = time.perf_counter(), handle.digest()
    about = _about(handle, chosen, job, before)
    memory = StateFile(state, about) if state is not None else None
    done = memory.load() if memory is not None else {}
    todo = [case for case in chosen.cases if case.case_id not in done]
    for result in (executor or LocalExecutor()).map(lambda case: measure_case(handle, case, job), todo):
        done[result.case_id] = result
        if memory is not None:
            memory.append(result)
        if progress is not None:
            progress("editing", len(done), len(chosen.cases))
    if handle.digest() != before:
        raise IntegrityError(
            f"{handle.name} is not the model that the evaluation began with; no figure is reported"
        )
    results = [done[case.case_id] for case in chosen.cases]
    seconds = time.perf_counter() - started
    return summarise(results, about=about, n_seen=chosen.n_seen, seconds=seconds, seed=job.seed)


def measure_case(handle: ModelHandle, case: EvalCase, job: Job) -> CaseResult:
    """One case: scores, edit, scores, edit taken back. The editor sees the request without its evaluation prompts."""
    layout, index = _layout(handle, case, job)
    before = _arrange(score(handle, layout), index)
    started = time.perf_counter()
    try:
        delta = job.solve(handle, (case.request,))
        seconds = time.perf_counter() - started
        with written(handle, delta):
            after = _arrange(score(handle, layout), index)
    except SolveError as error:
        seconds = time.perf_counter() - started
        return CaseResult(case_id=case.case_id, before=before, after=None, seconds=seconds, error=str(error))
    return CaseResult(
        case_id=case.case_id, before=before, after=after, seconds=seconds, diagnostics=dict(delta.diagnostics)
    )


Index = list[tuple[str, str]]
"""(variant, kind) of each prompt, in the order in which they are scored."""


def _layout(handle: ModelHandle, case: EvalCase, job: Job) -> tuple[Layout, Index]:
    """Every prompt of the case in every variant, each with its new and its true target."""
    prompts = {
        "rewrite": (case.request.filled,),
        "paraphrase": case.paraphrases,
        "neighborhood": case.neighborhood,
        "distractor_neighborhood": case.distractors,
    }
    asked = [(variant, kind, stem) for variant in job.variants for kind in KINDS for stem in prompts[kind]]
    texts = [VARIANTS[variant](handle, stem) for variant, _, stem in asked]
    targets = (case.request.target_new, case.target_true)
    layout = lay_out(handle, [(text, target) for text in texts for target in targets], job.batch_size)
    return layout, [(variant, kind) for variant, kind, _ in asked]


def _arrange(scores: Sequence[TargetScore], index: Index) -> dict[str, CaseScores]:
    """The flat list of scores, two a prompt, back into variants and kinds."""
    found: dict[str, dict[str, list[PromptScore]]] = {variant: {} for variant, _ in index}
    for at, (variant, kind) in enumerate(index):
        pair = PromptScore(new=scores[2 * at], true=scores[2 * at + 1])
        found[variant].setdefault(kind, []).append(pair)
    return {variant: CaseScores.model_validate(kinds) for variant, kinds in found.items()}


def _known(handle: ModelHandle, cases: Sequence[EvalCase]) -> list[bool]:
    scores = score_pairs(handle, [(case.request.filled, case.target_true) for case in cases])
    return [found.greedy for found in scores]


def _blocks(cases: Iterable[EvalCase], size: int) -> Iterable[list[EvalCase]]:
    block: list[EvalCase] = []
    for case in cases:
        block.append(case)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _check(selection: Selection, job: Job) -> None:
    if not selection.cases:
        raise BadRequestError(
            f"no case to evaluate; {selection.n_seen} were looked at. Raise the limit, or take others"
        )
    unknown = [name for name in job.variants if name not in VARIANTS]
    if unknown or not job.variants:
        raise BadRequestError(f"variants {unknown or 'none'}: choose from {', '.join(VARIANTS)}")
    ids = [case.case_id for case in selection.cases]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise BadRequestError(f"case {twice[0]} is there twice; every case is evaluated once")


def _about(handle: ModelHandle, selection: Selection, job: Job, model_digest: str) -> dict[str, Any]:
    """What the results depend on: kept in the state file's header and in the outcome."""
    return {
        "model": handle.name,
        "model_digest": model_digest,
        "editor": job.editor,
        "hparams": dict(job.hparams),
        "dataset": job.dataset,
        "dataset_digest": job.dataset_digest,
        "cases_digest": digest_of([case.model_dump(mode="json") for case in selection.cases]),
        "prompts": list(job.variants),
        "editor_seed": job.seed,
    }
