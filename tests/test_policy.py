"""Judging fails closed, is deterministic, and only what the policy says decides."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_helpers import HEAD, _rule, example

from guardedit.gate.policy import Policy, judge, lineage_scores, metric_of, parse_policy
from guardedit.records import Score, Waiver

__all__ = ["example"]

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def _policy(*rules: str, head: str = HEAD) -> Policy:
    return parse_policy(head + "".join(rules), "t.toml")


def _score(name: str, value: float | None, stage: str = "delta", scope: str = "far", **more: object) -> Score:
    return Score.model_validate(
        {"name": name, "value": value, "unit": "ratio", "stage": stage, "scope": scope, "n": 100, **more}
    )


def _waiver(metric: str = "preop/leakage", **changes: str) -> Waiver:
    fields = {"author": "ana", "reason": "reviewed by hand, ticket 7", "expires": "2030-01-02T00:00:00Z"}
    return Waiver(metric=metric, **(fields | changes))


GOOD = (
    _score("key_leakage", 1e-4, "key"),
    _score("leakage_share", 1e-4),
    _score("delta_norm_ratio", 0.02),
    _score("subject_position", 3.0, "key"),
)
GOOD_AFTER = (_score("far_kl", 0.001, "postop"), _score("lineage_far_kl", 0.001, "postop"))


def test_all_limits_kept_is_auto_approved_before_and_committed_after(example: Policy) -> None:
    before, after = judge(GOOD, example, (), "preop", NOW), judge(GOOD_AFTER, example, (), "postop", NOW)
    assert (before.outcome, before.verdict) == ("auto-approved", "pass")
    assert (after.outcome, after.verdict) == ("committed", "pass")
    assert before.policy_digest == example.digest


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_score_of_a_binding_rule_goes_to_a_person(example: Policy, missing: int) -> None:
    scores = GOOD[:missing] + GOOD[missing + 1 :]
    judged = judge(scores, example, (), "preop", NOW)
    advisory = GOOD[missing].name == "delta_norm_ratio"
    assert judged.outcome == ("auto-approved" if advisory else "needs-approval")
    assert judged.findings[
        [f.metric for f in judged.findings].index(f"preop/{GOOD[missing].name}")
    ].verdict == ("inconclusive")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("op", ["<=", ">=", "==", "<", ">"])
def test_a_value_that_is_no_number_never_passes_any_comparison(op: str, value: float | None) -> None:
    """Records refuse NaN; this is for a score that was built around them."""
    policy = _policy(_rule(op=f'"{op}"'), _rule(id='"b"', metric='"postop/leakage"', op=f'"{op}"'))
    for stage, outcome in (("preop", "needs-approval"), ("postop", "held")):
        score = _score("leakage", 0.0, "postop" if stage == "postop" else "delta").model_copy(
            update={"value": value}
        )
        judged = judge([score], policy, (), stage, NOW)  # type: ignore[arg-type]
        assert (judged.verdict, judged.outcome) == ("inconclusive", outcome)


def test_a_metric_measured_twice_is_inconclusive_even_if_both_values_pass() -> None:
    judged = judge([_score("leakage", 0.1), _score("leakage", 0.2)], _policy(_rule()), (), "preop", NOW)
    assert judged.outcome == "needs-approval"
    assert "2 times" in judged.findings[0].sentence


@pytest.mark.parametrize(("n", "verdict"), [(None, "inconclusive"), (29, "inconclusive"), (30, "pass")])
def test_a_score_from_too_few_units_is_inconclusive(n: int | None, verdict: str) -> None:
    judged = judge([_score("leakage", 0.1, n=n)], _policy(_rule(min_n="30")), (), "preop", NOW)
    assert judged.verdict == verdict


def test_a_rule_with_a_scope_takes_no_other_scopes_score() -> None:
    policy = _policy(_rule(scope='"near"'))
    assert judge([_score("leakage", 0.1, scope="far")], policy, (), "preop", NOW).verdict == "inconclusive"
    assert judge([_score("leakage", 0.1, scope="near")], policy, (), "preop", NOW).verdict == "pass"


def test_scores_of_the_monitor_do_not_answer_for_those_before_the_edit() -> None:
    assert (
        judge([_score("leakage", 0.1, "postop")], _policy(_rule()), (), "preop", NOW).verdict
        == "inconclusive"
    )


def test_a_policy_that_binds_nothing_at_a_stage_decides_nothing_there() -> None:
    policy = _policy(_rule(level='"advisory"'))
    for stage, outcome in (("preop", "needs-approval"), ("postop", "held")):
        judged = judge([_score("leakage", 0.1)], policy, (), stage, NOW)  # type: ignore[arg-type]
        assert judged.outcome == outcome
        assert "no binding rule" in judged.reason


LEVELS: tuple[Literal["advisory", "soft", "hard"], ...] = ("advisory", "soft", "hard")
VALUES = {"pass": 0.5, "fail": 2.0, "inconclusive": None}


@pytest.mark.parametrize(
    ("level", "verdict", "before", "after"),
    [
        ("advisory", "pass", "auto-approved", "committed"),
        ("advisory", "fail", "auto-approved", "committed"),
        ("advisory", "inconclusive", "auto-approved", "committed"),
        ("soft", "pass", "auto-approved", "committed"),
        ("soft", "fail", "needs-approval", "rolled-back"),
        ("soft", "inconclusive", "needs-approval", "held"),
        ("hard", "pass", "auto-approved", "committed"),
        ("hard", "fail", "blocked", "rolled-back"),
        ("hard", "inconclusive", "needs-approval", "held"),
    ],
)
def test_what_follows_from_each_level_and_verdict(level: str, verdict: str, before: str, after: str) -> None:
    """Beside one rule that passes, so that an advisory rule is not alone."""
    for stage, outcome in (("preop", before), ("postop", after)):
        own, beside = f'"{stage}/own"', f'"{stage}/beside"'
        policy = _policy(_rule(metric=own, level=f'"{level}"'), _rule(id='"b"', metric=beside))
        at = "postop" if stage == "postop" else "delta"
        scores = [_score("own", VALUES[verdict], at), _score("beside", 0.0, at)]
        judged = judge(scores, policy, (), stage, NOW)  # type: ignore[arg-type]
        assert (judged.findings[0].verdict, judged.outcome) == (verdict, outcome)


def test_the_policy_may_block_on_soft_findings() -> None:
    policy = _policy('[defaults]\non_soft_fail = "blocked"\n', _rule())
    assert judge([_score("leakage", 2.0)], policy, (), "preop", NOW).outcome == "blocked"
    assert judge([], policy, (), "preop", NOW).outcome == "needs-approval"


def test_a_waiver_lifts_a_soft_failure_and_is_on_record() -> None:
    judged = judge([_score("leakage", 2.0)], _policy(_rule()), (_waiver(),), "preop", NOW)
    assert (judged.outcome, judged.findings[0].verdict) == ("auto-approved", "fail")
    assert judged.findings[0].waiver == _waiver()
    assert "Waived by ana" in judged.reason and "reviewed by hand" in judged.reason


@pytest.mark.parametrize(
    ("level", "value", "waiver"),
    [
        ("hard", 2.0, _waiver()),
        ("soft", None, _waiver()),
        ("soft", 2.0, _waiver("preop/other")),
        ("soft", 2.0, _waiver("postop/leakage")),
        ("soft", 2.0, _waiver(expires="2029-12-31T23:59:59Z")),
        ("soft", 2.0, _waiver(expires="2030-01-01T00:00:00+00:00")),
        ("soft", 2.0, _waiver(expires="some day")),
        ("soft", 2.0, _waiver(reason="too short")),
        ("soft", 2.0, _waiver(author="  ")),
    ],
)
def test_no_other_waiver_lifts_anything(level: str, value: float | None, waiver: Waiver) -> None:
    policy, scores = _policy(_rule(level=f'"{level}"')), [_score("leakage", value)]
    with_it, without = (judge(scores, policy, w, "preop", NOW) for w in ((waiver,), ()))
    assert with_it == without
    assert with_it.outcome in ("blocked", "needs-approval")


def test_a_waiver_on_a_kept_limit_is_not_attached() -> None:
    assert (
        judge([_score("leakage", 0.5)], _policy(_rule()), (_waiver(),), "preop", NOW).findings[0].waiver
        is None
    )


verdicts = st.sampled_from(["pass", "fail", "inconclusive"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(LEVELS), verdicts), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_judging_is_a_function_of_the_set_of_scores_and_never_better_for_a_worse_finding(
    rules: list[tuple[str, str]], chance: random.Random
) -> None:
    """Order does not matter; turning any finding from pass to inconclusive to fail never improves the outcome."""
    text = [
        _rule(id=f'"r{i}"', metric=f'"preop/m{i}"', level=f'"{level}"') for i, (level, _) in enumerate(rules)
    ]
    policy = _policy(*text)
    rank = {"auto-approved": 0, "needs-approval": 1, "blocked": 2}

    def outcome(kinds: list[str]) -> str:
        scores = [_score(f"m{i}", VALUES[kind]) for i, kind in enumerate(kinds)]
        chance.shuffle(scores)
        return judge(scores, policy, (), "preop", NOW).outcome

    kinds = [verdict for _, verdict in rules]
    assert outcome(kinds) == outcome(kinds)
    worse = {"pass": "inconclusive", "inconclusive": "fail", "fail": "fail"}
    for i in range(len(kinds)):
        changed = [*kinds[:i], worse[kinds[i]], *kinds[i + 1 :]]
        assert rank[outcome(changed)] >= rank[outcome(kinds)]


def test_screening_looks_at_key_rules_alone(example: Policy) -> None:
    screened = judge([_score("key_leakage", 1e-3, "key")], example, (), "key", NOW)
    assert [f.rule for f in screened.findings] == ["key-leakage"]
    assert (screened.outcome, screened.findings[0].stage) == ("blocked", "preop")
    assert judge([], example, (), "key", NOW).outcome == "needs-approval"
    assert judge([_score("key_leakage", 1e-5, "key")], example, (), "key", NOW).outcome == "auto-approved"


def test_the_sum_over_a_lineage_has_its_own_limit(example: Policy) -> None:
    step, total = (_score("far_kl", 0.001, "postop"),), lineage_scores([_score("far_kl", 0.2, "postop")])
    assert metric_of(total[0]) == "postop/lineage_far_kl"
    assert judge((*step, *total), example, (), "postop", NOW).outcome == "rolled-back"
    assert judge(step, example, (), "postop", NOW).outcome == "held"


def test_sentences_read_as_prose_with_their_numbers(example: Policy) -> None:
    findings = judge((*GOOD[:1], _score("leakage_share", 0.0123456)), example, (), "preop", NOW).findings
    assert findings[1].sentence == (
        "Ordinary text would move by 0.01235 of its usual size at the edited layer; at most 0.001 is allowed."
    )
    assert findings[3].sentence.startswith("Could not be checked: subject_position was not measured.")
    assert not [f for f in findings if "{" in f.sentence]


def test_the_reason_a_score_gives_for_having_no_value_is_passed_on() -> None:
    score = _score("leakage", None, reason="the SAE reconstructs 12 % of this key")
    assert (
        "the SAE reconstructs 12 %" in judge([score], _policy(_rule()), (), "preop", NOW).findings[0].sentence
    )


def test_a_blocked_plan_is_told_what_blocks_it_and_not_what_merely_stands_beside() -> None:
    policy = _policy(
        _rule(), _rule(id='"b"', metric='"preop/other"', level='"hard"', sentence='"The other is {value}."')
    )
    assert (
        judge([_score("leakage", 2.0), _score("other", 3.0)], policy, (), "preop", NOW).reason
        == "The other is 3."
    )


def test_every_pair_of_ops_and_sides_is_decided_as_mathematics_says() -> None:
    truth = {"<=": (True, True, False), "<": (True, False, False), "==": (False, True, False)}
    truth |= {">=": (False, True, True), ">": (False, False, True)}
    for (op, row), (i, value) in itertools.product(truth.items(), enumerate((0.5, 1.0, 1.5))):
        judged = judge([_score("leakage", value)], _policy(_rule(op=f'"{op}"')), (), "preop", NOW)
        assert (judged.verdict == "pass") is row[i]


def test_many_limits_that_cannot_be_checked_are_named_in_one_line() -> None:
    rules = [
        f'[[rule]]\nid = "r{i}"\nmetric = "preop/m{i}"\nop = "<="\nlimit = 1\nlevel = "soft"\n'
        'sentence = "It is {value} here."\n'
        for i in range(5)
    ]
    judgement = judge([], _policy(*rules), [], "preop", NOW)
    assert judgement.outcome == "needs-approval" and judgement.verdict == "inconclusive"
    assert judgement.reason.count("\n") == 0 and len(judgement.reason) < 120
    assert all(f"m{i}" in judgement.reason for i in range(5))
    few = judge([], _policy(*rules[:2]), [], "preop", NOW)
    assert few.reason.count("Could not be checked") == 2
