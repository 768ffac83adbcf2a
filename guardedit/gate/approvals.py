"""Somebody's word: decisions bound to a plan's digest, and waivers that expire."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from guardedit.errors import BadRequestError, BlockedError, HeldError, NeedsApprovalError, StaleError
from guardedit.records import Decision, Waiver

if TYPE_CHECKING:
    from guardedit.gate.rules import Policy

MIN_WAIVER_REASON = 10
MAX_REASON = 10_000
"""Characters of a reason: it is read by people, and is on record for good."""
_SPAN = re.compile(r"^(\d{1,4})([hd])$")


def parse_time(text: str) -> datetime:
    """ISO 8601 to an aware UTC time; a time without an offset is UTC. BadRequestError when it is not a time."""
    try:
        parsed = datetime.fromisoformat(text)
        aware = parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
        return aware.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise BadRequestError(f"{text!r} is not a time; write ISO 8601, e.g. 2030-01-31T12:00:00Z") from error


def parse_expiry(text: str, now: datetime) -> str:
    """ "8h", "7d" or an ISO 8601 time, to ISO 8601 in UTC. BadRequestError unless it lies in the future."""
    span = _SPAN.match(text.strip())
    try:
        then = (
            now + timedelta(**{"hours" if span[2] == "h" else "days": int(span[1])})
            if span
            else parse_time(text)
        )
    except OverflowError as error:
        raise BadRequestError(f"expiry {text!r} is too far away") from error
    if then <= now:
        raise BadRequestError(f"expiry {text!r} is not in the future")
    return then.astimezone(UTC).isoformat()


def waiver_problem(waiver: Waiver, now: datetime) -> str | None:
    """Why a waiver counts for nothing, or None when it is valid at `now`."""
    if not waiver.author.strip():
        return "it names no author"
    if len(waiver.reason.strip()) < MIN_WAIVER_REASON:
        return f"its reason {waiver.reason!r} is shorter than {MIN_WAIVER_REASON} characters"
    try:
        expires = parse_time(waiver.expires)
    except BadRequestError:
        return f"its expiry {waiver.expires!r} is not a time"
    return f"it expired at {waiver.expires}" if expires <= now else None


def make_waiver(metric: str, author: str, reason: str, expires: str, now: datetime) -> Waiver:
    """A valid waiver, or BadRequestError. `expires` as in `parse_expiry`."""
    require_readable(f"waiver of {metric}", reason)
    waiver = Waiver(metric=metric, author=author, reason=reason, expires=parse_expiry(expires, now))
    problem = waiver_problem(waiver, now)
    if problem is not None:
        raise BadRequestError(f"waiver of {metric}: {problem}")
    return waiver


def check_waivers(waivers: Iterable[Waiver], policy: Policy, now: datetime) -> None:
    """Refuse, before work is spent, a waiver that could lift nothing. BadRequestError says why.

    `judge` ignores such waivers; this tells the person who wrote one.
    """
    for waiver in waivers:
        if policy.signed:
            raise BadRequestError(
                f"waiver of {waiver.metric}: the policy wants signed words; approve the plan instead"
            )
        problem = waiver_problem(waiver, now)
        if problem is not None:
            raise BadRequestError(f"waiver of {waiver.metric}: {problem}")
        levels = {rule.level for rule in policy.rules if rule.metric == waiver.metric}
        if "soft" not in levels:
            soft = ", ".join(sorted({r.metric for r in policy.rules if r.level == "soft"})) or "none"
            state = f"is {'/'.join(sorted(levels))}" if levels else "is in no rule"
            raise BadRequestError(
                f"waiver of {waiver.metric}: the metric {state}; only soft rules can be waived: {soft}"
            )


def require_readable(what: str, text: str) -> None:
    """BadRequestError for a text that is too long for the record."""
    if len(text) > MAX_REASON:
        raise BadRequestError(
            f"{what}: the text has {len(text)} characters; at most {MAX_REASON} are allowed"
        )


def decide(
    plan_digest: str,
    outcome: Literal["approved", "rejected", "auto-approved"],
    approver: str,
    reason: str,
    now: datetime,
    drift_digest: str | None = None,
) -> Decision:
    """A decision on record. A person's word needs a name and a reason; silence is never a yes."""
    if not approver.strip():
        raise BadRequestError(f"{outcome}: no approver is named")
    if not reason.strip():
        raise BadRequestError(f"{outcome}: a reason is needed")
    require_readable(outcome, reason)
    return Decision(
        plan_digest=plan_digest,
        outcome=outcome,
        approver=approver.strip(),
        reason=reason.strip(),
        at=now.astimezone(UTC).isoformat(),
        drift_digest=drift_digest,
    )


def require_approval(
    decision: Decision | None,
    plan_digest: str,
    author: str,
    policy: Policy,
    now: datetime,
    drift_digest: str | None = None,
) -> Decision:
    """The decision, if it lets this very plan go ahead now.

    With `drift_digest` the question is whether a held edit may be committed, and the decision must name that report.
    NeedsApprovalError or HeldError: nobody has decided. BlockedError: rejected. StaleError: another plan, or expired.
    """
    waiting = HeldError if drift_digest is not None else NeedsApprovalError
    if decision is None:
        raise waiting("nobody has approved this; use `guardedit approve` or `guardedit reject`")
    if decision.plan_digest != plan_digest:
        raise StaleError(f"the approval is for plan {decision.plan_digest}, this plan is {plan_digest}")
    if decision.outcome == "rejected":
        raise BlockedError(f"rejected by {decision.approver}: {decision.reason}")
    if drift_digest is not None and (
        decision.drift_digest != drift_digest or decision.outcome == "auto-approved"
    ):
        raise HeldError("the approval was given without this drift report; a person has to look at it")
    if policy.separate_approver and decision.outcome == "approved" and decision.approver == author:
        raise NeedsApprovalError(f"{author} wrote this plan; the policy wants somebody else to approve it")
    _refuse_expired(decision, policy, now)
    return decision


def lapsed(decision: Decision, policy: Policy, now: datetime) -> bool:
    """Whether a word is older than it may be."""
    return now - parse_time(decision.at) > timedelta(hours=hours_of(decision, policy))


def hours_of(decision: Decision, policy: Policy) -> float:
    """How long a word counts: as the policy has it, and in an emergency not longer than the word itself says."""
    return policy.approval_hours if decision.hours is None else min(decision.hours, policy.approval_hours)


def _refuse_expired(decision: Decision, policy: Policy, now: datetime) -> None:
    given = parse_time(decision.at)
    if given > now + timedelta(minutes=5):
        raise StaleError(f"the approval is dated {decision.at}, which lies in the future")
    if now - given > timedelta(hours=policy.approval_hours):
        raise StaleError(
            f"the approval of {decision.at} has expired after {policy.approval_hours:g} h; plan again"
        )
