"""What may happen to an edit: one table, which code, documentation (docs/states.md) and tests read.

Every transition is made by a ledger entry of one kind, which is written before its effect can be seen. rejected,
superseded and rolled-back are terminal; from expired and stale only a new plan leads on; from blocked only an emergency
word does, which lifts the policy's limits and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from guardedit.errors import BlockedError, GuardeditError, HeldError, NeedsApprovalError, StaleError

State = Literal[
    "proposed",
    "checked",
    "blocked",
    "needs-approval",
    "auto-approved",
    "approved",
    "rejected",
    "expired",
    "stale",
    "superseded",
    "applied",
    "monitored",
    "held",
    "committed",
    "rolled-back",
]
Event = Literal[
    "check",
    "pass",
    "ask",
    "block",
    "approve",
    "reject",
    "expire",
    "outdate",
    "supersede",
    "stage",
    "monitor",
    "commit",
    "hold",
    "roll-back",
    "break-glass",
]
Actor = Literal["proposer", "policy", "reviewer", "break-glass", "clock", "runner"]
"""Who makes a transition. Policy owners and auditors make none: they name keys, and close reviews."""
Kind = Literal[
    "planned",
    "decided",
    "expired",
    "outdated",
    "superseded",
    "staged",
    "monitored",
    "held",
    "committed",
    "rolled-back",
]

START: State = "proposed"


class Transition(NamedTuple):
    """Where an event leads, who may cause it, which ledger entry makes it, and what must hold."""

    to: State
    who: Actor
    entry: Kind
    guard: str


PENDING: tuple[State, ...] = ("needs-approval", "auto-approved", "approved")
"""Planned, and neither applied nor given up."""
_YES: tuple[State, ...] = ("auto-approved", "approved")

_PLANNED: dict[tuple[State, Event], Transition] = {
    ("proposed", "check"): Transition(
        "checked", "runner", "planned", "solved and measured on the live model; nothing is written to it"
    ),
    ("checked", "pass"): Transition(
        "auto-approved", "policy", "planned", "every binding limit is kept or waived"
    ),
    ("checked", "ask"): Transition(
        "needs-approval", "policy", "planned", "a soft limit is broken, or one is inconclusive"
    ),
    ("checked", "block"): Transition(
        "blocked", "policy", "planned", "a hard limit is broken, or the policy blocks on soft ones"
    ),
}
_DECIDED: dict[tuple[State, Event], Transition] = {
    ("needs-approval", "approve"): Transition(
        "approved", "reviewer", "decided", "as many approvals of the plan's digest as the policy asks for"
    ),
    ("blocked", "break-glass"): Transition(
        "approved",
        "break-glass",
        "decided",
        "a signed emergency word: ticket, reason, at most 4 hours, a review due",
    ),
    **{(s, "reject"): Transition("rejected", "reviewer", "decided", "a reason is given") for s in PENDING},
    **{
        (s, "expire"): Transition("expired", "clock", "expired", "the word is older than it may be")
        for s in _YES
    },
    **{
        (s, "outdate"): Transition(
            "stale", "runner", "outdated", "the live model, the policy, an SAE or a statistic is another"
        )
        for s in PENDING
    },
    **{
        (s, "supersede"): Transition(
            "superseded", "proposer", "superseded", "a new plan is there, and is named"
        )
        for s in (*PENDING, "expired", "stale")
    },
}
_APPLIED: dict[tuple[State, Event], Transition] = {
    ("auto-approved", "stage"): Transition(
        "applied", "runner", "staged", "lock held; digests are those of the plan; waivers stand"
    ),
    ("approved", "stage"): Transition(
        "applied", "runner", "staged", "lock held; digests are those of the plan; the words still count"
    ),
    ("applied", "monitor"): Transition(
        "monitored", "runner", "monitored", "the copy's bytes, read back from disk, are those of the plan"
    ),
    ("applied", "roll-back"): Transition(
        "rolled-back", "runner", "rolled-back", "the monitor did not finish, or the process ended"
    ),
    ("monitored", "commit"): Transition(
        "committed", "policy", "committed", "the monitor's verdict is pass; one atomic pointer switch"
    ),
    ("monitored", "hold"): Transition("held", "policy", "held", "the verdict is inconclusive"),
    ("monitored", "roll-back"): Transition(
        "rolled-back", "policy", "rolled-back", "the verdict is fail, or the process ended"
    ),
    ("held", "commit"): Transition(
        "committed", "reviewer", "committed", "the approval names the plan and the drift report"
    ),
    ("held", "roll-back"): Transition(
        "rolled-back", "reviewer", "rolled-back", "rejected or taken back, or the copy is gone or out of date"
    ),
    ("committed", "roll-back"): Transition(
        "rolled-back", "runner", "rolled-back", "asked for; no later edit stands on the same tensors"
    ),
}
TRANSITIONS: dict[tuple[State, Event], Transition] = {**_PLANNED, **_DECIDED, **_APPLIED}

IMPLIED: dict[tuple[State, Event], Event] = {
    **{("proposed", word): "check" for word in ("pass", "ask", "block")},
    **{("applied", word): "monitor" for word in ("commit", "hold")},
}
"""Steps that an entry makes on the way. A plan is on record once it is solved, measured and judged: in one entry, so
that no crash can leave half of it. Ledgers from before the monitor had an entry of its own keep their meaning."""

TERMINAL: frozenset[State] = frozenset(("rejected", "superseded", "rolled-back"))

_REFUSAL: dict[State, type[GuardeditError]] = {
    "blocked": BlockedError,
    "rejected": BlockedError,
    "needs-approval": NeedsApprovalError,
    "held": HeldError,
}


def allowed(state: State) -> tuple[Event, ...]:
    """Events that mean something in `state`, in the table's order."""
    return tuple(event for (start, event) in TRANSITIONS if start == state)


def advance(state: State, event: Event) -> State:
    """The next state. An event that is not allowed raises the error of the state it met, never passes."""
    transition = TRANSITIONS.get((state, event))
    if transition is None:
        options = ", ".join(allowed(state)) or "nothing; make a new plan"
        raise _REFUSAL.get(state, StaleError)(
            f"`{event}` is not possible while the edit is {state}; possible: {options}"
        )
    return transition.to


def follow(state: State, event: Event) -> State:
    """The state after an event on record, with the steps that its entry makes on the way."""
    implied = IMPLIED.get((state, event))
    return advance(advance(state, implied) if implied else state, event)


def standing(steps: Iterable[tuple[Any, Any]]) -> dict[str, State]:
    """Where every plan stands after these (plan, event) in order; those without either name no step."""
    states: dict[str, State] = {}
    for plan_id, event in steps:
        if plan_id and event:
            states[plan_id] = follow(states.get(plan_id, START), event)
    return states


def replay(events: Iterable[Event]) -> State:
    """The state that a recorded history ends in."""
    state: State = START
    for event in events:
        state = follow(state, event)
    return state
