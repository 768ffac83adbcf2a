"""`verify` plays the whole record again: a statement, signature or step that could not be there is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import HARD, SOFT, Home, home, request_of, world
from test_policy_words import Owned
from test_signed_pipeline import REASON, Team

from guardedit.audit.ledger import Ledger
from guardedit.errors import IntegrityError
from guardedit.gate.replaying import replayed
from guardedit.gate.trust import REVOKED, TRUSTED
from guardedit.pipeline.anchoring import review
from guardedit.pipeline.deciding import Emergency
from guardedit.pipeline.policies import sign_policy
from guardedit.records import canonical

__all__ = ["home", "world"]


@pytest.fixture(scope="module")
def told(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An owned team's home: a signed policy, an edit let through in an emergency, reviewed, and one approved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUARDEDIT_CACHE", str(world.cache))
        home = Home(world, tmp_path_factory.mktemp("told") / "home")
        hard = Owned(home, HARD)
        sign_policy(hard.by("olga"), hard.policy)
        blocked = hard.by("ben").plan(request_of())
        hard.by("gus").approve(blocked.plan_id, REASON, emergency=Emergency("INC-7"))
        review(hard.by("ana"), blocked.plan_id, "was right")
        soft = home.policy(SOFT, 'profile = "team"')
        sign_policy(hard.by("olga"), soft)
        other = home.guard(policy=soft, keys=hard.keys, key="ben").plan(request_of(1))
        home.guard(policy=soft, keys=hard.keys, key="ana").approve(other.plan_id, REASON)
    return home


def entries_of(home: Home) -> list[Any]:
    return list(Ledger(home.folder / "ledger.sqlite").entries())


def test_an_honest_record_stands_and_is_counted(told: Home) -> None:
    found = replayed(entries_of(told))
    assert (found.key_statements, found.policy_statements) == (7, 2)
    assert found.signatures == 5, "two plans, two decisions, one review"
    assert len(found.reviews) == 1


def _changed(entry: Any, change: Callable[[dict[str, Any]], object]) -> Any:
    body = json.loads(json.dumps(entry.body))
    change(body)
    return type(entry)(entry.seq, entry.at, entry.kind, body, entry.prev, entry.digest)


FORGED: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a key's role": ("key-trusted", lambda b: b["statement"].update(role="policy-owner", key_id="0" * 64)),
    "a policy's digest": (
        "policy-signed",
        lambda b: b["statement"].update(policy_digest="sha256:" + "0" * 64),
    ),
    "who reviewed": ("reviewed", lambda b: b.update(by="gus")),
    "what a review says": ("reviewed", lambda b: b.update(note="all is well")),
    "what a review is of": ("reviewed", lambda b: b.update(of=1)),
    "a review without its signature": ("reviewed", lambda b: b.update(envelope=None)),
    "a decision's reason": ("decided", lambda b: b["decision"].update(reason="another")),
    "a decision without its signature": ("decided", lambda b: b.update(envelope=None)),
    "whose plan it is": ("planned", lambda b: b["proposal"]["statement"].update(author="eva")),
    "which plan was signed": ("planned", lambda b: b.update(plan_digest="sha256:" + "0" * 64)),
    "a step": ("decided", lambda b: b.update(event="commit")),
}


@pytest.mark.parametrize("what", FORGED)
def test_whatever_is_forged_in_the_record_is_named_by_its_entry(told: Home, what: str) -> None:
    kind, change = FORGED[what]
    entries = entries_of(told)
    at = max(i for i, entry in enumerate(entries) if entry.kind == kind)
    entries[at] = _changed(entries[at], change)
    with pytest.raises(IntegrityError, match=rf"entry {entries[at].seq}\b") as caught:
        replayed(entries)
    assert caught.value.exit_code == 6


def test_a_review_before_its_emergency_or_by_who_broke_the_glass_is_named(told: Home) -> None:
    entries = entries_of(told)
    (at,) = [i for i, entry in enumerate(entries) if entry.kind == "reviewed"]
    decided = next(i for i, e in enumerate(entries) if e.kind == "decided")
    swapped = [*entries]
    swapped[at], swapped[decided] = swapped[decided], swapped[at]
    with pytest.raises(IntegrityError):
        replayed(swapped)


def test_plain_verify_names_a_key_statement_that_was_forged_into_the_ledger(home: Home) -> None:
    team = Owned(home, SOFT)
    assert home.run("verify", mlflow=None).code == 0
    ledger = Ledger(home.folder / "ledger.sqlite")
    last = ledger.entries(TRUSTED)[-1]
    statement = {**last.body["statement"], "name": "max", "role": "reviewer"}
    forged = ledger.append(TRUSTED, {"statement": statement, "envelope": None})
    ran = home.run("verify", mlflow=None)
    assert ran.code == 6 and f"entry {forged.seq}" in ran.err
    assert home.run("keys", "list", mlflow=None).code == 6
    assert team.keys.is_dir()


def test_plain_verify_names_a_revocation_of_a_key_that_nobody_trusted(home: Home) -> None:
    Team(home, SOFT)
    ledger = Ledger(home.folder / "ledger.sqlite")
    (body, *_) = [e.body for e in ledger.entries(TRUSTED)]
    statement = {**body["statement"], "act": "revoke", "key_id": "f" * 64, "role": None, "public": None}
    forged = ledger.append(REVOKED, {"statement": statement, "envelope": None})
    ran = home.run("--json", "verify", mlflow=None)
    assert ran.code == 6 and f"entry {forged.seq}" in ran.err and "out of" not in ran.out


def test_a_forged_review_does_not_close_one(home: Home, tmp_path: Path) -> None:
    team = Team(home, HARD)
    plan = team.by("ben").plan(request_of())
    team.by("gus").approve(plan.plan_id, REASON, emergency=Emergency("INC-7"))
    (waiting,) = team.by(None).status()["reviews"]
    body = {"plan_id": plan.plan_id, "edit_id": plan.plan_id, "of": waiting["seq"], "by": "ana", "note": "all well",
            "key": team.by(None).ledger.entries(TRUSTED)[0].body["statement"]["key_id"], "at": "now"}  # fmt: skip
    from guardedit.gate.keys import load_key
    from guardedit.gate.signatures import REVIEW

    envelope = load_key(team.keys, "eva").sign(canonical(body), REVIEW)
    forged = Ledger(home.folder / "ledger.sqlite").append("reviewed", {**body, "envelope": envelope})
    for verb in ("status", "verify"):
        ran = home.run(verb, mlflow=None)
        assert ran.code == 6 and f"entry {forged.seq}" in ran.err, ran.err
