"""Which policies a home may be judged by, and who names keys, is what policy owners signed; nobody lowers it alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline_helpers import HARD, SOFT, Home, home, request_of, world
from test_signatures import Entry, People, people, statement
from test_signed_pipeline import REASON, TEAM, Team

from guardedit.errors import (
    BadRequestError,
    IntegrityError,
    NeedsApprovalError,
    NotFoundError,
    StaleError,
)
from guardedit.gate.keys import load_key, new_key
from guardedit.gate.policy_words import POLICY_SIGNED, POLICY_STATEMENT, POLICY_WITHDRAWN, PolicyStatement
from guardedit.gate.trust import TRUSTED, Trust
from guardedit.pipeline.deciding import Emergency
from guardedit.pipeline.policies import listed_policies, sign_policy, withdraw_policy
from guardedit.pipeline.signing import trust_key
from guardedit.records import canonical, digest_of_bytes

__all__ = ["home", "people", "world"]

STRICT, LAX = (digest_of_bytes(name) for name in (b"strict", b"lax"))


@pytest.fixture
def owned(people: People) -> People:
    """olga and eva own the policy."""
    first = people.trusting("olga", "policy-owner")
    return first.with_(TRUSTED, statement(first.keys["eva"], "eva", "policy-owner"), "olga")


def saying(people: People, name: str, digest: str, owners: int = 1, act: str = "sign") -> People:
    """One more owner's word on a policy, as `policy sign` writes it."""
    key = people.keys[name]
    word = PolicyStatement(
        act=act, policy_digest=digest, name="p", owners=owners, by="os", key=key.public.key_id, at="now"
    )
    body = {
        "statement": word.model_dump(mode="json"),
        "envelope": key.sign(canonical(word), POLICY_STATEMENT),
    }
    kind = POLICY_SIGNED if act == "sign" else POLICY_WITHDRAWN
    return replace(people, entries=(*people.entries, Entry(len(people.entries) + 1, kind, body)))


def problem(people: People, digest: str, owners: int = 1) -> str | None:
    known = people.trust
    return known.policies.problem(digest, owners, known.revoked)


def test_a_policy_counts_with_as_many_owners_as_it_asks_for(owned: People) -> None:
    assert "no policy owner" in str(problem(owned, STRICT, 2))
    one = saying(owned, "olga", STRICT, 2)
    assert "1 of 2" in str(problem(one, STRICT, 2))
    assert "1 of 2" in str(problem(saying(one, "olga", STRICT, 2), STRICT, 2)), "twice by one hand is once"
    assert problem(saying(one, "eva", STRICT, 2), STRICT, 2) is None


def test_one_owner_alone_does_not_lower_the_number_of_owners(owned: People) -> None:
    strict = saying(saying(owned, "olga", STRICT, 2), "eva", STRICT, 2)
    lax = saying(strict, "olga", LAX, 1)
    assert "1 of 2" in str(problem(lax, LAX, 1)) and lax.trust.policies.needed == 2
    both = saying(lax, "eva", LAX, 1)
    assert problem(both, LAX, 1) is None and both.trust.policies.needed == 1
    # A statement that understates what the file asks for does not help either.
    assert "1 of 2" in str(problem(saying(owned, "olga", STRICT, 1), STRICT, 2))


def test_a_revoked_owners_word_on_a_policy_counts_no_more(owned: People) -> None:
    signed = saying(owned, "eva", STRICT)
    assert problem(signed, STRICT) is None
    assert "0 of 1" in str(problem(signed.revoking("eva", "olga"), STRICT))


def test_a_withdrawn_policy_counts_no_more_until_it_is_signed_again(owned: People) -> None:
    signed = saying(saying(owned, "olga", STRICT), "eva", STRICT, act="withdraw")
    assert "withdrawn" in str(problem(signed, STRICT))
    assert signed.trust.policies.any, "a home that had a signed policy goes on asking for one"
    assert problem(saying(signed, "eva", STRICT), STRICT) is None


def test_a_word_on_a_policy_of_somebody_else_is_an_integrity_failure(owned: People) -> None:
    for name in ("ana", "max"):
        with pytest.raises(IntegrityError, match=r"entry \d+ about a policy"):
            Trust(saying(owned, name, STRICT).entries)
    entry = saying(owned, "olga", STRICT).entries[-1]
    for changed in ({"policy_digest": LAX}, {"owners": 3}, {"act": "withdraw"}):
        body = json.loads(json.dumps(entry.body))
        body["statement"].update(changed)
        with pytest.raises(IntegrityError, match=r"entry \d+ about a policy"):
            Trust((*owned.entries, replace(entry, body=body)))


def test_where_two_owners_are_asked_for_one_alone_names_no_key_but_revokes(owned: People) -> None:
    strict = saying(saying(owned, "olga", STRICT, 2), "eva", STRICT, 2)
    one = strict.trusting("max", "reviewer", "olga")
    assert "max" not in one.trust.names()
    assert one.trust.waiting(statement(one.keys["max"], "max", "reviewer")) == 1
    assert "max" not in one.trusting("max", "reviewer", "olga").trust.names()
    assert one.trusting("max", "reviewer", "eva").trust.named("max").has("reviewer")
    assert one.trusting("max", "auditor", "eva").trust.names() == one.trust.names(), (
        "another role, another word"
    )
    assert "max" not in one.revoking("olga", "eva").trusting("max", "reviewer", "eva").trust.names()
    assert strict.revoking("ana", "olga").trust.named("ana").revoked is not None


class Owned(Team):
    """A team whose home has a policy owner."""

    def __init__(self, home: Home, limits: dict[str, tuple[str, float, str]], defaults: str = TEAM) -> None:
        super().__init__(home, limits, defaults)
        new_key(self.keys, "olga")
        trust_key(home.guard(), self.keys / "olga.pub", "policy-owner")

    def under(self, policy: Path, name: str | None) -> object:
        return self.home.guard(policy=policy, keys=self.keys, key=name)


def test_a_team_home_with_an_owner_is_judged_by_signed_policies_alone(home: Home) -> None:
    team = Owned(home, SOFT)
    with pytest.raises(NeedsApprovalError, match="no policy owner has signed it"):
        team.by("ben").plan(request_of())
    with pytest.raises(NeedsApprovalError, match="not policy-owner"):
        sign_policy(team.by("ana"), team.policy)
    with pytest.raises(NeedsApprovalError, match="--key"):
        sign_policy(team.by(None), team.policy)
    assert sign_policy(team.by("olga"), team.policy)["counts"]
    with pytest.raises(BadRequestError, match="already"):
        sign_policy(team.by("olga"), team.policy)
    plan = team.by("ben").plan(request_of())
    team.by("ana").approve(plan.plan_id, REASON)
    withdraw_policy(team.by("olga"), listed_policies(team.by(None))[0]["policy_digest"][7:19], "too lax")
    with pytest.raises(NeedsApprovalError, match="withdrawn"):
        team.by(None).apply(plan.plan_id)
    assert not team.by(None).store.staged_ids()
    sign_policy(team.by("olga"), team.policy)
    assert team.by(None).apply(plan.plan_id).outcome == "committed"
    assert team.by(None).verify()["policy_statements"] == 3


def test_a_file_that_calls_itself_solo_is_no_way_around_the_owners(home: Home) -> None:
    team = Owned(home, SOFT)
    sign_policy(team.by("olga"), team.policy)
    lax = home.policy({})
    with pytest.raises(NeedsApprovalError, match="no policy owner"):
        team.under(lax, None).plan(request_of())  # type: ignore[attr-defined]
    with pytest.raises(NeedsApprovalError, match="no policy owner"):
        home.guard().plan(request_of())


def test_an_emergency_lifts_limits_but_not_the_owners_word_on_the_policy(home: Home) -> None:
    team = Owned(home, HARD)
    sign_policy(team.by("olga"), team.policy)
    plan = team.by("ben").plan(request_of())
    team.by("gus").approve(plan.plan_id, REASON, emergency=Emergency("INC-7"))
    withdraw_policy(team.by("olga"), listed_policies(team.by(None))[0]["policy_digest"], "too lax")
    with pytest.raises(NeedsApprovalError, match="withdrawn"):
        team.by(None).apply(plan.plan_id)


def test_a_held_edit_is_not_let_through_by_another_policy(home: Home) -> None:
    from pipeline_helpers import UNDECIDED

    plan = home.guard(UNDECIDED).plan(request_of())
    assert home.guard(UNDECIDED).apply(plan.plan_id).outcome == "held"
    home.guard(UNDECIDED).approve(plan.plan_id, REASON)
    with pytest.raises(StaleError, match="judged by policy"):
        home.guard().apply(plan.plan_id)
    assert home.guard(UNDECIDED).apply(plan.plan_id).outcome == "committed"


def test_policies_are_signed_and_listed_from_the_command_line(home: Home) -> None:
    team = Owned(home, SOFT)
    keys = ("--keys", str(team.keys))
    signed = home.run("--json", "policy", "sign", str(team.policy), "--key", "olga", *keys, mlflow=None)
    assert signed.code == 0 and signed.json["counts"], signed.err
    assert "signed by olga; counts" in home.run("policy", "list", mlflow=None).out
    gone = home.run(
        "policy", "withdraw", signed.json["policy_digest"], "--reason", "too lax", "--key", "olga", *keys,
        mlflow=None,
    )  # fmt: skip
    assert gone.code == 0 and "withdrawn" in gone.out
    refused = home.run("plan", str(home.requests(request_of().model_dump(exclude_none=True))),
                       "--policy", str(team.policy))  # fmt: skip
    assert refused.code == 4 and "withdrawn" in refused.err
    with pytest.raises(NotFoundError):
        withdraw_policy(team.by("olga"), "sha256:ffff", "no such")


def test_an_encrypted_key_opens_with_its_passphrase_and_with_nothing_else(tmp_path: Path) -> None:
    new_key(tmp_path, "ana", "correct horse battery")
    data = (tmp_path / "ana.pem").read_bytes()
    assert b"ENCRYPTED" in data
    assert load_key(tmp_path, "ana", lambda _: "correct horse battery").sign(b"{}", "text/plain")[
        "signatures"
    ]
    for ask, said in (
        (lambda _: "another one", "does not open"),
        (lambda _: None, "is encrypted"),
        (None, "is encrypted"),
    ):
        with pytest.raises(BadRequestError, match=said):
            load_key(tmp_path, "ana", ask)
    with pytest.raises(BadRequestError, match="at least"):
        new_key(tmp_path, "eva", "short")
    assert not (tmp_path / "eva.pem").exists()


def test_an_encrypted_key_signs_from_the_command_line(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = ("--keys", str(tmp_path / "k"))
    asked = home.run("keys", "new", "ana", "--passphrase", *keys, mlflow=None)
    assert asked.code == 2 and "GUARDEDIT_KEY_PASSPHRASE" in asked.err
    monkeypatch.setenv("GUARDEDIT_KEY_PASSPHRASE", "correct horse battery")
    assert home.run("--json", "keys", "new", "ana", "--passphrase", *keys, mlflow=None).json["encrypted"]
    trusted = home.run(
        "keys", "trust", str(tmp_path / "k" / "ana.pub"), "--role", "policy-owner", *keys, mlflow=None
    )
    assert trusted.code == 0, trusted.err
    policy = str(home.policy(SOFT))
    monkeypatch.setenv("GUARDEDIT_KEY_PASSPHRASE", "wrong horse battery")
    wrong = home.run("policy", "sign", policy, "--key", "ana", *keys, mlflow=None)
    assert wrong.code == 2 and "does not open" in wrong.err
    monkeypatch.setenv("GUARDEDIT_KEY_PASSPHRASE", "correct horse battery")
    assert home.run("policy", "sign", policy, "--key", "ana", *keys, mlflow=None).code == 0
