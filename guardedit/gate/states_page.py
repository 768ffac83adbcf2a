"""The table of states as a page shows it: docs/states.md holds what these functions give, and a test compares."""

from __future__ import annotations

from typing import get_args

from guardedit.gate.states import START, TERMINAL, TRANSITIONS, State

HEAD = "| from | event | to | who | ledger entry | what must hold |"


def table() -> str:
    """The transitions as a Markdown table, in the table's own order."""
    rows = [
        f"| {start} | {event} | {t.to} | {t.who} | `{t.entry}` | {t.guard} |"
        for (start, event), t in TRANSITIONS.items()
    ]
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *rows])


def diagram() -> str:
    """The same as a Mermaid state diagram."""
    names = [f'    state "{state}" as {_alias(state)}' for state in get_args(State) if "-" in state]
    arrows = [f"    {_alias(start)} --> {_alias(t.to)}: {event}" for (start, event), t in TRANSITIONS.items()]
    ends = [f"    {_alias(state)} --> [*]" for state in get_args(State) if state in TERMINAL]
    return "\n".join(["stateDiagram-v2", *names, f"    [*] --> {START}", *arrows, *ends])


def _alias(state: str) -> str:
    return state.replace("-", "_")
