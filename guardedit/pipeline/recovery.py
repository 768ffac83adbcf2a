"""Alone with a home, and what a crash left put right first.

The ledger says what was decided, the versions say what is live. A commit and an undo are put on record before the
pointer is switched; so what is on record is finished, and a commit whose staged copy is gone is given up. An undo that
only the versions know (homes from before this order) is put on record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from guardedit.audit.lineage import Lineage
from guardedit.gate.states import State
from guardedit.pipeline.history import History, states_in
from guardedit.pipeline.outdating import half_replaced, outdate, overtaken, record_superseded

UNFINISHED = "the process ended before the monitor had finished"
LOST = "the commit was on record, but its staged copy is gone or was changed; it never went live"
GONE = "the staged copy is gone, was changed, or was made on another version; plan again"
UNDONE = "the undo had reached the versions, not the ledger"


@contextmanager
def editing(workspace: History) -> Iterator[None]:
    """The home to oneself, consistent, with the loaded model on the version that is live now.

    Raises LockedError while somebody else has it.
    """
    with workspace.store.lock():
        if workspace.store.exists:
            if _unsettled(workspace):
                recover(workspace)
            workspace.refresh()
        yield


def recover(workspace: History) -> dict[str, Any]:
    """Finish or drop what a crash left; doing it twice changes nothing more."""
    report: dict[str, Any] = {
        "finished": [], "dropped": [], "undone": [], "removed": [], "outdated": [],
    }  # fmt: skip
    if not workspace.home.is_dir():
        return report
    with workspace.store.lock():
        states = workspace.states()
        report["removed"] += _clean(workspace, states)
        if not workspace.store.exists:
            return report
        report["finished"] = _finish(workspace, states)
        if report["finished"]:
            # What else was staged stood on the version before.
            report["removed"] += _clean(workspace, states)
        report["undone"] = _finish_undo(workspace, states)
        told = _discrepancies(states, workspace.store.lineage(), set(workspace.store.staged_ids()))
        for plan_id, (name, reason) in told.items():
            _record(workspace, plan_id, reason, undone=name == "undone")
            report[name].append(plan_id)
        for plan_id, new in half_replaced(workspace.ledger.entries(), states).items():
            record_superseded(workspace, plan_id, new)
        report["outdated"] = outdate(workspace)
    return report


def _clean(workspace: History, states: Mapping[str, State]) -> list[str]:
    wanted = frozenset(plan_id for plan_id, state in states.items() if state in ("held", "committed"))
    return list(workspace.store.recover(wanted).dropped)


def _finish(workspace: History, states: Mapping[str, State]) -> list[str]:
    """Commits on record whose complete staged copy is still there."""
    found = [plan_id for plan_id in workspace.store.staged_ids() if states.get(plan_id) == "committed"]
    for plan_id in found:
        workspace.store.commit(plan_id)
    return found


def _finish_undo(workspace: History, states: Mapping[str, State]) -> list[str]:
    """Undos on record that had not reached the versions; the latest edit first, as each stands on those before."""
    found = list(reversed(_half_undone(workspace.store.lineage(), states)))
    for plan_id in found:
        workspace.store.roll_back(plan_id)
    return found


def _half_undone(lineage: Lineage, states: Mapping[str, State]) -> list[str]:
    """Edits that are live although the ledger says that they were rolled back, in the order of their commits."""
    return [
        v.edit_id
        for v in lineage.versions
        if v.action == "edit" and states.get(v.edit_id) == "rolled-back" and not lineage.undone(v.edit_id)
    ]


def _discrepancies(
    states: Mapping[str, State], lineage: Lineage, staged: set[str]
) -> dict[str, tuple[str, str]]:
    """Plan -> (which list of the report, why), of everything on record that the versions do not bear out."""
    found = {}
    for plan_id, state in states.items():
        word = _discrepancy(plan_id, state, lineage, staged)
        if word is not None:
            found[plan_id] = word
    return found


def _discrepancy(plan_id: str, state: State, lineage: Lineage, staged: set[str]) -> tuple[str, str] | None:
    if state in ("applied", "monitored"):
        return "dropped", UNFINISHED
    if state == "held" and plan_id not in staged:
        return "dropped", GONE
    if state == "committed" and lineage.edit(plan_id) is None:
        return "dropped", LOST
    if state == "committed" and lineage.undone(plan_id):
        return "undone", UNDONE
    return None


def _unsettled(workspace: History) -> bool:
    """Whether ledger and versions tell different stories. Cheap: no bytes of tensors are read."""
    entries, lineage = workspace.ledger.entries(), workspace.store.lineage()
    states, staged = states_in(entries), set(workspace.store.staged_ids())
    waited_for = {plan_id for plan_id, state in states.items() if state == "held"}
    return bool(
        staged - waited_for
        or _discrepancies(states, lineage, staged)
        or _half_undone(lineage, states)
        or overtaken(entries, states, lineage.digest)
        or half_replaced(entries, states)
    )


def disagreement(workspace: History) -> str | None:
    """Where ledger and versions tell different stories, in words; None where they agree."""
    states, lineage = workspace.states(), workspace.store.lineage()
    told = _discrepancies(states, lineage, set(workspace.store.staged_ids()))
    for plan_id, (_, reason) in told.items():
        return f"edit {plan_id} is {states[plan_id]} in the ledger, but {reason}"
    for version in lineage.versions:
        if lineage.undone(version.edit_id):
            known = states.get(version.edit_id) == "rolled-back"
        else:
            known = states.get(version.edit_id) == "committed"
        if not known:
            return f"version {version.name} is not what the ledger says of edit {version.edit_id}"
    return None


def _record(workspace: History, plan_id: str, reason: str, undone: bool) -> None:
    body = {"event": "roll-back", "plan_id": plan_id, "edit_id": plan_id, "reason": reason, "undone": undone}
    workspace.ledger.append("rolled-back", body)
