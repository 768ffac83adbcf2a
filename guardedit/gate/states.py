"""What may happen to an edit, as one table that code, documentation and tests read.

rejected, expired, stale, superseded and rolled-back are terminal: a new try is a new plan. From blocked only an
emergency word leads on, which lifts the policy's limits and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from guardedit.errors import BlockedError, GuardeditError, HeldError, NeedsApprovalError, StaleError

State = Literal[
    "proposed",
    "needs-approval",
    "auto-approved",
    "approved",
    "blocked",
    "rejected",
    "expired",
    "stale",
    "superseded",
    "staged",
    "held",
    "committed",
    "rolled-back",
]
Event = Literal[
    "pass",
    "ask",
    "block",
    "approve",
    "reject",
    "expire",
    "outdate",
    "supersede",
    "stage",
    "commit",
    "hold",
    "roll-back",
    "break-glass",
]
Role = Literal["author", "guardedit", "reviewer", "break-glass"]

START: State = "proposed"


class Transition(NamedTuple):
    """Where an event leads, who may cause it, and what must hold."""

    to: State
    who: Role
    guard: str


_PENDING: tuple[State, ...] = ("needs-approval", "auto-approved", "approved")

TRANSITIONS: dict[tuple[State, Event], Transition] = {
    ("proposed", "pass"): Transition("auto-approved", "guardedit", "every binding limit is kept or waived"),
    ("proposed", "ask"): Transition(
        "needs-approval", "guardedit", "a soft limit is broken, or one is inconclusive"
    ),
    ("proposed", "block"): Transition(
        "blocked", "guardedit", "a hard limit is broken, or the policy blocks on soft ones"
    ),
    ("needs-approval", "approve"): Transition("approved", "reviewer", "the approval names the plan's digest"),
    ("blocked", "break-glass"): Transition(
        "approved", "break-glass", "a signed emergency word: ticket, reason, at most 4 hours, a review due"
    ),
    **{(s, "reject"): Transition("rejected", "reviewer", "a reason is given") for s in _PENDING},
    **{(s, "expire"): Transition("expired", "guardedit", "the approval is too old") for s in _PENDING},
    **{
        (s, "outdate"): Transition("stale", "guardedit", "model, SAE or policy have moved on")
        for s in _PENDING
    },
    **{
        (s, "supersede"): Transition("superseded", "author", "a new plan for the same request")
        for s in _PENDING
    },
    ("auto-approved", "stage"): Transition("staged", "guardedit", "lock held; digests are those of the plan"),
    ("approved", "stage"): Transition(
        "staged", "guardedit", "lock held; digests are those of the plan; approval valid"
    ),
    ("staged", "commit"): Transition(
        "committed", "guardedit", "the monitor passed; one atomic pointer switch"
    ),
    ("staged", "hold"): Transition("held", "guardedit", "the monitor could not decide"),
    ("staged", "roll-back"): Transition(
        "rolled-back", "guardedit", "the monitor failed, or the process crashed"
    ),
    ("held", "commit"): Transition("committed", "reviewer", "the approval names plan and drift report"),
    ("held", "roll-back"): Transition("rolled-back", "reviewer", "rejected, or the staged copy is gone"),
    ("committed", "roll-back"): Transition(
        "rolled-back", "reviewer", "no later edit stands on the same tensors"
    ),
}

TERMINAL: frozenset[State] = frozenset(("rejected", "expired", "stale", "superseded", "rolled-back"))

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


def replay(events: Iterable[Event]) -> State:
    """The state that a recorded history ends in."""
    state: State = START
    for event in events:
        state = advance(state, event)
    return state
