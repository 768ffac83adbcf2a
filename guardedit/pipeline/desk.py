"""Answers from MLflow's Review tab, as decisions in the ledger.

One thing of an answer is trusted: who completed the item, and that only on a server with a login, because there the
server writes the name. What was chosen and why stands in an assessment, which others can write too; so it counts only
where everything under the completer's name says the same, nothing of it is newer than the completion, and the page is
the one that guardedit wrote. In doubt an answer is refused and the question asked again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from guardedit.audit.desk import reviews, server, traces
from guardedit.audit.desk.page import Page
from guardedit.audit.desk.reviews import Answer, Item
from guardedit.audit.desk.telling import Desk
from guardedit.errors import GuardeditError, HeldError, NeedsApprovalError, StaleError
from guardedit.pipeline.applying import read_report_facts
from guardedit.pipeline.deciding import Heard, decide_plan
from guardedit.pipeline.reporting import tracker, tracking_uri
from guardedit.pipeline.workspace import Workspace
from guardedit.records import Plan

NO_LOGIN = "this server has no login, so anybody could have written it"
_SLACK = timedelta(seconds=5)
"""The Review tab writes the answer and then completes the item."""


@dataclass(frozen=True)
class Heeded:
    """One answer that was found."""

    plan_id: str
    by: str
    outcome: str
    """approved, rejected, or refused."""
    reason: str
    """The reviewer's reason; of a refused answer, why it does not count."""


@dataclass(frozen=True)
class Collected:
    """What was found in the queue."""

    login: bool
    answers: tuple[Heeded, ...]
    waiting: tuple[str, ...]
    """Plans that nobody has answered about."""


def collect(workspace: Workspace) -> Collected:
    """Read the Review tab's completed answers and put on record those that count.

    What was refused, and what needs another person too, is asked again. Raises TrackingError where MLflow is away.
    """
    states = workspace.states()
    plans = [workspace.read_plan(one) for one, state in states.items() if state in ("needs-approval", "held")]
    found = server.look(tracking_uri(workspace))
    login = found is not None and found.login
    if not plans:
        return Collected(login, (), ())
    read = _read(workspace, plans, found)
    heeded = [_heed(workspace, one) for one in read if one.item is not None]
    again = [
        one.page.trace_id
        for one, heed in zip([one for one in read if one.item is not None], heeded, strict=True)
        if heed.outcome == "refused" or workspace.state(one.plan.plan_id) == "needs-approval"
    ]
    if again and login:
        with tracker(workspace).at_desk(plans[0].model_name) as (_, desk):
            for trace_id in again:
                desk.queue.ask_again(trace_id)
    return Collected(login, tuple(heeded), tuple(one.plan.plan_id for one in read if one.waiting))


@dataclass(frozen=True)
class _Found:
    """What the server has about one plan; nothing is on record yet."""

    plan: Plan
    page: Page
    item: Item | None
    """None: nobody has answered, or the answer is on record already."""
    answer: Answer | GuardeditError | None
    where: dict[str, Any]
    waiting: bool


def _read(workspace: Workspace, plans: list[Plan], found: server.Server | None) -> list[_Found]:
    with tracker(workspace).at_desk(plans[0].model_name) as (_, desk):
        items = desk.queue.items()
        return [_look(workspace, desk, plan, items, found) for plan in plans]


def _look(
    workspace: Workspace, desk: Desk, plan: Plan, items: dict[str, Item], found: server.Server | None
) -> _Found:
    page = desk.page(read_report_facts(workspace, plan))
    item = items.get(page.trace_id)
    if item is None or item.status == "pending":
        return _Found(plan, page, None, None, {}, True)
    where = {
        "at": "MLflow's review queue",
        "queue": desk.queue.queue_id,
        "item": item.trace_id,
        "completed": item.completed.isoformat() if item.completed else "",
        "completed_by": item.completed_by,
    }
    if any(entry.body.get("heard") == where for entry in workspace.history(plan.plan_id)):
        return _Found(plan, page, None, None, where, False)
    answer: Answer | GuardeditError
    try:
        answer = _answered(desk, plan, page, item, found)
    except (NeedsApprovalError, StaleError) as error:
        answer = error
    return _Found(plan, page, item, answer, where, False)


def _heed(workspace: Workspace, found: _Found) -> Heeded:
    """MLflow's word becomes the ledger's, bound to the plan's digest and dated when it was given; or it is refused."""
    plan_id, item, answer = found.plan.plan_id, found.item, found.answer
    by = (item.completed_by if item else None) or "nobody"
    if item is None or item.completed is None or not isinstance(answer, Answer):
        return Heeded(plan_id, by, "refused", str(answer))
    outcome = "approved" if answer.approves else "rejected"
    try:
        heard = Heard(item.completed, found.where)
        word = decide_plan(workspace, plan_id, outcome, answer.reason, by, heard=heard)
    except (NeedsApprovalError, StaleError, HeldError) as error:
        return Heeded(plan_id, by, "refused", str(error))
    return Heeded(plan_id, word.approver, word.outcome, word.reason)


def _answered(desk: Desk, plan: Plan, page: Page, item: Item, found: server.Server | None) -> Answer:
    """The answer, where it counts; NeedsApprovalError or StaleError say why not."""
    if found is None or not found.login:
        raise NeedsApprovalError(NO_LOGIN)
    if item.status != "complete" or item.completed_by is None or item.completed is None:
        raise NeedsApprovalError(f"the item was {item.status} without an answer")
    if not traces.is_shown(desk.tracing, page):
        raise StaleError(
            "the page on the server is not the one that guardedit wrote, so what was read is unknown"
        )
    answer = chosen(reviews.answers(desk.tracing, page.trace_id), item.completed_by, item.completed)
    if not answer.reason:
        raise NeedsApprovalError("no reason was written under Rationale")
    if answer.approves:
        _refuse_own(plan, item.completed_by, found.user)
    return answer


def chosen(answers: Iterable[Answer], by: str, completed: datetime) -> Answer:
    """What the completer chose; NeedsApprovalError where that is not plain. `source` of an answer is only a claim."""
    own = [one for one in answers if _same(one.source, by)]
    if not own:
        raise NeedsApprovalError(f"{by} completed it, but no answer stands under that name")
    if len({one.approves for one in own}) > 1:
        raise NeedsApprovalError(f"answers that contradict each other stand under the name of {by}")
    if any(one.changed > completed + _SLACK for one in own):
        raise NeedsApprovalError(
            f"the answer under the name of {by} was written after the item was completed"
        )
    return own[-1]


def _refuse_own(plan: Plan, by: str, account: str | None) -> None:
    if _same(by, plan.author):
        raise NeedsApprovalError(f"{by} wrote this plan; somebody else has to approve it")
    if account is not None and _same(by, account):
        raise NeedsApprovalError(
            f"{by} is the account that guardedit itself writes with, which cannot review"
        )


def _same(one: str, other: str) -> bool:
    return one.strip().casefold() == other.strip().casefold()


def problems(found: Collected) -> tuple[str, ...]:
    """Why answers do not count, a line each."""
    return tuple(
        f"{one.plan_id}: {one.by}: {one.reason}" for one in found.answers if one.outcome == "refused"
    )


def nothing_counted(found: Collected) -> bool:
    """Whether there were answers and none of them counts."""
    return bool(found.answers) and all(one.outcome == "refused" for one in found.answers)
