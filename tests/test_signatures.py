"""A word counts by its signature: who signed, in which role, what exactly, when, and how many."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from guardedit.errors import (
    BadRequestError,
    BlockedError,
    HeldError,
    IntegrityError,
    NeedsApprovalError,
    NotFoundError,
    PolicyError,
    StaleError,
)
from guardedit.gate.approvals import decide
from guardedit.gate.keys import PrivateKey, load_key, new_key
from guardedit.gate.policy import load_policy, parse_policy
from guardedit.gate.signatures import DECISION, Case, Word, require_words
from guardedit.gate.trust import REVOKED, STATEMENT, TRUSTED, KeyStatement, Role, Trust
from guardedit.records import Decision, canonical, digest_of_bytes

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
DATA = Path(__file__).parent / "data" / "policy.toml"
TEAM = load_policy(DATA).model_copy(
    update={"profile": "team", "signed": True, "separate_approver": True, "approvals": 1}
)
SOLO = load_policy(DATA)
PLAN, OTHER, DRIFT = (digest_of_bytes(name) for name in (b"plan", b"other", b"drift"))


@dataclass(frozen=True)
class Entry:
    seq: int
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class People:
    """Keys by name, and the entries that trust them."""

    keys: dict[str, PrivateKey]
    entries: tuple[Entry, ...]

    @property
    def trust(self) -> Trust:
        return Trust(self.entries)

    def with_(self, kind: str, word: KeyStatement, signer: str | None = None) -> People:
        signed = word.model_copy(update={"key": self.keys[signer].public.key_id if signer else None})
        envelope = self.keys[signer].sign(canonical(signed), STATEMENT) if signer else None
        body = {"statement": signed.model_dump(mode="json"), "envelope": envelope}
        return replace(self, entries=(*self.entries, Entry(len(self.entries) + 1, kind, body)))

    def trusting(self, name: str, role: Role, signer: str | None = None) -> People:
        return self.with_(TRUSTED, statement(self.keys[name], name, role), signer)

    def revoking(self, name: str, signer: str | None = None) -> People:
        word = KeyStatement(
            act="revoke", key_id=self.keys[name].public.key_id, name=name, reason="lost", by="os", at="now"
        )
        return self.with_(REVOKED, word, signer)


def statement(key: PrivateKey, name: str, role: Role) -> KeyStatement:
    public = key.public
    return KeyStatement(
        act="trust", key_id=public.key_id, name=name, role=role, public=public.public, by="os", at="now"
    )


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    """ana and eva review, ben proposes, gus breaks the glass; max is a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    made = {}
    for name in ("ana", "eva", "ben", "gus", "max", "olga"):
        new_key(folder, name)
        made[name] = load_key(folder, name)
    trusting = People(made, ()).trusting("ana", "reviewer").trusting("eva", "reviewer")
    return trusting.trusting("ben", "proposer").trusting("ben", "reviewer").trusting("gus", "break-glass")


def signed(
    people: People, name: str, plan: str = PLAN, at: datetime = NOW, seq: int = 50, **changes: Any
) -> Word:
    key = people.keys[name]
    said = decide(plan, "approved", name, "read it all", at).model_copy(
        update={"key": key.public.key_id, **changes}
    )
    return Word(said, seq, "decided", key.sign(canonical(said), DECISION))


def case_of(people: People, **changes: Any) -> Case:
    made = Case(PLAN, "ben", people.keys["ben"].public.key_id, TEAM, people.trust)
    return replace(made, **changes)


def judged(words: Sequence[Word], case: Case, now: datetime = NOW) -> Decision:
    return require_words(words, case, now)


def test_a_reviewers_signature_on_this_plan_lets_it_go_ahead(people: People) -> None:
    assert judged([signed(people, "ana")], case_of(people)).approver == "ana"


def test_a_payload_that_was_changed_after_signing_is_an_integrity_failure(people: People) -> None:
    word = signed(people, "ana")
    assert word.envelope is not None
    payload = canonical(word.decision.model_copy(update={"reason": "something else"}))
    for broken in (
        replace(word, decision=word.decision.model_copy(update={"reason": "something else"})),
        replace(word, envelope={**word.envelope, "payload": base64.b64encode(payload).decode()}),
        replace(word, envelope={**word.envelope, "payloadType": STATEMENT}),
        replace(word, envelope={**word.envelope, "signatures": []}),
        replace(word, envelope=None),
    ):
        with pytest.raises(IntegrityError) as caught:
            judged([broken], case_of(people))
        assert caught.value.exit_code == 6


def test_a_signature_on_another_plan_counts_for_nothing(people: People) -> None:
    with pytest.raises(StaleError, match=OTHER):
        judged([signed(people, "ana", plan=OTHER)], case_of(people))


def test_an_approval_that_is_played_again_is_still_one_approval(people: People) -> None:
    word = signed(people, "ana")
    two = case_of(people, policy=TEAM.model_copy(update={"approvals": 2}))
    with pytest.raises(NeedsApprovalError, match="1 of 2"):
        judged([word, replace(word, seq=51)], two)
    with pytest.raises(HeldError):
        judged([word], case_of(people, drift_digest=DRIFT))


def test_one_key_counts_once_and_two_keys_count_twice(people: People) -> None:
    two = case_of(people, policy=TEAM.model_copy(update={"approvals": 2}))
    again = signed(people, "ana", at=NOW + timedelta(seconds=1))
    with pytest.raises(NeedsApprovalError, match="1 of 2"):
        judged([signed(people, "ana"), again], two)
    judged([signed(people, "ana"), signed(people, "eva")], two)


def test_a_revoked_keys_word_counts_no_more(people: People) -> None:
    word = signed(people, "ana")
    with pytest.raises(NeedsApprovalError, match="revoked: lost"):
        judged([word], case_of(people, trust=people.revoking("ana").trust))


def test_an_untrusted_key_counts_for_nothing(people: People) -> None:
    with pytest.raises(NeedsApprovalError, match="not trusted"):
        judged([signed(people, "max")], case_of(people))


def test_a_key_that_was_trusted_only_after_it_signed_counts_for_nothing(people: People) -> None:
    with pytest.raises(NeedsApprovalError, match="not yet trusted"):
        judged([signed(people, "ana", seq=1)], case_of(people))


def test_nobody_approves_an_own_plan_by_key_or_by_name(people: People) -> None:
    own = signed(people, "ben")
    with pytest.raises(NeedsApprovalError):
        judged([own], case_of(people))
    with pytest.raises(NeedsApprovalError, match="signed this plan"):
        judged([own], case_of(people, author="somebody"))
    with pytest.raises(NeedsApprovalError, match="somebody else"):
        judged([own], case_of(people, author_key=people.keys["ana"].public.key_id))
    with pytest.raises(NeedsApprovalError, match="name alone"):
        judged([signed(people, "ana")], case_of(people, author_key=None))
    judged([own], case_of(people, policy=SOLO))


def test_a_key_cannot_sign_in_anothers_name(people: People) -> None:
    with pytest.raises(NeedsApprovalError, match="in the name of"):
        judged([signed(people, "eva", approver="ana")], case_of(people))


def test_an_expired_signature_is_stale(people: People) -> None:
    with pytest.raises(StaleError) as caught:
        judged([signed(people, "ana")], case_of(people), NOW + timedelta(hours=73))
    assert caught.value.exit_code == 8


def test_a_key_of_another_role_counts_for_nothing(people: People) -> None:
    with pytest.raises(NeedsApprovalError, match="not reviewer"):
        judged([signed(people, "gus")], case_of(people))


def test_a_name_alone_counts_only_where_the_policy_asks_for_no_signature(people: People) -> None:
    word = Word(decide(PLAN, "approved", "ana", "read it", NOW), 50, "decided", None)
    with pytest.raises(NeedsApprovalError, match="name alone"):
        judged([word], case_of(people))
    judged([word], case_of(people, policy=SOLO))


def test_the_policys_own_word_cannot_be_put_in_later(people: People) -> None:
    word = decide(PLAN, "auto-approved", "policy", "all kept", NOW)
    judged([Word(word, 50, "planned", None)], case_of(people))
    for late in (case_of(people), case_of(people, policy=SOLO)):
        with pytest.raises(NeedsApprovalError):
            judged([Word(word, 50, "decided", None)], late)
    with pytest.raises(NeedsApprovalError):
        judged([Word(word, 50, "planned", None)], case_of(people, blocked=True))


def test_only_an_emergency_word_lets_a_blocked_plan_through_and_only_for_its_hours(people: People) -> None:
    blocked = case_of(people, blocked=True)
    emergency = {"ticket": "INC-7", "hours": 2.0, "review_due": "2030-01-04"}
    word = signed(people, "gus", **emergency)
    judged([word], blocked, NOW + timedelta(minutes=119))
    with pytest.raises(StaleError):
        judged([word], blocked, NOW + timedelta(minutes=121))
    with pytest.raises(StaleError):
        judged([signed(people, "gus", **{**emergency, "hours": 48.0})], blocked)
    for wrong in (signed(people, "ana", **emergency), signed(people, "gus"), signed(people, "ana")):
        with pytest.raises(NeedsApprovalError):
            judged([wrong], blocked)
    with pytest.raises(NeedsApprovalError):
        judged([word], case_of(people))


def test_a_rejection_is_the_last_word(people: People) -> None:
    no = Word(decide(PLAN, "rejected", "eva", "not this one", NOW), 60, "decided", None)
    with pytest.raises(BlockedError):
        judged([signed(people, "ana"), no], case_of(people))


def test_replaying_the_ledger_gives_the_trusted_set_at_every_entry(people: People) -> None:
    full = people.revoking("eva").entries
    for n in range(len(full) + 1):
        known = Trust(full[:n])
        expected = {e.body["statement"]["name"] for e in full[:n] if e.kind == TRUSTED}
        assert set(known.names()) == expected
    assert Trust(full).keys == Trust(full).keys
    assert [k.name for k in Trust(full).keys.values() if k.revoked] == ["eva"]


def test_a_revoked_key_stays_revoked_when_its_old_entry_is_played_again(people: People) -> None:
    again = people.revoking("ana").trusting("ana", "reviewer")
    with pytest.raises(IntegrityError, match="for good"):
        Trust(again.entries)


def test_after_a_policy_owner_is_named_only_a_policy_owner_names_keys(people: People) -> None:
    owned = people.trusting("olga", "policy-owner")
    assert owned.trusting("max", "reviewer", "olga").trust.named("max").has("reviewer")
    for forged in (
        owned.trusting("max", "reviewer"),
        owned.trusting("max", "reviewer", "max"),
        owned.trusting("max", "reviewer", "ana"),
        owned.revoking("ana"),
    ):
        with pytest.raises(IntegrityError):
            Trust(forged.entries)


def test_a_key_statement_that_was_changed_is_an_integrity_failure(people: People) -> None:
    owned = people.trusting("olga", "policy-owner").trusting("max", "auditor", "olga")
    last = json.loads(json.dumps(owned.entries[-1].body))
    last["statement"]["role"] = "reviewer"
    with pytest.raises(IntegrityError):
        Trust((*owned.entries[:-1], replace(owned.entries[-1], body=last)))
    first = json.loads(json.dumps(people.entries[0].body))
    first["statement"]["public"] = people.keys["max"].public.public
    with pytest.raises(IntegrityError):
        Trust((replace(people.entries[0], body=first),))


def test_a_private_key_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path / "k", "ana")
    secret = tmp_path / "k" / "ana.pem"
    assert secret.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadRequestError, match="another name"):
        new_key(tmp_path / "k", "ana")
    secret.chmod(0o644)
    with pytest.raises(BadRequestError, match="others"):
        load_key(tmp_path / "k", "ana")
    with pytest.raises(NotFoundError):
        load_key(tmp_path / "k", "eva")
    with pytest.raises(BadRequestError):
        new_key(tmp_path / "k", "../eva")


def test_profile_team_asks_for_signatures_of_somebody_else_and_changes_the_digest() -> None:
    text = DATA.read_text(encoding="utf-8")
    head, rest = text.replace("separate_approver = false\n", "").split("[defaults]", 1)
    team = parse_policy(f'{head}[defaults]\nprofile = "team"{rest}', "team")
    assert team.signed and team.separate_approver and team.digest != SOLO.digest
    with pytest.raises(PolicyError, match="team"):
        parse_policy(f'{head}[defaults]\nprofile = "team"\nsigned = false{rest}', "team")
    solo = parse_policy(f'{head}[defaults]\nprofile = "solo"{rest}', "solo")
    assert solo.digest == SOLO.digest
