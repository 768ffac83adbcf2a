"""What the model says to each request of a plan, before the edit and on the staged copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, Plan, RequestOutcome


@dataclass(frozen=True)
class Belief:
    """How likely one request's new and old target are after its prompt."""

    p_new: float
    """Of the whole target, the product over its tokens."""
    p_old: float | None
    """None where the request names no old target."""
    new_leads: bool
    """Per token (geometric mean), the new target is more likely than the old one; without an old one, not known."""


def believed(handle: ModelHandle, requests: Sequence[EditRequest]) -> tuple[Belief, ...]:
    """Both targets of every request, all asked together."""
    named = [
        (request, target) for request in requests
        for target in (request.target_new, request.target_true) if target
    ]  # fmt: skip
    scored = iter(handle.token_logprobs([r.asked for r, _ in named], [target for _, target in named]))
    found = []
    for request in requests:
        new = next(scored)
        old = next(scored) if request.target_true else None
        leads = old is not None and float(new.double().mean()) > float(old.double().mean())
        p_old = None if old is None else math.exp(float(old.sum()))
        found.append(Belief(math.exp(float(new.sum())), p_old, leads))
    return tuple(found)


def target_probabilities(before: Sequence[Belief], after: Sequence[Belief]) -> dict[str, float]:
    """Means over the requests by "new_before", "old_before", "new_after", "old_after"; of several also the worst."""
    found: dict[str, float] = {}
    for when, beliefs in (("before", before), ("after", after)):
        old = [one.p_old for one in beliefs if one.p_old is not None]
        found[f"new_{when}"] = _mean([one.p_new for one in beliefs])
        found |= {f"old_{when}": _mean(old)} if old else {}
        if len(beliefs) > 1 and when == "after":
            found["new_after_worst"] = min(one.p_new for one in beliefs)
            found |= {"old_after_worst": max(old)} if old else {}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def outcomes(plan: Plan, before: Sequence[Belief], after: Sequence[Belief]) -> tuple[RequestOutcome, ...]:
    """A row for each request of a joint plan; () for a plan of one."""
    if not plan.is_joint:
        return ()
    return tuple(
        RequestOutcome(
            p_new_before=was.p_new,
            p_new_after=now.p_new,
            p_old_before=was.p_old,
            p_old_after=now.p_old,
            holds=now.new_leads,
        )
        for was, now in zip(before, after, strict=True)
    )
