"""One group of cases through its steps: solve, write on top, measure; at the end every old byte is back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from guardedit.errors import SolveError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.measuring import Probing, Unedited, edited_side, unedited_side
from guardedit.evaluation.methods import Session, Solve
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.solved import DeltaShelf, Solved
from guardedit.evaluation.state import CaseResult, Key
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

T = TypeVar("T")
Whole = Callable[[Session | None], dict[str, tuple[float, ...]]]
"""Figures of the model as a whole under edits, or of the unedited one for None."""


@dataclass(frozen=True)
class Group:
    """Cases that end up in one model."""

    number: int
    steps: Sequence[Sequence[EvalCase]]
    solve_after: Callable[[tuple[EditRequest, ...]], Solve]
    """The solver once some facts are edited already, oldest first."""
    joint: bool
    """Whether the solver takes many requests at once."""
    probing: Probing
    protocol: Protocol
    whole: Whole | None = None
    remembered: dict[str, tuple[Unedited, float]] | None = None
    """Unedited sides by case, with their seconds: several methods that ask the same cases the same may share them."""

    def unedited(self, handle: ModelHandle, case: EvalCase) -> tuple[Unedited, float]:
        """The case's unedited side; the model must be the unedited one."""
        known = self.remembered if self.remembered is not None else {}
        if case.case_id not in known:
            known[case.case_id] = _timed(partial(unedited_side, handle, case, self.probing))
        return known[case.case_id]

    def due(self) -> dict[Key, bool]:
        """Every measurement of the group in order -> whether it is one of a checkpoint."""
        marks = self.protocol.checkpoints(len(self.steps))
        found: dict[Key, bool] = {}
        for number, step in enumerate(self.steps, start=1):
            sofar = [case for one in self.steps[:number] for case in one]
            measured = sofar if number in marks else step
            found |= {(case.case_id, len(sofar)): number in marks for case in measured}
        return found


Keep = Callable[[CaseResult], None]
"""Told each measurement as soon as it is there."""


def measure_group(
    handle: ModelHandle,
    group: Group,
    done: Mapping[Key, CaseResult],
    keep: Keep,
    shelf: DeltaShelf | None = None,
) -> None:
    """Hand the measurements that are not `done` yet to `keep`; the model is left as it was, also by an exception."""
    missing = [key for key in group.due() if key not in done]
    if not missing:
        return
    wanted = {case_id for case_id, _ in missing}
    cases = [case for step in group.steps for case in step if case.case_id in wanted]
    # All unedited sides come first: later edits must be compared with the unedited model, not with the one before.
    before = {case.case_id: group.unedited(handle, case) for case in cases}
    whole_base = group.whole(None) if group.whole is not None else {}
    with Session(handle) as session:
        for result in _stepped(session, group, before, done, shelf):
            keep(result.model_copy(update={"whole_base": whole_base if result.whole else {}}))


@dataclass(frozen=True)
class _Outcome:
    """What a step's solve came to, without its tensors: those are in the model, and a long sequence cannot hold all."""

    applied: bool
    seconds: float
    """Of one of the step's cases."""
    error: str | None
    diagnostics: Mapping[str, float | int | str | bool | None]


def _outcome(solved: Solved, cases: int) -> _Outcome:
    return _Outcome(solved.edit is not None, solved.seconds / cases, solved.error, solved.diagnostics)


def _stepped(
    session: Session,
    group: Group,
    before: Mapping[str, tuple[Unedited, float]],
    done: Mapping[Key, CaseResult],
    shelf: DeltaShelf | None,
) -> Iterator[CaseResult]:
    """Every measurement that is not done, in order, while the edits pile up."""
    due, solved = group.due(), dict[str, _Outcome]()
    edited: list[EvalCase] = []
    for number, step in enumerate(group.steps):
        outcome = _outcome(_solve_step(session, group, number, edited, shelf), len(step))
        edited += step
        solved |= {case.case_id: outcome for case in step}
        keys = {case.case_id: (case.case_id, len(edited)) for case in edited}
        now = [case for case in edited if keys[case.case_id] in due and keys[case.case_id] not in done]
        for case in now:
            checkpoint = due[keys[case.case_id]]
            whole = group.whole(session) if group.whole and checkpoint and case is edited[-1] else {}
            result = _measured(session, group, before[case.case_id], solved[case.case_id])
            yield result.model_copy(update={"edits": len(edited), "checkpoint": checkpoint, "whole": whole})


def _measured(session: Session, group: Group, before: tuple[Unedited, float], solved: _Outcome) -> CaseResult:
    """One case under all edits so far. A single edit that could not be solved leaves nothing to measure."""
    unedited, spent = before
    nothing = not solved.applied and len(group.steps) == 1
    after, more = (None, 0.0) if nothing else _timed(lambda: edited_side(session, unedited, group.probing))
    return CaseResult(
        case_id=unedited.sheet.case.case_id,
        before=unedited.scores,
        after=after,
        seconds=solved.seconds,
        error=solved.error,
        diagnostics=dict(solved.diagnostics),
        group=group.number,
        seconds_measuring=spent + more,
    )


def _solve_step(
    session: Session, group: Group, number: int, edited: Sequence[EvalCase], shelf: DeltaShelf | None
) -> Solved:
    """Solve the step's requests and put them in force: as one where the method can, else in turn."""
    earlier = tuple(request for case in edited for request in case.requests)
    requests = tuple(request for case in group.steps[number] for request in case.requests)
    parts = [requests] if group.joint else [(request,) for request in requests]
    found: list[Solved] = []
    for at, part in enumerate(parts):
        name = f"{group.number:05d}-{number:05d}-{at:03d}"
        solve = group.solve_after((*earlier, *requests[:at]))
        solved = solve_or_take(session, shelf, name, solve, part)
        found.append(solved)
    return found[0] if len(found) == 1 else _together(found)


def solve_or_take(
    session: Session, shelf: DeltaShelf | None, name: str, solve: Solve, requests: tuple[EditRequest, ...]
) -> Solved:
    """What the shelf has under the name, or else what is solved now and kept there; the edit is in force afterwards."""
    solved = shelf.get(name) if shelf is not None else None
    if solved is None:
        solved = _solved(session, solve, requests)
        if shelf is not None:
            shelf.put(name, solved)
    elif solved.edit is not None:
        session.add(solved.edit)
    return solved


def _solved(session: Session, solve: Solve, requests: tuple[EditRequest, ...]) -> Solved:
    started = time.perf_counter()
    try:
        edit = solve(session.handle, requests)
        seconds = time.perf_counter() - started
        session.add(edit)
    except SolveError as error:
        return Solved(None, time.perf_counter() - started, str(error))
    return Solved(edit, seconds)


def _together(parts: Sequence[Solved]) -> Solved:
    """One outcome of a case with several edits that were solved in turn: failed if any of them is."""
    seconds = sum(part.seconds for part in parts)
    failed = next((part for part in parts if part.edit is None), None)
    return Solved((failed or parts[-1]).edit, seconds, failed.error if failed is not None else None)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
