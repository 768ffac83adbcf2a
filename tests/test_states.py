"""One table of states: documentation and code say the same, and every transition is on record before it can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pipeline_helpers import SOFT, UNDECIDED, Home, home, request_of, world

from guardedit.audit.ledger import Ledger
from guardedit.gate.states import (
    IMPLIED,
    PENDING,
    TRANSITIONS,
    Actor,
    Event,
    Kind,
    State,
    advance,
    allowed,
    follow,
)
from guardedit.gate.states_page import diagram, table
from guardedit.pipeline.history import History

__all__ = ["home", "world"]

PAGE = Path(__file__).parent.parent / "docs" / "states.md"
REASON = "looked at it: the tests want it"


def test_the_page_shows_the_table_and_the_diagram_as_the_code_has_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert table() in text and diagram() in text
    shown = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(shown) == len(TRANSITIONS) + 1, "a row too many"


def test_every_name_of_the_table_is_used_by_it() -> None:
    rows = TRANSITIONS.values()
    assert {t.who for t in rows} == set(get_args(Actor))
    assert {t.entry for t in rows} == set(get_args(Kind))
    assert {event for _, event in TRANSITIONS} == set(get_args(Event))
    assert {t.to for t in rows} | {start for start, _ in TRANSITIONS} == set(get_args(State))


def test_entries_from_before_the_monitor_had_its_own_lead_where_they_led() -> None:
    for (start, event), implied in IMPLIED.items():
        assert event not in allowed(start)
        assert follow(start, event) == advance(advance(start, implied), event)


def test_what_waits_can_be_rejected_outdated_and_superseded_and_only_a_yes_expires() -> None:
    for state in PENDING:
        assert {"reject", "outdate", "supersede"} <= set(allowed(state))
        assert ("expire" in allowed(state)) == ("stage" in allowed(state))


class Witness:
    """What a reader sees at the moment at which each entry is written."""

    def __init__(self, home: Home, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, dict[str, Any], dict[str, State], str]] = []
        append = Ledger.append

        def watched(ledger: Ledger, kind: str, body: Any, *rest: Any) -> Any:
            reader = home_reader(home)
            live = reader.store.digest() if reader.store.exists else ""
            self.seen.append((kind, body, reader.states(), live))
            return append(ledger, kind, body, *rest)

        patch.setattr(Ledger, "append", watched)


def home_reader(home: Home) -> History:
    return History(home.guard().settings)


def test_every_transition_is_one_entry_that_is_written_before_its_effect_is_visible(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader who looks while an entry is being written finds the state, and the model, from before it."""
    witness = Witness(home, monkeypatch)
    guard = home.guard(SOFT)
    plan, other = guard.plan(request_of(0)), guard.plan(request_of(1))
    guard.approve(plan.plan_id, REASON)
    committed = guard.apply(plan.plan_id)
    guard.rollback(plan.plan_id)
    assert guard.state(other.plan_id) == "stale"
    undecided = home.guard(UNDECIDED)
    held = undecided.plan(request_of(2))
    undecided.apply(held.plan_id)
    undecided.reject(held.plan_id, REASON)
    undecided.apply(held.plan_id)
    told = {}
    for kind, body, states, live in witness.seen:
        if body.get("event"):
            at = states.get(body["plan_id"], "proposed")
            implied = IMPLIED.get((at, body["event"]))
            met = advance(at, implied) if implied else at
            assert TRANSITIONS[met, body["event"]].entry == kind, (met, body["event"])
            told[body["plan_id"], body["event"]] = live
    assert told[plan.plan_id, "commit"] == plan.model_digest != committed.digest_after
    assert told[plan.plan_id, "roll-back"] == committed.digest_after
    assert {event for _, event in told} == {
        "pass", "ask", "approve", "stage", "monitor", "commit", "hold", "roll-back", "outdate",
    }  # fmt: skip


def test_a_commit_makes_other_plans_that_wait_stale_and_says_what_moved(home: Home) -> None:
    guard = home.guard(SOFT)
    first, second, third = (guard.plan(request_of(number)) for number in range(3))
    guard.reject(third.plan_id, REASON)
    guard.approve(first.plan_id, REASON)
    guard.apply(first.plan_id)
    assert guard.states() == {first.plan_id: "committed", second.plan_id: "stale", third.plan_id: "rejected"}
    (entry,) = guard.ledger.entries("outdated")
    assert entry.body["plan_id"] == second.plan_id and first.model_digest in entry.body["moved"][0]
    later = guard.plan(request_of(3))
    guard.rollback(first.plan_id)
    assert guard.state(later.plan_id) == "stale"


@pytest.mark.parametrize("word", ["approve", "reject"])
def test_a_word_on_a_held_edit_names_the_plan_and_the_monitors_report(home: Home, word: str) -> None:
    guard = home.guard(UNDECIDED)
    plan = guard.plan(request_of())
    guard.apply(plan.plan_id)
    (entry,) = guard.ledger.entries("held")
    said = getattr(guard, word)(plan.plan_id, REASON)
    assert (said.plan_digest, said.drift_digest) == (plan.digest, entry.body["drift_digest"])
