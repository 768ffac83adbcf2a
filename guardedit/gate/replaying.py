"""The whole record played again: is every key statement, signature and step in it one that could have been made there?

Needs the ledger's entries and nothing else, so that an exported ledger is checked as a home is. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from guardedit.errors import GuardeditError, IntegrityError
from guardedit.gate.keys import opened, require_signed
from guardedit.gate.policy_words import POLICY_SIGNED, POLICY_WITHDRAWN
from guardedit.gate.signatures import DECISION, PROPOSAL, REVIEW, Proposal, Word, words_of
from guardedit.gate.states import START, Event, State, follow
from guardedit.gate.trust import REVOKED, TRUSTED, Entered, Role, Trust, TrustedKey
from guardedit.records import canonical

REVIEWED = "reviewed"
_PLANNED: tuple[Role, ...] = ("proposer",)
_DECIDED: tuple[Role, ...] = ("reviewer", "break-glass")
_REVIEWS: tuple[Role, ...] = ("reviewer", "auditor")


@dataclass(frozen=True)
class Replayed:
    """What was played again and stands."""

    trust: Trust
    key_statements: int
    policy_statements: int
    signatures: int
    """Signed plans, decisions and reviews."""
    reviews: frozenset[int]
    """Numbers of the emergency words that somebody else has looked at again."""


def replayed(entries: Sequence[Entered]) -> Replayed:
    """Play a ledger's entries again. IntegrityError names the entry that cannot stand where it is."""
    trust = Trust(entries)
    _steps(entries)
    signed = sum(_signed(entry, trust) for entry in entries)
    closed = reviews(entries, trust)
    kinds = [entry.kind for entry in entries]
    return Replayed(
        trust,
        key_statements=sum(kind in (TRUSTED, REVOKED) for kind in kinds),
        policy_statements=sum(kind in (POLICY_SIGNED, POLICY_WITHDRAWN) for kind in kinds),
        signatures=signed + kinds.count(REVIEWED),
        reviews=closed,
    )


def reviews(entries: Iterable[Entered], trust: Trust) -> frozenset[int]:
    """Emergency words whose review is closed, by entry. IntegrityError for a review that nobody could have written."""
    words: dict[int, Word] = {}
    done = set()
    for entry in entries:
        if entry.kind == "decided":
            words |= {word.seq: word for word in words_of([entry])}
        elif entry.kind == REVIEWED:
            done.add(_review(entry, words, trust))
    return frozenset(done)


def _review(entry: Entered, words: dict[int, Word], trust: Trust) -> int:
    body = {name: value for name, value in entry.body.items() if name != "envelope"}
    word = words.get(body.get("of", 0)) if isinstance(body.get("of"), int) else None
    if word is None or word.decision.ticket is None:
        raise IntegrityError(f"ledger entry {entry.seq} reviews no emergency word that stands before it")
    known = _known(trust, body.get("key"), _REVIEWS, entry)
    if known.key.key_id == word.decision.key or known.name != body.get("by"):
        raise IntegrityError(
            f"ledger entry {entry.seq}: the review is not somebody else's, or in another's name"
        )
    try:
        signed = opened(entry.body.get("envelope"), REVIEW, known.key)
    except IntegrityError as error:
        raise IntegrityError(f"ledger entry {entry.seq}: {error}") from error
    if signed != canonical(body):
        raise IntegrityError(f"ledger entry {entry.seq}: what was signed is not what is on record")
    return word.seq


def _signed(entry: Entered, trust: Trust) -> int:
    """How many signatures an entry carries, each checked against the key as it was trusted then."""
    found = 0
    for word in words_of([entry]):
        if word.decision.key is not None or word.envelope is not None:
            known = _known(trust, word.decision.key, _DECIDED, entry)
            _require(entry, word.envelope, word.decision, DECISION, known)
            found += 1
    raw = entry.body.get("proposal") if entry.kind == "planned" else None
    if raw is not None:
        proposal = _proposal(raw, entry)
        _require(entry, raw.get("envelope"), proposal, PROPOSAL, _known(trust, proposal.key, _PLANNED, entry))
        found += 1
    return found


def _proposal(raw: Any, entry: Entered) -> Proposal:
    try:
        proposal = Proposal.model_validate(raw["statement"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"the proposal in ledger entry {entry.seq} cannot be read: {error}") from error
    if proposal.plan_digest != entry.body.get("plan_digest"):
        raise IntegrityError(f"ledger entry {entry.seq}: the author signed another plan")
    return proposal


def _require(entry: Entered, envelope: Any, record: Any, kind: str, known: TrustedKey) -> None:
    try:
        require_signed(envelope, record, kind, known.key)
    except IntegrityError as error:
        raise IntegrityError(f"ledger entry {entry.seq}: {error}") from error


def _known(trust: Trust, key_id: Any, roles: tuple[Role, ...], entry: Entered) -> TrustedKey:
    known = trust.keys.get(key_id) if isinstance(key_id, str) else None
    if known is None or not any(known.had(role, entry.seq) for role in roles):
        name = known.name if known else str(key_id)[:12]
        raise IntegrityError(
            f"ledger entry {entry.seq} ({entry.kind}) carries the word of key {name}, which was not trusted then as "
            f"{' or '.join(roles)}"
        )
    return known


def _steps(entries: Iterable[Entered]) -> None:
    """Every plan's events, through the table of what may follow what."""
    states: dict[str, State] = {}
    for entry in entries:
        plan_id, event = entry.body.get("plan_id"), entry.body.get("event")
        if not plan_id or not event:
            continue
        states[plan_id] = _step(states.get(plan_id), event, entry)


def _step(state: State | None, event: Event, entry: Entered) -> State:
    try:
        return follow(START if state is None else state, event)
    except (GuardeditError, TypeError) as error:
        raise IntegrityError(f"ledger entry {entry.seq} ({entry.kind}) is out of place: {error}") from error
