"""Whether the words on record let a plan go ahead: whose signature, in which role, on what, and how many. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from guardedit.errors import GuardeditError, HeldError, IntegrityError, NeedsApprovalError, StaleError
from guardedit.gate.approvals import parse_time, require_approval
from guardedit.gate.keys import require_signed
from guardedit.gate.rules import Policy
from guardedit.gate.trust import Entered, Trust
from guardedit.records import Decision, Record

DECISION = "application/vnd.guardedit.decision+json"
PROPOSAL = "application/vnd.guardedit.proposal+json"
REVIEW = "application/vnd.guardedit.review+json"
MAX_EMERGENCY_HOURS = 4.0
Signed = dict[str, Any]
"""A DSSE envelope as JSON has it."""


@dataclass(frozen=True)
class Word:
    """A decision where it stands in the ledger."""

    decision: Decision
    seq: int
    kind: str
    envelope: Signed | None


class Proposal(Record):
    """The author's signature under a plan."""

    plan_digest: str
    author: str
    key: str
    at: str


@dataclass(frozen=True)
class Case:
    """What the words are about, and what is asked of them."""

    plan_digest: str
    author: str
    author_key: str | None
    policy: Policy
    trust: Trust
    blocked: bool = False
    """The policy stops the plan: only an emergency word lets it go ahead."""
    drift_digest: str | None = None


def words_of(entries: Iterable[Entered]) -> list[Word]:
    """Every decision in a plan's history, in order. IntegrityError for one that cannot be read."""
    try:
        return [
            Word(Decision.model_validate(e.body["decision"]), e.seq, e.kind, e.body.get("envelope"))
            for e in entries
            if e.body.get("decision")
        ]
    except ValidationError as error:
        raise IntegrityError(f"a decision on record cannot be read: {error}") from error


def proposer(planned: Entered, trust: Trust) -> str | None:
    """Id of the key that signed a plan, or None where the author is a name alone.

    IntegrityError where the signature does not fit, NeedsApprovalError where the key does not count.
    """
    raw = planned.body.get("proposal")
    if raw is None:
        return None
    try:
        proposal = Proposal.model_validate(raw["statement"])
    except (ValidationError, KeyError, TypeError) as error:
        raise IntegrityError(f"the proposal in ledger entry {planned.seq} cannot be read: {error}") from error
    known = trust.require(proposal.key, "proposer", planned.seq)
    require_signed(raw.get("envelope"), proposal, PROPOSAL, known.key)
    if proposal.plan_digest != planned.body.get("plan_digest"):
        raise IntegrityError(f"ledger entry {planned.seq}: the author signed another plan")
    return proposal.key


def require_words(words: Sequence[Word], case: Case, now: datetime) -> Decision:
    """The last word, if the words together let this very plan go ahead now.

    Raises as `require_approval` does, NeedsApprovalError for a key that does not count or too few words, IntegrityError
    for a signature that does not fit.
    """
    last = words[-1] if words else None
    if last is None or last.decision.outcome == "rejected":
        return _plain(last.decision if last else None, case, now)
    if last.decision.outcome == "auto-approved" and last.kind == "planned" and not case.blocked:
        return _plain(last.decision, case, now)
    counted, problem = _counted(words, case, now)
    needed = 1 if case.blocked else case.policy.approvals
    if len(counted) >= needed:
        return last.decision
    if problem is not None and len(counted) + 1 >= needed:
        raise problem
    raise NeedsApprovalError(f"{len(counted)} of {needed} approvals are there ({_who(counted)})")


def counted(words: Sequence[Word], case: Case, now: datetime) -> int:
    """How many people's approvals count."""
    return len(_counted(words, case, now)[0])


def _counted(
    words: Sequence[Word], case: Case, now: datetime
) -> tuple[dict[str, Decision], GuardeditError | None]:
    """Approvals that count, by key (or name), and why the last that does not is none."""
    found: dict[str, Decision] = {}
    problem: GuardeditError | None = None
    for word in words:
        if word.decision.outcome == "auto-approved" and word.kind == "planned":
            continue
        try:
            check_word(word, case, now)
        except (NeedsApprovalError, StaleError, HeldError) as error:
            problem = error
        else:
            found[word.decision.key or f"name {word.decision.approver}"] = word.decision
    return found, problem


def check_word(word: Word, case: Case, now: datetime) -> None:
    """Whether one approval counts; raises why not, as `require_words` does."""
    said, policy = word.decision, case.policy
    _plain(said, case, now)
    if said.outcome != "approved":
        raise NeedsApprovalError("the policy's own word counts where it was given, with the plan")
    if (said.ticket is not None) != case.blocked:
        raise NeedsApprovalError(
            "a blocked plan needs an emergency word" if case.blocked else "no emergency here"
        )
    if said.key is None and word.envelope is None:
        if policy.signed or case.blocked:
            raise NeedsApprovalError(
                f"{said.approver} is a name alone; the policy wants a signature (`--key`, docs/approvals.md)"
            )
        return
    _check_signature(word, case)
    if case.blocked:
        _refuse_late(said, now)


def _check_signature(word: Word, case: Case) -> None:
    said = word.decision
    role = "break-glass" if case.blocked else "reviewer"
    known = case.trust.require(said.key, role, word.seq)  # type: ignore[arg-type]
    require_signed(word.envelope, said, DECISION, known.key)
    if known.name != said.approver:
        raise NeedsApprovalError(f"key {known.name} signed in the name of {said.approver}")
    if not case.policy.separate_approver:
        return
    if said.key == case.author_key:
        raise NeedsApprovalError(
            f"key {known.name} signed this plan; the policy wants somebody else's approval"
        )
    if case.author_key is None and case.policy.signed:
        raise NeedsApprovalError(
            f"{case.author} is a name alone, so nobody can say that {known.name} is somebody else; plan with --key"
        )


def _plain(said: Decision | None, case: Case, now: datetime) -> Decision:
    return require_approval(said, case.plan_digest, case.author, case.policy, now, case.drift_digest)


def _refuse_late(said: Decision, now: datetime) -> None:
    hours = said.hours if said.hours is not None else 0.0
    if not 0 < hours <= MAX_EMERGENCY_HOURS or now - parse_time(said.at) > timedelta(hours=hours):
        raise StaleError(
            f"the emergency word of {said.at} was good for {hours:g} h; it cannot be used any more"
        )


def _who(found: dict[str, Decision]) -> str:
    return ", ".join(sorted(said.approver for said in found.values())) or "nobody's counts"


def held(case: Case, drift_digest: str) -> Case:
    """The same case once the monitor could not decide: the policy's limits before the write are behind it."""
    return replace(case, drift_digest=drift_digest, blocked=False)
