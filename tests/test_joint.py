"""Plans of many requests on a tiny model: screened one by one, solved as one, committed and undone as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from joint_helpers import THREE, key_policy, others, split
from pipeline_helpers import SOFT, Home, home, policy_text, request_of, world

from guardedit.editors import EDITORS, Editor
from guardedit.editors.finetune import FinetuneHparams, solve_finetune
from guardedit.edits.deltas import EditDelta, written
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, BlockedError
from guardedit.gate.approvals import make_waiver
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest

__all__ = ["home", "split", "world"]


def test_a_joint_plan_is_committed_and_undone_as_a_whole_bit_for_bit(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(THREE, editor="finetune")
    assert plan.requests == tuple(THREE) and plan.stopped == () and plan.is_joint
    assert [row.subject for row in plan.screened] == [request.subject for request in THREE]
    assert guard.handle.digest() == plan.model_digest and len(plan.delta.changes) == 1
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "committed" and audit.digest_after == audit.digest_staged != plan.model_digest
    assert len(audit.outcomes) == 3 and len(guard.ledger.entries("committed")) == 1
    assert home.guard().handle.digest() == audit.digest_after
    undone = home.guard().rollback(plan.plan_id)
    assert undone.digest_after == plan.model_digest == home.guard().handle.digest()
    assert guard.verify()["digest"] == plan.model_digest


def test_the_joint_delta_is_solved_for_and_scored_over_all_requests(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(THREE, editor="finetune")
    alone = guard.plan(THREE[0], editor="finetune")
    assert plan.delta.file_digest != alone.delta.file_digest and not alone.is_joint and alone.screened == ()
    worst = plan.risk.score("key_leakage")
    assert worst is not None and worst.value == max(row.scores["key_leakage"] or 0 for row in plan.screened)
    new, low = plan.risk.score("rehearsed_p_new"), []
    with written(guard.handle, guard.read_delta(plan)) as handle:
        for request in THREE:
            (logprobs,) = handle.token_logprobs([request.filled], [request.target_new])
            low.append(float(logprobs.double().sum().exp()))
    assert new is not None and new.n == 3 and new.value == pytest.approx(min(low), rel=1e-3)


def test_what_the_policy_stops_is_left_out_listed_and_untouched(home: Home, split: tuple[float, int]) -> None:
    limit, place = split
    guard = home.guard(policy=key_policy(home, limit))
    plan = guard.plan(THREE, editor="finetune")
    assert plan.stopped == (THREE[place],) and plan.requests == tuple(others(place))
    assert [row.stopped for row in plan.screened] == [number == place for number in range(3)]
    assert plan.judgement.outcome == "auto-approved" and "leaks" in plan.screened[place].reason
    (left_out,) = guard.plan_entry(plan.plan_id).body["stopped"]
    assert left_out["request"]["subject"] == THREE[place].subject and "leaks" in left_out["reason"]
    # The delta is that of the others alone: what is stopped has no part in it.
    lenient = home.guard()
    alone = lenient.plan(others(place), editor="finetune")
    assert plan.delta.file_digest == alone.delta.file_digest
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "committed" and len(audit.outcomes) == 2


def test_a_policy_may_refuse_the_plan_for_one_stopped_request(home: Home, split: tuple[float, int]) -> None:
    limit, place = split
    guard = home.guard(policy=key_policy(home, limit, defaults='on_stopped = "refuse"'))
    plan = guard.plan(THREE, editor="finetune")
    assert plan.judgement.outcome == "blocked" and plan.delta.changes == ()
    assert plan.stopped == (THREE[place],) and plan.requests == tuple(others(place))
    assert f"stops 1 of 3 requests. {THREE[place].subject}: " in plan.judgement.reason
    with pytest.raises(BlockedError):
        guard.apply(plan.plan_id)
    assert guard.state(plan.plan_id) == "blocked" and guard.store.digest() == plan.model_digest


def test_where_all_are_stopped_nothing_is_solved_and_the_record_says_why(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = home.guard(policy=key_policy(home, 0.0))

    def never(*_: Any) -> EditDelta:
        raise AssertionError("nothing was to be solved")

    monkeypatch.setitem(EDITORS, "finetune", Editor(FinetuneHparams, never, "never", joint=True))
    plan = guard.plan(THREE, editor="finetune")
    assert plan.judgement.outcome == "blocked" and plan.requests == () and plan.stopped == tuple(THREE)
    assert all(f"{request.subject}: " in plan.judgement.reason for request in THREE)
    assert [finding.verdict for finding in plan.judgement.findings] == ["fail"] * 3
    assert {score.stage for score in plan.risk.scores} == {"key"}
    audit = home.guard().report(plan.plan_id).audit
    assert audit.outcome == "blocked" and audit.plan == plan
    assert [line["edit"] for line in guard.status()["plans"]] == ["0 facts; 3 stopped"]
    assert home.guard().verify()["plans"] == 1


@pytest.mark.parametrize("on_soft_fail", ["needs-approval", "blocked"])
def test_a_soft_finding_stops_a_request_and_a_waiver_lifts_it_at_screening(
    home: Home, split: tuple[float, int], on_soft_fail: str
) -> None:
    limit, place = split
    policy = key_policy(home, limit, "soft", f'on_soft_fail = "{on_soft_fail}"')
    guard = home.guard(policy=policy)
    assert guard.plan(THREE, editor="finetune").stopped == (THREE[place],)
    lifted = make_waiver("preop/key_leakage", guard.user, "the tests want it lifted", "8h", guard.now())
    plan = guard.plan(THREE, editor="finetune", waivers=[lifted])
    assert plan.requests == tuple(THREE) and plan.stopped == ()
    (finding,) = plan.screened[place].findings
    assert finding.verdict == "fail" and finding.waiver == lifted
    assert all(row.findings == () for number, row in enumerate(plan.screened) if number != place)
    assert plan.judgement.outcome == "auto-approved" and guard.apply(plan.plan_id).outcome == "committed"


def test_a_waiver_of_a_joint_plan_afterwards_keeps_all_its_requests(home: Home) -> None:
    guard = home.guard(SOFT)
    plan = guard.plan(THREE, editor="finetune")
    word = make_waiver("preop/delta_norm_ratio", guard.user, "the tests want it lifted", "8h", guard.now())
    made = guard.waive(plan.plan_id, [word])
    assert (made.requests, made.screened, made.delta) == (plan.requests, plan.screened, plan.delta)
    assert made.judgement.outcome == "auto-approved" and guard.state(plan.plan_id) == "superseded"


def test_what_cannot_be_measured_does_not_go_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from guardedit.errors import SolveError
    from guardedit.models.second_moment import SecondMoment

    guard = home.guard(policy=key_policy(home, 1e9))

    def broken(*_: Any) -> Any:
        raise SolveError("not positive definite")

    monkeypatch.setattr(SecondMoment, "solve", broken)
    plan = guard.plan(THREE, editor="finetune")
    assert plan.judgement.outcome == "blocked" and plan.judgement.verdict == "inconclusive"
    assert plan.stopped == tuple(THREE) and "not positive definite" in plan.judgement.reason


def test_many_requests_need_a_joint_editor(home: Home) -> None:
    guard = home.guard()
    with pytest.raises(BadRequestError, match=r"rome edits one fact at a time, got 3.*--each.*finetune"):
        guard.plan(THREE)
    with pytest.raises(BadRequestError, match="no request"):
        guard.plan([], editor="finetune")
    with pytest.raises(BadRequestError, match="request 2: unknown key 'subjet'"):
        guard.plan([THREE[0], {"subjet": "x"}], editor="finetune")
    assert not home.folder.exists()


def test_requests_that_repeat_or_contradict_each_other_are_refused_by_name(home: Home) -> None:
    other = THREE[0].model_copy(update={"target_new": "Madrid"})
    with pytest.raises(BadRequestError, match=r"request 4 \(.*Eiffel Tower.*\) repeats request 1"):
        home.guard().plan([*THREE, THREE[0]], editor="finetune")
    path = home.requests(*[one.model_dump(exclude_defaults=True) for one in (*THREE, other)])
    ran = home.run("plan", str(path), "--editor", "finetune")
    assert ran.code == 2 and "request 1" in ran.err and "request 4" in ran.err and "contradict" in ran.err
    assert not home.folder.exists()


def test_outcomes_and_probabilities_are_of_all_requests(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(THREE, editor="finetune", hparams={"steps": 12, "learning_rate": 0.01})
    audit = guard.apply(plan.plan_id)
    p = audit.target_probabilities
    for row, request in zip(audit.outcomes, THREE, strict=True):
        new, old = guard.handle.token_logprobs([request.filled] * 2, [request.target_new, "Oslo"])
        assert row.p_new_after == pytest.approx(float(new.sum().exp()), rel=1e-4)
        assert row.holds is (float(new.mean()) > float(old.mean()))
    assert p["new_after"] == pytest.approx(sum(row.p_new_after for row in audit.outcomes) / 3)
    assert p["new_after_worst"] == min(row.p_new_after for row in audit.outcomes)
    assert p["old_after_worst"] == max(row.p_old_after or 0.0 for row in audit.outcomes)
    assert audit.drift is not None
    success, new = audit.drift.score("target_success"), audit.drift.score("target_p_new")
    assert success is not None and success.n == 3
    assert success.value == pytest.approx(sum(row.holds for row in audit.outcomes) / 3)
    assert new is not None and "the worst of 3 requests" in (new.reason or "")


# -- several layers


def two_layers(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: FinetuneHparams, inputs: SolveInputs
) -> EditDelta:
    """Fine-tuning of layer 0 and of layer 1, each as if alone: one delta of two layers."""
    parts = [solve_finetune(handle, requests, replace(hparams, layer=layer), inputs) for layer in (0, 1)]
    return EditDelta(parts[0].changes + parts[1].changes, "two-layers", parts[0].hparams, {})


def test_a_delta_of_two_layers_goes_the_whole_way_and_a_missing_statistic_goes_to_a_person(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EDITORS, "two-layers", Editor(FinetuneHparams, two_layers, "for tests", joint=True))
    limits = {"preop/leakage_share": ("<=", 1e9, "soft"), "postop/lineage_far_kl": ("<=", 100.0, "hard")}
    guard = home.guard(limits)
    plan = guard.plan(THREE, editor="two-layers")
    assert {change.layer for change in plan.delta.changes} == {0, 1}
    share, near = plan.risk.score("leakage_share"), plan.risk.score("rehearsed_near_kl")
    assert share is not None and share.value is None and "stats collect --layer 0" in (share.reason or "")
    assert near is not None and near.value is not None
    assert plan.judgement.outcome == "needs-approval"
    guard.approve(plan.plan_id, "looked at it: layer 0 has no statistics")
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "committed"
    # The keys of layer 1 have moved with layer 0: its statistics are the base's, which the next plan says.
    later = home.guard(limits)
    second = later.plan(request_of(1), editor="finetune")
    assert any("statistics of layer 1 are the base model's" in note for note in second.risk.notes)
    assert later.apply(second.plan_id).outcome == "committed"
    for edit, digest in ((second, audit.digest_after), (plan, plan.model_digest)):
        assert home.guard(limits).rollback(edit.plan_id).digest_after == digest
    assert home.guard().handle.digest() == plan.model_digest


# -- limits of one and of many


def test_a_rule_may_bind_single_plans_only_or_joint_plans_only(home: Home) -> None:
    rule = (
        '[[rule]]\nid = "{plans}"\nmetric = "preop/delta_norm_ratio"\nop = "<="\nlimit = 0.0\nlevel = "hard"\n'
        'plans = "{plans}"\nsentence = "The update has {{value}} times the norm."\n'
    )
    outcomes = {}
    for plans in ("one", "many"):
        path = home.folder.parent / f"{plans}.toml"
        path.write_text(policy_text() + rule.format(plans=plans), encoding="utf-8")
        guard = home.guard(policy=path)
        made = guard.plan(THREE[0], editor="finetune"), guard.plan(THREE, editor="finetune")
        outcomes[plans] = tuple(plan.judgement.outcome for plan in made)
    assert outcomes == {"one": ("blocked", "auto-approved"), "many": ("auto-approved", "blocked")}


def test_percentiles_are_given_where_the_bank_of_single_edits_is_comparable(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guardedit.gate.reference import ReferenceBank
    from guardedit.risk.measure import SCORES

    values = {f"preop/{name}": tuple(float(i) for i in range(30)) for name in SCORES}
    bank = ReferenceBank(model="m", editor="rome", layer=1, n=30, seed=0, protocol="", values=values)
    guard = home.guard()
    vars(guard)["kit"] = replace(guard.kit, preop_bank=bank)
    ranked = {}
    for name, asked in (("one", THREE[0]), ("many", THREE)):
        plan = guard.plan(asked, editor="finetune")
        ranked[name] = {score.stage for score in plan.risk.scores if score.percentile is not None}
    assert ranked == {"one": {"key", "delta", "rehearsal"}, "many": {"key"}}
