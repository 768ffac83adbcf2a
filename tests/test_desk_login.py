"""Answers on a server with a login: counted under the name that the server wrote, and under no other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk_helpers import Running, add_people, answer, call, complete, running
from pipeline_helpers import SOFT, Home, empty_mlflow, home, request_of, world

from guardedit.audit.desk.page import trace_id
from guardedit.audit.mlflow_store import connected
from guardedit.errors import NeedsApprovalError
from guardedit.pipeline import Guard
from guardedit.pipeline.applying import read_report_facts
from guardedit.pipeline.desk import Collected, collect
from guardedit.pipeline.reporting import tracker
from guardedit.pipeline.serving import give_roles
from guardedit.records import Plan

__all__ = ["empty_mlflow", "home", "world"]
pytest.importorskip("flask_wtf", reason="the extra guardedit[login] is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REASON = "read the page"
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("login"), empty_mlflow, login=True) as made:
        add_people(made)
        yield made


class Asked:
    """A plan that waits for a person, told to the server by an account of its own."""

    def __init__(self, home: Home, server: Running, patch: pytest.MonkeyPatch, author: str = "ben") -> None:
        self.home, self.server = home, server
        patch.setattr("guardedit.pipeline.history.current_user", lambda: author)
        for name, value in (("USERNAME", "admin"), ("PASSWORD", "a-long-enough-password")):
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)
        self.guard = self.fresh()
        # The server is shared, and one plan's name belongs to one home.
        self.plan: Plan = self.guard.plan(request_of(subject=f"Tower {next(NUMBERS)}"))
        assert self.guard.sync()["notes"] == []
        give_roles(self.guard, ["ana", "eva", "ben"], ["run"])
        self.trace = trace_id(read_report_facts(self.guard, self.plan))
        with tracker(self.guard).at_desk(self.plan.model_name) as (self.experiment, desk):
            self.queue = desk.queue.queue_id

    def fresh(self, defaults: str = "") -> Guard:
        """As another process would have it."""
        policy = self.home.policy(SOFT, defaults)
        return self.home.guard(policy=policy, tracking_uri=self.server.address)

    def review(self, by: str, approves: bool = True, reason: str = REASON, source: str | None = None) -> None:
        """As the Review tab does it: the answer, then the item."""
        assert answer(self.server, by, self.trace, approves, reason, source or by) == 200
        assert complete(self.server, by, self.queue, self.trace, source or by) == 200

    def collect(self) -> Collected:
        return collect(self.fresh())

    def refused(self) -> str:
        """Why the one answer does not count; nothing is on record, and the question is asked again."""
        found = self.collect()
        (one,) = found.answers
        assert one.outcome == "refused" and self.fresh().state(self.plan.plan_id) == "needs-approval"
        assert not self.fresh().ledger.entries("decided", plan_id=self.plan.plan_id)
        assert self.collect().waiting == (self.plan.plan_id,)
        with pytest.raises(NeedsApprovalError):
            self.fresh().apply(self.plan.plan_id)
        return one.reason


@pytest.fixture
def asked(home: Home, server: Running, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(home, server, monkeypatch)


def test_an_approval_is_on_record_under_the_servers_name_and_apply_accepts_it(asked: Asked) -> None:
    asked.review("ana")
    (one,) = asked.collect().answers
    assert (one.by, one.outcome, one.reason) == ("ana", "approved", REASON)
    (entry,) = asked.fresh().ledger.entries("decided")
    assert entry.body["heard"]["completed_by"] == "ana" and entry.body["heard"]["item"] == asked.trace
    assert entry.body["decision"]["at"] == entry.body["heard"]["completed"]
    assert entry.body["decision"]["plan_digest"] == asked.plan.digest
    assert asked.collect().answers == () and len(asked.fresh().ledger.entries("decided")) == 1
    assert asked.fresh().apply(asked.plan.plan_id).outcome == "committed"


def test_a_rejection_ends_the_plan(asked: Asked) -> None:
    asked.review("eva", approves=False, reason="not true")
    (one,) = asked.collect().answers
    assert one.outcome == "rejected" and asked.fresh().state(asked.plan.plan_id) == "rejected"


def test_an_answer_in_anothers_name_counts_for_nobody(asked: Asked) -> None:
    asked.review("eva", source="ana")
    assert "eva completed it, but no answer stands under that name" in asked.refused()


def test_an_answer_without_completing_the_item_is_none(asked: Asked) -> None:
    assert answer(asked.server, "eva", asked.trace, True, REASON, "ana") == 200
    assert asked.collect().waiting == (asked.plan.plan_id,)


def test_a_forged_answer_beside_a_real_one_stops_both(asked: Asked) -> None:
    assert answer(asked.server, "eva", asked.trace, True, REASON, "ana") == 200
    asked.review("ana", approves=False)
    assert "contradict" in asked.refused()


def test_the_author_and_the_account_that_writes_do_not_approve(asked: Asked) -> None:
    asked.review("ben")
    assert "ben wrote this plan" in asked.refused()
    give_roles(asked.fresh(), ["admin"], [])
    asked.review("admin")
    assert "itself writes with" in asked.refused()


def test_an_approval_without_a_reason_does_not_count(asked: Asked) -> None:
    asked.review("ana", reason=" ")
    assert "no reason" in asked.refused()


def test_an_old_approval_does_not_count(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime, timedelta

    asked.review("ana")
    later = datetime.now(UTC) + timedelta(hours=73)
    monkeypatch.setattr("guardedit.pipeline.workspace.Workspace.now", lambda _: later)
    assert "has expired" in asked.refused()


def test_an_approval_of_another_plan_or_of_a_changed_page_does_not_count(asked: Asked) -> None:
    other = asked.guard.plan(request_of(subject=f"Tower {next(NUMBERS)}"))
    asked.guard.sync()
    there = trace_id(read_report_facts(asked.fresh(), other))
    assert answer(asked.server, "ana", there, True, REASON, "ana") == 200
    assert complete(asked.server, "ana", asked.queue, there, "ana") == 200
    found = asked.collect()
    assert [(one.plan_id, one.outcome) for one in found.answers] == [(other.plan_id, "approved")]
    assert asked.fresh().state(asked.plan.plan_id) == "needs-approval"
    with connected(asked.server.address):
        from mlflow.entities import TraceInfo
        from mlflow.tracing.client import TracingClient

        client = TracingClient(asked.server.address)
        raw = client.get_trace_info(asked.trace).to_dict()
        client.start_trace(
            TraceInfo.from_dict({**raw, "request_preview": "Nothing dangerous.", "assessments": []})
        )
    asked.review("ana")
    assert "not the one that guardedit wrote" in asked.refused()


def test_a_policy_that_wants_signatures_takes_none_of_the_queues_words(
    home: Home, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "fresh", _signed(Asked.fresh))
    asked = Asked(home, server, monkeypatch)
    asked.review("ana")
    assert "wants a signature" in asked.refused()


def _signed(plain: object) -> object:
    def fresh(self: Asked) -> Guard:
        return plain(self, "signed = true")  # type: ignore[operator,no-any-return]

    return fresh


def test_two_people_one_after_the_other(home: Home, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Asked.fresh
    monkeypatch.setattr(Asked, "fresh", lambda self: plain(self, "approvals = 2"))
    asked = Asked(home, server, monkeypatch)
    asked.review("ana")
    assert [one.outcome for one in asked.collect().answers] == ["approved"]
    assert asked.fresh().state(asked.plan.plan_id) == "needs-approval"
    asked.review("ana")
    asked.collect()
    assert asked.fresh().state(asked.plan.plan_id) == "needs-approval"
    asked.review("eva")
    asked.collect()
    assert asked.fresh().state(asked.plan.plan_id) == "approved"


def test_roles_part_those_who_write_from_those_who_review(asked: Asked) -> None:
    server, experiment = asked.server, asked.experiment
    run = {"experiment_id": experiment, "start_time": 1, "tags": []}
    for name, status in (("run", 200), (None, 401)):
        assert call(server, name, "POST", "2.0/mlflow/runs/create", run).status_code == status
    assert answer(server, "run", asked.trace, True, REASON, "ana") == 403
    assert complete(server, "run", asked.queue, asked.trace, "ana") == 403
    with tracker(asked.fresh()).at_desk(asked.plan.model_name) as (_, desk):
        told = desk.client.search_runs([experiment], "tags.`guardedit.stage` = 'plan'")[0].info.run_id
    tag = {"run_id": told, "key": "guardedit.outcome", "value": "committed"}
    assert call(server, "ana", "POST", "2.0/mlflow/runs/set-tag", tag).status_code == 403
    asked.review("ana")
    assert give_roles(asked.fresh(), ["ana"], ["run"])["given"]["guardedit-runner"] == ["run"]
    assert [one.outcome for one in asked.collect().answers] == ["approved"]
