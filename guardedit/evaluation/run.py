"""Edit many facts, alone, in batches or in sequence, and measure what became of them and their neighbours.

Base metrics, edits written into the weights, metrics, old bytes back: the model is the same after every group of cases,
and that is checked at the end. Results go to a state file as they come, so a run can be interrupted and taken up again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardedit.errors import BadRequestError, IntegrityError
from guardedit.evaluation.asking import VARIANTS
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.measuring import Probing, Unedited
from guardedit.evaluation.methods import Solve
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.scoring import score_pairs
from guardedit.evaluation.solved import DeltaShelf
from guardedit.evaluation.state import CaseResult, Key, StateFile
from guardedit.evaluation.stepping import Group, Keep, Whole, measure_group
from guardedit.evaluation.summary import Evaluation, summarise
from guardedit.executors import Executor, LocalExecutor, split
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of

__all__ = [
    "VARIANTS", "Job", "Progress", "Protocol", "Selection", "Solve", "evaluate", "measure_case", "select",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called with (what, cases done, cases in all)."""


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
    """Rows a forward pass."""
    protocol: Protocol = field(default_factory=Protocol)
    joint: bool = False
    """`solve` takes many requests at once."""
    solve_after: Callable[[tuple[EditRequest, ...]], Solve] | None = None
    """`solve` for a model in which these facts are edited already; without it, `solve` is not told of them."""
    extras: tuple[str, ...] = ()
    """Names of `EXTRAS` that are measured; the cases must hold the prompts for them."""
    whole: Whole | None = None
    """Figures of the model as a whole."""
    whole_about: Mapping[str, Any] = field(default_factory=dict)
    """What those figures rest on, for the record."""
    remembered: dict[str, tuple[Unedited, float]] | None = None
    """Unedited sides, shared by the jobs of one model, the same cases and the same questions."""

    def probing(self, cases: Sequence[EvalCase]) -> Probing:
        """What every case is asked."""
        return Probing(
            variants=self.variants,
            generated="generated" in self.extras,
            free_text="fluency" in self.extras,
            batch_size=self.batch_size,
            seed=self.seed,
            corpus=tuple(sorted({text for case in cases for text in case.references})),
        )

    def group(self, number: int, steps: Sequence[Sequence[EvalCase]], cases: Sequence[EvalCase]) -> Group:
        """Cases that end up in one model."""
        return Group(
            number=number,
            steps=steps,
            solve_after=self._solver_after,
            joint=self.joint,
            probing=self.probing(cases),
            protocol=self.protocol,
            whole=self.whole,
            remembered=self.remembered,
        )

    def _solver_after(self, earlier: tuple[EditRequest, ...]) -> Solve:
        return self.solve_after(earlier) if self.solve_after is not None and earlier else self.solve


def select(
    handle: ModelHandle,
    cases: Iterable[EvalCase],
    *,
    limit: int | None = None,
    known_only: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """The first `limit` cases in the order given; `known_only` takes those whose true object the model says by itself.

    Known means that greedy decoding of the prompt begins with `target_true`; P(true) > P(new) would not be enough. A
    case with several edits is known if all of their facts are; one without an old answer on record never is.
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

    Raises BadRequestError for no cases, an unknown variant or a batch for a method that takes one fact at a time,
    StaleError where `state` belongs to another run, and IntegrityError if the model is not what it was at the end. A
    case that cannot be solved is recorded and counted.
    """
    chosen = selection if isinstance(selection, Selection) else Selection(tuple(selection), len(selection))
    _check(chosen, job)
    started, before = time.perf_counter(), handle.digest()
    about = _about(handle, chosen, job, before)
    memory = StateFile(state, about) if state is not None else None
    done = memory.load() if memory is not None else {}
    shelf = _shelf(state, about, job)
    groups = [job.group(i, steps, chosen.cases) for i, steps in enumerate(job.protocol.groups(chosen.cases))]
    wanted = sum(len(group.due()) for group in groups)
    keep = _keeper(done, memory, wanted, progress)
    for _ in (executor or LocalExecutor()).map(
        lambda group: measure_group(handle, group, done, keep, shelf), groups
    ):
        pass
    if handle.digest() != before:
        raise IntegrityError(
            f"{handle.name} is not the model that the evaluation began with; no figure is reported"
        )
    results = [done[key] for group in groups for key in group.due()]
    seconds = time.perf_counter() - started
    return summarise(results, about=about, n_seen=chosen.n_seen, seconds=seconds, seed=job.seed)


def measure_case(handle: ModelHandle, case: EvalCase, job: Job) -> CaseResult:
    """One case alone: scores, edit, scores, edit taken back. The editor does not see the evaluation prompts."""
    found: list[CaseResult] = []
    measure_group(handle, job.group(0, [[case]], [case]), {}, found.append)
    return found[0]


def _keeper(
    done: dict[Key, CaseResult], memory: StateFile | None, wanted: int, progress: Progress | None
) -> Keep:
    def keep(result: CaseResult) -> None:
        done[(result.case_id, result.edits)] = result
        if memory is not None:
            memory.append(result)
        if progress is not None:
            progress("editing", len(done), wanted)

    return keep


def _shelf(state: Path | None, about: dict[str, Any], job: Job) -> DeltaShelf | None:
    """Where solved edits of a sequence are kept: an edit alone is measured as soon as it is solved."""
    if state is None or job.protocol.steps == 1:
        return None
    return DeltaShelf(state.with_name(f"{state.name}.deltas"), digest_of(about))


def _known(handle: ModelHandle, cases: Sequence[EvalCase]) -> list[bool]:
    """Every fact of the case is what greedy decoding says."""
    scored = [request for case in cases for request in case.requests if request.target_true is not None]
    scores = score_pairs(handle, [(request.filled, request.target_true or "") for request in scored])
    said = {request: found.greedy for request, found in zip(scored, scores, strict=True)}
    return [all(said.get(request, False) for request in case.requests) for case in cases]


def _blocks(cases: Iterable[EvalCase], size: int) -> Sequence[Sequence[EvalCase]]:
    return split(list(cases), size)


def _check(selection: Selection, job: Job) -> None:
    if not selection.cases:
        raise BadRequestError(
            f"no case to evaluate; {selection.n_seen} were looked at. Raise the limit, or take others"
        )
    unknown = [name for name in job.variants if name not in VARIANTS]
    if unknown or not job.variants:
        raise BadRequestError(f"variants {unknown or 'none'}: choose from {', '.join(VARIANTS)}")
    if job.protocol.batch > 1 and not job.joint:
        raise BadRequestError(
            f"{job.editor} takes one fact at a time, so there is no batch of {job.protocol.batch}; "
            f"use --sequence {job.protocol.batch} to have each on top of the one before"
        )
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
        "edits": {"batch": job.protocol.batch, "sequence": job.protocol.sequence},
        "measured": list(job.extras),
        **job.whole_about,
    }
