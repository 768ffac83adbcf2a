"""Attacks on the ledger, the clock, checkpoints and signed words that no other test tries."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import planned
from pipeline_helpers import SOFT, Home, home, request_of, world
from test_signed_pipeline import REASON, Team

from guardedit.audit.chain import MAX_ENTRY, encode_entry
from guardedit.audit.checkpoints import read_checkpoint
from guardedit.audit.ledger import Ledger
from guardedit.errors import BadRequestError, GuardeditError, IntegrityError, StaleError
from guardedit.gate.keys import new_key
from guardedit.pipeline.anchoring import checkpoint

__all__ = ["home", "world"]


def test_an_entry_that_no_reader_could_hold_is_not_written(home: Home) -> None:
    with pytest.raises(BadRequestError, match="bytes"):
        encode_entry(1, "now", "planned", {"text": "x" * MAX_ENTRY}, "sha256:" + "0" * 64)
    with pytest.raises(BadRequestError):
        Ledger(home.folder / "ledger.sqlite").append("planned", {"text": "x" * MAX_ENTRY})
    assert not (home.folder / "ledger.sqlite").exists()


def test_an_expired_approval_is_not_revived_by_a_clock_that_goes_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardedit.pipeline.workspace import Workspace

    policy = home.policy(SOFT)
    guard = home.guard(policy=policy)
    plan, other = guard.plan(request_of()), guard.plan(request_of(1))
    for one in (plan, other):
        guard.approve(one.plan_id, REASON)
    later = datetime.now(UTC) + timedelta(hours=80)
    monkeypatch.setattr(Workspace, "now", lambda _: later)
    with pytest.raises(StaleError, match="expired"):
        home.guard(policy=policy).apply(plan.plan_id)
    Ledger(home.folder / "ledger.sqlite").append("untracked", {"reason": "something later"}, later)
    monkeypatch.undo()
    monkeypatch.setenv("GUARDEDIT_CACHE", str(home.world.cache))
    # One word's end is on record; the other's was never noticed, so the clock itself is held against the ledger.
    for one, why in ((plan, "expired"), (other, "went back")):
        with pytest.raises(StaleError, match=why):
            home.guard(policy=policy).apply(one.plan_id)


def test_a_checkpoint_in_which_a_key_stands_twice_is_none(home: Home, tmp_path: Path) -> None:
    planned(home)
    kept = tmp_path / "kept.json"
    checkpoint(home.guard(), kept)
    whole = kept.read_text()
    kept.write_text(whole.replace('{"checkpoint":', '{"checkpoint":{"seq":1},"checkpoint":', 1))
    with pytest.raises(IntegrityError, match="not a checkpoint"):
        read_checkpoint(kept)
    kept.write_text("[" * 100_000)
    with pytest.raises(IntegrityError):
        read_checkpoint(kept)


def test_a_ledger_cut_before_its_checkpoint_is_seen_although_its_head_fits(
    home: Home, tmp_path: Path
) -> None:
    guard = home.guard()
    guard.plan(request_of())
    guard.plan(request_of(1))
    checkpoint(guard, tmp_path / "kept.json")
    rows_ = Ledger(home.folder / "ledger.sqlite").rows()[:1]
    for name in ("ledger.sqlite", "ledger.head", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (home.folder / name).unlink(missing_ok=True)
    Ledger(home.folder / "ledger.sqlite").adopt(rows_)
    with pytest.raises(IntegrityError, match="ends at entry 1"):
        home.guard().verify(tmp_path / "kept.json")


def test_a_revoked_owner_cannot_name_keys_with_an_old_statement(home: Home) -> None:
    from guardedit.pipeline.signing import revoke_key, trust_key

    team = Team(home, SOFT)
    for name in ("olga", "pia"):
        new_key(team.keys, name)
    trust_key(home.guard(), team.keys / "olga.pub", "policy-owner")
    trust_key(team.by("olga"), team.keys / "pia.pub", "policy-owner")
    old = home.guard().ledger.entries("key-trusted")[-1].body
    revoke_key(team.by("pia"), "olga", "left the house")
    forged = Ledger(home.folder / "ledger.sqlite").append("key-trusted", old)
    ran = home.run("verify", mlflow=None)
    assert ran.code == 6 and f"entry {forged.seq}" in ran.err


def test_an_edit_is_not_staged_while_its_author_signed_another_plan(home: Home) -> None:
    team = Team(home, SOFT)
    plan, other = (team.by("ben").plan(request_of(n)) for n in (0, 1))
    ledger = Ledger(home.folder / "ledger.sqlite")
    entry = ledger.entries("planned", plan_id=other.plan_id)[0]
    stolen: dict[str, Any] = {
        **ledger.entries("planned", plan_id=plan.plan_id)[0].body,
        "proposal": entry.body["proposal"],
    }
    ledger.append("planned", stolen)
    with pytest.raises(GuardeditError):
        team.by("ana").approve(plan.plan_id, REASON)
    assert home.run("verify", mlflow=None).code == 6
