"""Many edits in one model, solved as one or one after the other: scored and measured as one update of the unedited one.

A batch is one solve. A sequence solves each fact on the model that the ones before have left; after 1, 2, 5, 10, …
edits its update so far, W − W₀ of every touched matrix, is scored and measured as if it had been proposed in one go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from guardedit.drift.measure import applied
from guardedit.editors import EDITORS
from guardedit.edits.deltas import Dense, EditDelta, WeightChange, change_of
from guardedit.errors import BadRequestError, SolveError
from guardedit.evaluation.guard.rows import Bench, Progress, measured_together
from guardedit.evaluation.guard.strata import Chosen
from guardedit.evaluation.methods import Session, Solve
from guardedit.evaluation.protocol import Protocol
from guardedit.evaluation.rowfile import RowFile
from guardedit.evaluation.solved import DeltaShelf
from guardedit.evaluation.stepping import solve_or_take
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, digest_of

BATCH, SEQUENCE = "batch of", "sequence of"


@dataclass(frozen=True)
class Together:
    """Edits that end up in one model."""

    editor: str
    protocol: Protocol

    def __post_init__(self) -> None:
        if self.protocol.batch > 1 and self.protocol.sequence > 1:
            raise BadRequestError(
                "the guard is tried on batches or on sequences, not on sequences of batches"
            )
        if self.protocol.batch > 1 and not EDITORS[self.editor].joint:
            raise BadRequestError(
                f"{self.editor} takes one fact at a time; try it in a sequence, or take an editor of batches: "
                f"{', '.join(name for name, one in EDITORS.items() if one.joint)}"
            )

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.editor}-{self.protocol.name}"

    def groups(self, edits: Sequence[Chosen]) -> list[list[Chosen]]:
        """Edits by model, in their order; those that would not fill a last one are left out.

        A batch holds one edit a subject: two with the same words up to the subject's end share a key, and no solve
        gives it two values.
        """
        size = max(self.protocol.batch, self.protocol.sequence)
        groups: list[list[Chosen]] = []
        for edit in edits:
            free = (one for one in groups if len(one) < size and not self._collides(one, edit))
            group = next(free, None)
            if group is None:
                groups.append([edit])
            else:
                group.append(edit)
        return [group for group in groups if len(group) == size]

    def _collides(self, group: Sequence[Chosen], edit: Chosen) -> bool:
        subject = edit.case.request.subject
        return self.protocol.batch > 1 and any(one.case.request.subject == subject for one in group)


def run_together(
    bench: Bench,
    edits: Sequence[Chosen],
    together: Together,
    folder: Path,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row a batch, or a row a checkpoint of each sequence; those that are there not again."""
    header = bench.header() | {"protocol": together.protocol.name}
    rows = RowFile(folder / f"{together.name}.jsonl", header)
    shelf = DeltaShelf(folder / f"{together.name}-steps", digest_of(header))
    done = rows.load()
    known = {(row["stratum"], row["case_id"]) for row in done}
    groups = together.groups(edits)
    for number, group in enumerate(groups, start=1):
        made = (
            _batch(bench, group, known) if together.protocol.batch > 1 else _steps(bench, group, shelf, known)
        )
        for row in made:
            rows.append(row)
            done.append(row)
        if progress is not None:
            progress(f"trying {together.name}", number, len(groups))
    return done


def _about(bench: Bench, kind: str, group: Sequence[Chosen]) -> dict[str, Any]:
    ids = [one.case.case_id for one in group]
    return {
        "stratum": f"{kind} {len(group)}",
        "case_id": f"{ids[0]}-{digest_of(ids).split(':')[1][:8]}",
        "editor": bench.editor,
        "error": None,
    }


def _named(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["stratum"], row["case_id"]


def _batch(bench: Bench, group: Sequence[Chosen], known: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    row = _about(bench, BATCH, group)
    if _named(row) in known:
        return
    started = time.process_time()
    try:
        requests = tuple(bench.request(one.case) for one in group)
        delta = bench.solve(requests)
    except (SolveError, BadRequestError) as error:
        yield row | {"error": str(error), "seconds": time.process_time() - started}
        return
    row["seconds_solving"] = time.process_time() - started
    yield row | measured_together(bench, requests, delta) | {"seconds": time.process_time() - started}


def _steps(
    bench: Bench, group: Sequence[Chosen], shelf: DeltaShelf, known: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """The sequence's rows. An edit that cannot be solved is passed over, as in a lineage it would not be written."""
    handle = bench.workspace.handle
    marks = Protocol(1, len(group)).checkpoints(len(group))
    abouts = {mark: _about(bench, SEQUENCE, group[:mark]) for mark in marks if mark > 1}
    if all(_named(about) in known for about in abouts.values()):
        return
    requests = tuple(bench.request(one.case) for one in group)
    first, started = group[0].case.case_id, time.process_time()
    with Session(handle) as session:
        for number, request in enumerate(requests, start=1):
            solve = _solver(bench, requests[: number - 1])
            solve_or_take(session, shelf, f"{first}-{number - 1:05d}", solve, (request,))
            about = abouts.get(number)
            if about is None or _named(about) in known:
                continue
            delta = _sum_of(handle, session.before, bench.editor)
            with applied(handle, session.before):
                row = about | measured_together(bench, requests[:number], delta)
            yield row | {"seconds": time.process_time() - started}


def _solver(bench: Bench, earlier: Sequence[EditRequest]) -> Solve:
    """The bench's editor on the model as it is; a request that it does not take is one that cannot be solved."""

    def solve(_: ModelHandle, requests: tuple[EditRequest, ...]) -> EditDelta:
        try:
            return bench.solve(requests, earlier)
        except BadRequestError as error:
            raise SolveError(str(error)) from error

    return solve


def _sum_of(handle: ModelHandle, base: Mapping[str, Tensor], editor: str) -> EditDelta:
    """What all edits so far have done to the weights, as one update."""
    changes: list[WeightChange] = []
    for name, before in base.items():
        old = before.T if handle.is_transposed(name) else before
        moved = handle.oriented(name).detach().double() - old.to(handle.device).double()
        changes.append(change_of(handle, name, Dense(moved.cpu())))
    ordered = tuple(sorted(changes, key=lambda c: (-1 if c.layer is None else c.layer, c.parameter)))
    return EditDelta(ordered, editor, {}, {})
