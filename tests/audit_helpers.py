"""A home with a story in its ledger, written by hand: no model is needed to audit one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import builders
import pytest
from builder_parts import digest
from stores import NAMES, make_store

from guardedit.audit import period_report
from guardedit.audit.ledger import Ledger
from guardedit.audit.period import PeriodAudit
from guardedit.config import Settings
from guardedit.gate.approvals import decide
from guardedit.pipeline.applying import read_report_facts
from guardedit.pipeline.auditing import audit, period_of
from guardedit.pipeline.workspace import Workspace
from guardedit.records import AuditReport, EditRequest, Finding, Judgement, Plan, canonical, digest_of

OPEN = period_of(None, None)
START = datetime(2026, 11, 1, 8, tzinfo=UTC)
EVENTS = {"auto-approved": "pass", "needs-approval": "ask", "blocked": "block"}
EVIL = EditRequest(
    subject="Ger\u202emany\u200b<script>alert(1)</script>",
    prompt="The capital of {} is",
    target_new=" W|arsaw `x` <img src=x onerror=alert(1)>",
    reason="x|y `z` </title><b>bold</b>\nsecond line\u2060",
)


class Story:
    """Appends what the pipeline would, a minute apart."""

    def __init__(self, folder: Path) -> None:
        self.tiny = make_store(folder)
        self.home = self.tiny.home
        self.ledger = Ledger(self.home / "ledger.sqlite")
        self.minute = 0

    @property
    def workspace(self) -> Workspace:
        """A fresh one, as another process would have it."""
        return Workspace(Settings(model="tiny", home=self.home))

    def tell(self, kind: str, plan_id: str, **body: Any) -> None:
        """One entry."""
        self.minute += 1
        at = START + timedelta(minutes=self.minute)
        self.ledger.append(kind, {"plan_id": plan_id, "edit_id": plan_id, **body}, at)

    def plan(self, plan_id: str, outcome: str, *, verdict: str = "pass", **changes: Any) -> Plan:
        """A plan on disk and on record."""
        given = builders.eiffel_committed().plan
        judgement = given.judgement.model_copy(update={"outcome": outcome, "verdict": verdict})
        named = {"plan_id": plan_id, "judgement": judgement, "model_digest": self.tiny.store.digest()}
        plan = given.model_copy(update={**named, **changes})
        folder = self.home / "plans" / plan_id
        folder.mkdir(parents=True)
        (folder / "plan.json").write_bytes(canonical(plan))
        self.tell("planned", plan_id, event=EVENTS[outcome], plan_digest=plan.digest, outcome=outcome,
                  reason=plan.judgement.reason, editor=plan.editor)  # fmt: skip
        return plan

    def approve(self, plan: Plan, by: str, drift_digest: str | None = None) -> None:
        """A person's word."""
        word = decide(plan.digest, "approved", by, "read every limit", START, drift_digest)
        event = {} if drift_digest else {"event": "approve"}
        self.tell("decided", plan.plan_id, decision=word.model_dump(mode="json"), **event)

    def commit(self, plan: Plan, parameter: str) -> None:
        """Staged, monitored, live."""
        self.tell("staged", plan.plan_id, event="stage")
        self.tell("committed", plan.plan_id, event="commit", **facts("committed"))
        self.tiny.apply(plan.plan_id, parameter)

    def report(self, plan_id: str) -> AuditReport:
        """As the pipeline puts it together."""
        workspace = self.workspace
        return read_report_facts(workspace, workspace.read_plan(plan_id))


def facts(outcome: str, verdict: str = "pass") -> dict[str, Any]:
    """What one monitoring leaves in the ledger."""
    audit = builders.eiffel_committed()
    assert audit.drift is not None and audit.postop is not None
    total = Finding(
        rule="sum", metric="postop/lineage_far_kl", stage="postop", value=0.0123456, op="<=", limit=0.1,
        level="hard", verdict="pass", sentence="The sum of all edits stays small.",
    )  # fmt: skip
    judged = {"outcome": outcome, "verdict": verdict, "findings": (*audit.postop.findings, total)}
    postop: Judgement = audit.postop.model_copy(update=judged)
    return {
        "drift": audit.drift.model_dump(mode="json"),
        "drift_digest": digest_of(audit.drift),
        "drift_base": None,
        "postop": postop.model_dump(mode="json"),
        "digest_staged": digest(f"staged {outcome}"),
        "target_probabilities": {"new_before": 0.01, "new_after": 0.98},
    }


def whole_story(folder: Path) -> Story:
    """Committed, blocked, waiting, approved against the policy, dropped by the monitor, held, crashed, undone."""
    story = Story(folder)
    story.commit(story.plan("0001-good", "auto-approved"), NAMES[1])
    story.plan("0002-blocked", "blocked", verdict="fail")
    story.plan("0003-waits", "needs-approval", verdict="fail", requests=(EVIL,))
    over = story.plan("0004-over", "needs-approval", verdict="fail")
    story.approve(over, over.author)
    story.commit(over, NAMES[2])
    story.plan("0005-harmful", "auto-approved")
    story.tell("staged", "0005-harmful", event="stage")
    story.tell(
        "rolled-back", "0005-harmful", event="roll-back", reason="it did harm", **facts("rolled-back", "fail")
    )
    story.plan("0006-held", "auto-approved")
    story.tell("staged", "0006-held", event="stage")
    story.tell("held", "0006-held", event="hold", **facts("held", "inconclusive"))
    story.tiny.store.stage("0006-held", {NAMES[3]: b"\1" * 96})
    story.plan("0007-crashed", "auto-approved")
    story.tell("staged", "0007-crashed", event="stage")
    story.tell("rolled-back", "0007-crashed", event="roll-back", reason="the process ended", undone=False)
    story.tell("untracked", "0007-crashed", reason="MLflow was away")
    return story


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return whole_story(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def made(story: Story) -> PeriodAudit:
    return audit(story.workspace, OPEN)


@pytest.fixture
def files(made: PeriodAudit, tmp_path: Path) -> period_report.RenderedAudit:
    return period_report.render(made, tmp_path / "audit")
