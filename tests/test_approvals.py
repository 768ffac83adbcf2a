"""An approval is somebody's word on one plan, for a time; nothing else opens the gate."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from guardedit.errors import BadRequestError, BlockedError, HeldError, NeedsApprovalError, StaleError
from guardedit.gate import states
from guardedit.gate.approvals import check_waivers, decide, make_waiver, parse_expiry, require_approval
from guardedit.gate.policy import load_policy
from guardedit.gate.states import TERMINAL, TRANSITIONS, advance, allowed, replay
from guardedit.records import digest_of_bytes

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
POLICY = load_policy(Path(__file__).parent / "data" / "policy.toml")
PLAN, OTHER, DRIFT = (digest_of_bytes(name) for name in (b"plan", b"other", b"drift"))


def test_an_approval_lets_its_own_plan_go_ahead() -> None:
    decision = decide(PLAN, "approved", " ana ", "read the report", NOW)
    assert require_approval(decision, PLAN, "ben", POLICY, NOW + timedelta(hours=71)) == decision
    assert decision.approver == "ana"


def test_silence_is_never_a_yes() -> None:
    with pytest.raises(NeedsApprovalError) as waiting:
        require_approval(None, PLAN, "ben", POLICY, NOW)
    with pytest.raises(HeldError) as held:
        require_approval(None, PLAN, "ben", POLICY, NOW, drift_digest=DRIFT)
    assert (waiting.value.exit_code, held.value.exit_code) == (4, 9)
    for approver, reason in (("", "a reason"), ("ana", ""), ("ana", "  \n")):
        with pytest.raises(BadRequestError):
            decide(PLAN, "approved", approver, reason, NOW)


def test_an_approval_of_another_plan_is_stale() -> None:
    with pytest.raises(StaleError, match=OTHER):
        require_approval(decide(OTHER, "approved", "ana", "fine", NOW), PLAN, "ben", POLICY, NOW)


def test_a_rejection_blocks_and_says_who_and_why() -> None:
    with pytest.raises(BlockedError, match="ana: not this one"):
        require_approval(decide(PLAN, "rejected", "ana", "not this one", NOW), PLAN, "ben", POLICY, NOW)


@pytest.mark.parametrize(
    "shift", [timedelta(hours=72, seconds=1), timedelta(days=400), timedelta(minutes=-6)]
)
def test_an_approval_that_is_too_old_or_from_the_future_is_stale(shift: timedelta) -> None:
    with pytest.raises(StaleError):
        require_approval(decide(PLAN, "approved", "ana", "fine", NOW), PLAN, "ben", POLICY, NOW + shift)


def test_where_the_policy_asks_for_a_second_person_the_author_is_not_one() -> None:
    strict = POLICY.model_copy(update={"separate_approver": True})
    own = decide(PLAN, "approved", "ben", "trust me", NOW)
    with pytest.raises(NeedsApprovalError, match="somebody else"):
        require_approval(own, PLAN, "ben", strict, NOW)
    require_approval(own, PLAN, "ben", POLICY, NOW)
    require_approval(decide(PLAN, "auto-approved", "policy", "all kept", NOW), PLAN, "policy", strict, NOW)


def test_a_held_edit_needs_a_word_on_its_drift_report() -> None:
    for decision in (
        decide(PLAN, "approved", "ana", "fine", NOW),
        decide(PLAN, "approved", "ana", "fine", NOW, drift_digest=OTHER),
        decide(PLAN, "auto-approved", "policy", "fine", NOW, drift_digest=DRIFT),
    ):
        with pytest.raises(HeldError):
            require_approval(decision, PLAN, "ben", POLICY, NOW, drift_digest=DRIFT)
    seen = decide(PLAN, "approved", "ana", "looked at it", NOW, drift_digest=DRIFT)
    assert require_approval(seen, PLAN, "ben", POLICY, NOW, drift_digest=DRIFT) == seen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8h", "2030-01-01T20:00:00+00:00"),
        ("7d", "2030-01-08T12:00:00+00:00"),
        ("2030-02-01", "2030-02-01T00:00:00+00:00"),
        ("2030-02-01T12:00:00+02:00", "2030-02-01T10:00:00+00:00"),
    ],
)
def test_an_expiry_is_a_span_or_a_time(text: str, expected: str) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize(
    "text",
    ["0h", "2029-01-01", "2030-01-01T12:00:00Z", "soon", "", "-3d", "9999999d", "9999-12-31T23:59:59-23:59"],
)
def test_an_expiry_that_is_no_future_time_is_refused(text: str) -> None:
    with pytest.raises(BadRequestError):
        parse_expiry(text, NOW)


def test_a_waiver_that_could_lift_nothing_is_refused_before_work_is_spent() -> None:
    good = make_waiver("preop/leakage_share", "ana", "agreed in the review", "7d", NOW)
    check_waivers([good], POLICY, NOW)
    with pytest.raises(BadRequestError, match="shorter than 10"):
        make_waiver("preop/leakage_share", "ana", "because", "7d", NOW)
    for metric, message in (
        ("preop/key_leakage", "is hard"),
        ("preop/delta_norm_ratio", "is advisory"),
        ("preop/nothing", "in no rule"),
    ):
        with pytest.raises(BadRequestError, match=message):
            check_waivers([good.model_copy(update={"metric": metric})], POLICY, NOW)
    with pytest.raises(BadRequestError, match="expired"):
        check_waivers([good], POLICY, NOW + timedelta(days=8))


def test_nothing_leaves_a_terminal_state() -> None:
    assert {state for state in TERMINAL if allowed(state)} == set()
    with pytest.raises(StaleError, match="make a new plan"):
        advance("rolled-back", "commit")


def test_every_state_but_the_first_is_reached_and_every_other_is_left() -> None:
    reached = {t.to for t in TRANSITIONS.values()} | {states.START}
    assert reached == {start for start, _ in TRANSITIONS} | set(TERMINAL)


def test_the_only_ways_to_committed_go_through_an_approval_and_a_staged_copy() -> None:
    """Every path of the table, walked: no commit without `stage`, no `stage` without a yes."""
    paths: list[tuple[states.State, tuple[states.Event, ...]]] = [(states.START, ())]
    commits = []
    while paths:
        state, path = paths.pop()
        if state == "committed":
            commits.append(path)
            continue
        paths += [(advance(state, event), (*path, event)) for event in allowed(state)]
    assert commits
    for path in commits:
        assert "stage" in path
        assert {"pass", "approve", "break-glass"} & set(path[: path.index("stage")])
        assert replay(path) == "committed"


@pytest.mark.parametrize(
    ("state", "event", "exit_code"),
    [("blocked", "stage", 3), ("rejected", "stage", 3), ("needs-approval", "stage", 4), ("held", "stage", 9)],
)
def test_an_event_out_of_place_ends_with_the_exit_code_of_the_state_it_met(
    state: states.State, event: states.Event, exit_code: int
) -> None:
    from guardedit.errors import GuardeditError

    with pytest.raises(GuardeditError) as caught:
        advance(state, event)
    assert caught.value.exit_code == exit_code
