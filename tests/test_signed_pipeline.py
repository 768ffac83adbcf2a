"""Signed words on a real plan: from a key's making to a commit, an emergency and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipeline_helpers import CLOSED_PORT, HARD, SOFT, Home, home, request_of, world

from guardedit.audit.ledger import Ledger
from guardedit.audit.report import markdown, sheet_of
from guardedit.errors import BadRequestError, BlockedError, IntegrityError, NeedsApprovalError, NotFoundError
from guardedit.gate.keys import new_key
from guardedit.gate.signatures import DECISION
from guardedit.gate.trust import Role
from guardedit.pipeline import Guard
from guardedit.pipeline.anchoring import checkpoint, review
from guardedit.pipeline.deciding import Emergency
from guardedit.pipeline.signing import revoke_key, trust_key

__all__ = ["home", "world"]

REASON = "looked at it: the tests want it"
TEAM = 'profile = "team"'
PEOPLE: dict[str, Role] = {
    "ana": "reviewer", "eva": "reviewer", "ben": "proposer", "gus": "break-glass", "run": "runner",
}  # fmt: skip


class Team:
    """A home whose policy wants signatures, with a key for each of PEOPLE."""

    def __init__(self, home: Home, limits: dict[str, tuple[str, float, str]], defaults: str = TEAM) -> None:
        self.home, self.keys = home, home.folder.parent / "keys"
        self.policy = home.policy(limits, defaults)
        for name, role in PEOPLE.items():
            new_key(self.keys, name)
            trust_key(home.guard(), self.keys / f"{name}.pub", role)
        trust_key(home.guard(), self.keys / "ben.pub", "reviewer")
        new_key(self.keys, "max")

    def by(self, name: str | None) -> Guard:
        return self.home.guard(policy=self.policy, keys=self.keys, key=name)


def test_a_team_plan_is_applied_with_a_signature_of_somebody_else_and_with_nothing_less(home: Home) -> None:
    team = Team(home, SOFT)
    plan = team.by("ben").plan(request_of())
    for nobody in (None, "max", "gus", "ben"):
        with pytest.raises(NeedsApprovalError):
            team.by(nobody).approve(plan.plan_id, REASON)
    assert team.by(None).state(plan.plan_id) == "needs-approval"
    word = team.by("ana").approve(plan.plan_id, REASON)
    assert word.approver == "ana" and word.key and not word.own
    (entry,) = team.by(None).ledger.entries("decided")
    assert entry.body["envelope"]["payloadType"] == DECISION
    guard = team.by("run")
    assert guard.apply(plan.plan_id).outcome == "committed"
    (file,) = (home.folder / "checkpoints").glob("*.json")
    assert guard.verify(file)["anchor_signed_by"] == "run"


def test_two_of_n_needs_two_keys_and_a_revoked_one_is_missed_again(home: Home) -> None:
    team = Team(home, SOFT, TEAM + "\napprovals = 2")
    plan = team.by("ben").plan(request_of())
    for _ in range(2):
        team.by("ana").approve(plan.plan_id, REASON)
    assert team.by(None).state(plan.plan_id) == "needs-approval"
    team.by("eva").approve(plan.plan_id, REASON)
    assert team.by(None).state(plan.plan_id) == "approved"
    revoke_key(team.by(None), "eva", "the laptop is gone")
    with pytest.raises(NeedsApprovalError, match="revoked"):
        team.by(None).apply(plan.plan_id)
    assert not team.by(None).store.staged_ids()


def test_a_decision_forged_into_the_ledger_opens_nothing(home: Home) -> None:
    team = Team(home, SOFT)
    plan = team.by("ben").plan(request_of())
    other = team.by("ben").plan(request_of(1))
    word = team.by("ana").approve(other.plan_id, REASON)
    (entry,) = team.by(None).ledger.entries("decided")
    forged = word.model_copy(update={"plan_digest": plan.digest})
    body = {**entry.body, "plan_id": plan.plan_id, "edit_id": plan.plan_id}
    Ledger(home.folder / "ledger.sqlite").append(
        "decided", {**body, "decision": forged.model_dump(mode="json")}
    )
    with pytest.raises(IntegrityError):
        team.by(None).apply(plan.plan_id)
    assert not team.by(None).store.staged_ids()


def test_an_emergency_lifts_the_policys_block_and_is_reviewed_by_somebody_else(home: Home) -> None:
    team = Team(home, HARD)
    plan = team.by("ben").plan(request_of())
    emergency = Emergency("INC-7", 2.0)
    with pytest.raises(BlockedError):
        team.by("ana").approve(plan.plan_id, REASON)
    with pytest.raises(NeedsApprovalError, match="not break-glass"):
        team.by("ana").approve(plan.plan_id, REASON, emergency=emergency)
    for wrong in (Emergency("", 2.0), Emergency("INC-7", 4.5), Emergency("INC-7", float("nan"))):
        with pytest.raises(BadRequestError):
            team.by("gus").approve(plan.plan_id, REASON, emergency=wrong)
    team.by("gus").approve(plan.plan_id, REASON, emergency=emergency)
    assert team.by(None).apply(plan.plan_id).outcome == "committed"
    (waiting,) = team.by(None).status()["reviews"]
    assert waiting["ticket"] == "INC-7" and not waiting["overdue"]
    with pytest.raises(NeedsApprovalError):
        review(team.by("gus"), plan.plan_id, "all was well")
    review(team.by("ana"), plan.plan_id, "all was well")
    assert team.by(None).status()["reviews"] == []
    with pytest.raises(NotFoundError):
        review(team.by("ana"), plan.plan_id, "again")


def test_an_emergency_does_not_lift_an_integrity_failure(home: Home) -> None:
    team = Team(home, HARD)
    plan = team.by("ben").plan(request_of())
    team.by("gus").approve(plan.plan_id, REASON, emergency=Emergency("INC-7"))
    path = home.folder / "plans" / plan.plan_id / "delta.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        team.by(None).apply(plan.plan_id)
    assert not team.by(None).store.staged_ids()


def test_a_solo_approval_of_an_own_plan_is_marked_in_record_report_and_show(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(request_of())
    word = guard.approve(plan.plan_id, REASON)
    assert word.own and word.key is None
    shown = home.run("show", plan.plan_id, mlflow=None)
    assert "own plan" in shown.out and "unsigned" in shown.out
    text = markdown(sheet_of(guard.report(plan.plan_id).audit), "digest")
    assert "own plan" in text and "unsigned" in text


def test_a_checkpoint_kept_elsewhere_shows_a_ledger_that_was_written_anew(home: Home, tmp_path: Path) -> None:
    guard = home.guard()
    guard.plan(request_of())
    kept = tmp_path / "kept.json"
    assert checkpoint(guard, kept)["signed"] is False
    assert guard.verify(kept)["anchor_signed_by"] == "nobody"
    raw = json.loads(kept.read_text())
    for change in ({"seq": raw["checkpoint"]["seq"] + 1}, {"digest": "sha256:" + "1" * 64}):
        kept.write_text(json.dumps({**raw, "checkpoint": {**raw["checkpoint"], **change}}))
        with pytest.raises(IntegrityError):
            guard.verify(kept)


def test_private_keys_do_not_go_into_a_home(home: Home) -> None:
    ran = home.run("keys", "new", "ana", "--keys", str(home.folder / "keys"), mlflow=CLOSED_PORT)
    assert ran.code == 2 and "elsewhere" in ran.err
