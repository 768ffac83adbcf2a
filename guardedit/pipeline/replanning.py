"""A plan made anew on today's model, and what is different: nobody has to read the whole of it twice.

The difference goes into the ledger with the entry that says what replaced what, so that whoever reviews the new plan
reads it there, without a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guardedit.edits.activations import ActivationChange
from guardedit.edits.deltas import EditDelta
from guardedit.errors import GuardeditError, IntegrityError, LockedError
from guardedit.gate.approvals import waiver_problem
from guardedit.gate.states import PENDING, State, advance
from guardedit.pipeline.outdating import moved_on, moved_since
from guardedit.pipeline.planning import make_plan
from guardedit.pipeline.recorded import recorded_settings
from guardedit.pipeline.sealing import Replacing
from guardedit.pipeline.workspace import Workspace
from guardedit.records import Finding, Plan, Waiver

MOVED = 0.01
"""A score that changed by a smaller share of itself is not shown."""
_RANK = {"auto-approved": 0, "needs-approval": 1, "blocked": 2}
_VERDICTS = {"pass": 0, "inconclusive": 1, "fail": 2}


@dataclass(frozen=True)
class Replanned:
    """An old plan, and the new one or why there is none."""

    old: str
    new: Plan | None
    difference: dict[str, Any]
    problem: GuardeditError | None = None


def due(workspace: Workspace) -> list[str]:
    """Plans that are stale or expired, or wait and were made from something that is another today."""
    return [
        plan_id
        for plan_id, state in workspace.states().items()
        if state in ("stale", "expired")
        or (state in PENDING and _changed(workspace, workspace.read_plan(plan_id)))
    ]


def replan(workspace: Workspace, plan_ids: Sequence[str] = ()) -> tuple[Replanned, ...]:
    """Make plans anew on today's model, or without names all that are `due`; each old one is superseded.

    A plan that cannot be made any more is answered with its problem and stays as it is. Raises NotFoundError, the error
    of the state of a plan that is past this (before anything is solved), LockedError, IntegrityError.
    """
    named = list(dict.fromkeys(plan_ids))
    for plan_id in named:
        workspace.plan_entry(plan_id)
        advance(workspace.state(plan_id), "supersede")
    return tuple(_attempt(workspace, plan_id) for plan_id in named or due(workspace))


def _attempt(workspace: Workspace, plan_id: str) -> Replanned:
    try:
        return _again(workspace, workspace.read_plan(plan_id))
    except (LockedError, IntegrityError):
        raise
    except GuardeditError as error:
        return Replanned(plan_id, None, {}, error)


def _again(workspace: Workspace, old: Plan) -> Replanned:
    because = moved_on(workspace, old.plan_id) or _changed(workspace, old)
    waivers, dropped = _waivers(workspace, old)
    state, found = workspace.state(old.plan_id), {}

    def told(made: Plan) -> dict[str, Any]:
        found.update(_story(workspace, old, made, state, because, dropped))
        return {"difference": found}

    with _seed(workspace, old.seed):
        made = make_plan(
            workspace,
            (*old.requests, *old.stopped),
            old.editor,
            waivers,
            settings_of(old),
            Replacing(old.plan_id, told),
        )
    return Replanned(old.plan_id, made, found)


@contextmanager
def _seed(workspace: Workspace, seed: int) -> Iterator[None]:
    """The old plan's seed, so that what differs is not chance."""
    settings = workspace.settings
    workspace.settings = settings.model_copy(update={"seed": seed})
    try:
        yield
    finally:
        workspace.settings = settings


def _waivers(workspace: Workspace, old: Plan) -> tuple[list[Waiver], list[str]]:
    """Waivers that still count, and why the others do not."""
    problems = [(waiver, waiver_problem(waiver, workspace.now())) for waiver in old.waivers]
    if workspace.kit.policy.signed:
        problems = [(waiver, problem or "the policy wants signed words") for waiver, problem in problems]
    kept = [waiver for waiver, problem in problems if problem is None]
    return kept, [f"{waiver.metric}: {problem}" for waiver, problem in problems if problem is not None]


def _changed(workspace: Workspace, plan: Plan) -> list[str]:
    """What the plan was made from and is another today."""
    kit = workspace.kit
    return moved_since(plan, workspace.store.digest(), kit.policy.digest, kit.digests)


def settings_of(plan: Plan) -> dict[str, Any]:
    """The editor's settings as the plan was solved with them.

    Openings that the editor writes for each request anew (`contextual`) are left to it, as are texts that hold the
    separator.
    """
    found, _ = recorded_settings(plan)
    return {name: value for name, value in found.items() if (name, plan.editor) != ("contexts", "contextual")}


def _story(
    workspace: Workspace, old: Plan, new: Plan, state: State, because: Sequence[str], dropped: Sequence[str]
) -> dict[str, Any]:
    return {
        **difference(old, new),
        "old_state": state,
        "because": list(because),
        "waivers_dropped": list(dropped),
        "delta": apart(workspace.read_delta(old), workspace.read_delta(new)),
    }


def difference(old: Plan, new: Plan) -> dict[str, Any]:
    """What is different between two judgements of the same requests: outcome, verdicts, and scores that moved."""
    verdicts = _verdicts(old.judgement.findings, new.judgement.findings)
    worse = [
        row
        for row in verdicts
        if row["level"] != "advisory" and _VERDICTS[row["after"]] > _VERDICTS[row["before"] or "pass"]
    ]
    outcomes = (old.judgement.outcome, new.judgement.outcome)
    return {
        "old": old.plan_id,
        "new": new.plan_id,
        "outcome": {"before": outcomes[0], "after": outcomes[1]},
        "not_worse": _RANK[outcomes[1]] <= _RANK[outcomes[0]] and not worse,
        "verdicts": verdicts,
        "scores": _scores(old, new),
    }


def _verdicts(old: Sequence[Finding], new: Sequence[Finding]) -> list[dict[str, Any]]:
    """Limits whose verdict is another, or that are new and not kept."""
    before = {(finding.rule, finding.metric): finding.verdict for finding in old}
    rows = [(finding, before.get((finding.rule, finding.metric))) for finding in new]
    return [
        {
            "metric": finding.metric,
            "level": finding.level,
            "before": was,
            "after": finding.verdict,
            "sentence": finding.sentence,
        }
        for finding, was in rows
        if finding.verdict != (was or "pass")
    ]


def _scores(old: Plan, new: Plan) -> list[dict[str, Any]]:
    """Scores that moved by more than `MOVED` of themselves, the most moved first."""
    before = {score.name: score.value for score in old.risk.scores}
    rows = [
        {"name": score.name, "unit": score.unit, "before": before.get(score.name), "after": score.value}
        for score in new.risk.scores
    ]
    moved = [(row, _moved(row["before"], row["after"])) for row in rows]
    kept = sorted((pair for pair in moved if pair[1] > MOVED), key=lambda pair: -pair[1])
    return [row for row, _ in kept]


def _moved(before: Any, after: Any) -> float:
    """Share of the larger of two values by which they differ; infinite where one cannot be measured."""
    if before is None or after is None:
        return 0.0 if before is after else math.inf
    largest = max(abs(before), abs(after))
    return abs(after - before) / largest if largest else 0.0


def apart(old: EditDelta, new: EditDelta) -> dict[str, Any]:
    """How far two solved changes of weights are apart: ‖new − old‖ / ‖old‖ (1 when nothing is shared, 0 when equal) and
    their cosine, over all parameters; None where the old one is zero, or where activations are edited."""
    acting = [change for change in (*old.changes, *new.changes) if isinstance(change, ActivationChange)]
    if acting:
        return {"distance": None, "cosine": None, "identical": _bytes_of(old) == _bytes_of(new)}
    pairs = list(_pairs(old, new))
    moved = sum(float((after - before).square().sum()) for before, after in pairs)
    inner = sum(float((before * after).sum()) for before, after in pairs)
    first, second = (sum(float(pair[i].square().sum()) for pair in pairs) for i in (0, 1))
    return {
        "distance": math.sqrt(moved / first) if first else None,
        "cosine": inner / math.sqrt(first * second) if first and second else None,
        "identical": moved == 0.0,
    }


def _pairs(old: EditDelta, new: EditDelta) -> Iterator[tuple[Tensor, Tensor]]:
    """Both updates of each parameter, zeros where one has none."""
    before, after = ({c.parameter: c.update.dense() for c in delta.changes} for delta in (old, new))  # type: ignore[union-attr]
    for name in sorted(before.keys() | after.keys()):
        here, there = before.get(name), after.get(name)
        known = here if here is not None else after[name]
        zeros = torch.zeros_like(known)
        yield (zeros if here is None else here), (zeros if there is None else there)


def _bytes_of(delta: EditDelta) -> list[tuple[str, bytes]]:
    return [(c.parameter, c.data) for c in delta.changes if isinstance(c, ActivationChange)]
