"""The Review tab: the one place that talks to MLflow's review queues, label schemas and assessments.

All three are experimental in MLflow 3.17. What is trusted of them is one thing: `completed_by` of an item, and that
only on a server that asked for a login, because there the server writes it. Names on assessments are whatever their
writer says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from guardedit.audit.desk.page import APPROVE, QUESTION, REJECT
from guardedit.errors import TrackingError

if TYPE_CHECKING:
    from mlflow.tracing.client import TracingClient

QUEUE = "Edits that wait for a person"
MAX_REVIEWERS = 10
"""MLflow takes no more in a queue."""
_WITH_LOGIN = (
    "This server knows who you are. Read the whole page, choose, and write your reason under Rationale: without one "
    "the answer does not count. It goes on record under your login when `guardedit collect` reads it. Your own plan is "
    "somebody else's to approve."
)
_WITHOUT_LOGIN = (
    "THIS SERVER HAS NO LOGIN. What you choose here is a note and DOES NOT COUNT: anybody could have written it. "
    "Decide on the command line: guardedit approve PLAN --reason ... or guardedit reject PLAN --reason ..."
)


@dataclass(frozen=True)
class Item:
    """One question in the queue."""

    trace_id: str
    status: str
    """pending, complete or declined."""
    completed_by: str | None
    completed: datetime | None


@dataclass(frozen=True)
class Answer:
    """What was chosen under a question. `source` is a claim."""

    approves: bool
    reason: str
    source: str
    changed: datetime


def instruction(login: bool) -> str:
    """What stands under the question."""
    return _WITH_LOGIN if login else _WITHOUT_LOGIN


class Queue:
    """The queue of one experiment, made where it is missing."""

    def __init__(self, client: TracingClient, experiment: str, login: bool | None = None) -> None:
        """`login`: whether the server asks for one; None where that cannot be known, then what stands stays."""
        self._client = client
        found = _or_none(lambda: client._get_review_queue_by_name(experiment, QUEUE))
        schema = _schema(client, experiment, login)
        if found is None:
            found = client._create_review_queue(
                experiment, name=QUEUE, queue_type="custom", users=[], schema_ids=[schema]
            )
        self.queue_id = str(found.queue_id)
        self.users = tuple(found.users)

    def admit(self, users: list[str]) -> tuple[str, ...]:
        """Add reviewers; only they may answer on a server with a login."""
        wanted = list(dict.fromkeys([*self.users, *(user.strip().lower() for user in users)]))
        if len(wanted) > MAX_REVIEWERS:
            raise TrackingError(f"MLflow takes {MAX_REVIEWERS} reviewers in a queue, not {len(wanted)}")
        if wanted != list(self.users):
            self._client._update_review_queue(self.queue_id, users=wanted)
            self.users = tuple(wanted)
        return self.users

    def items(self, status: str | None = None) -> dict[str, Item]:
        """All questions, or those of a status, by trace."""
        return {item.trace_id: item for item in self._pages(status)}

    def _pages(self, status: str | None) -> Iterator[Item]:
        token: str | None = None
        while True:
            page = self._client._list_review_queue_items(
                self.queue_id, status=status, max_results=500, page_token=token
            )
            yield from (_item(raw) for raw in page)
            token = page.token
            if not token:
                return

    def put(self, trace_ids: list[str]) -> None:
        """Ask; a question that is there already stays as it is."""
        for start in range(0, len(trace_ids), 50):
            self._client._add_items_to_review_queue(self.queue_id, item_ids=trace_ids[start : start + 50])

    def take_back(self, trace_ids: list[str]) -> None:
        """Ask no longer."""
        for start in range(0, len(trace_ids), 50):
            self._client._remove_items_from_review_queue(
                self.queue_id, item_ids=trace_ids[start : start + 50]
            )

    def ask_again(self, trace_id: str) -> None:
        """Put a question that was answered in vain back to the others."""
        self.take_back([trace_id])
        self.put([trace_id])


def address(server: str, experiment: str, queue: Queue | None) -> str:
    """The queue's address in a browser."""
    chosen = f"?selectedQueueId={queue.queue_id}" if queue else ""
    return f"{server.rstrip('/')}/#/experiments/{experiment}/review-queue{chosen}"


def answers(client: TracingClient, trace_id: str) -> tuple[Answer, ...]:
    """The valid answers under a question, oldest first."""
    info = client.get_trace_info(trace_id)
    found = [_answer(raw) for raw in info.assessments if raw.name == QUESTION and raw.valid is not False]
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.changed))


def _answer(raw: Any) -> Answer | None:
    value = getattr(raw.feedback, "value", None) if getattr(raw, "feedback", None) else None
    meant = {APPROVE: True, REJECT: False, True: True, False: False}.get(value)
    if meant is None:
        return None
    return Answer(
        meant, (raw.rationale or "").strip(), str(raw.source.source_id or ""), _at(raw.last_update_time_ms)
    )


def _schema(client: TracingClient, experiment: str, login: bool | None) -> str:
    from mlflow.genai.label_schemas import InputPassFail

    found = _or_none(lambda: client._get_label_schema_by_name(experiment, QUESTION))
    text = instruction(bool(login))
    if found is None:
        found = client._create_label_schema(
            experiment, name=QUESTION, type="feedback", input=InputPassFail(APPROVE, REJECT), instruction=text,
            enable_comment=True,
        )  # fmt: skip
    elif login is not None and found.instruction != text:
        client._update_label_schema(found.schema_id, instruction=text)
    return str(found.schema_id)


def _or_none(look: Callable[[], Any]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return look()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _item(raw: Any) -> Item:
    done = raw.completed_time_ms
    return Item(str(raw.item_id), str(raw.status), raw.completed_by, _at(done) if done else None)


def _at(milliseconds: int | None) -> datetime:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC)
