"""The whole report: deterministic, without a trace in the model, and rehearsal tells what a write would do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from edits_helpers import everything

from guardedit.edits.deltas import EditDelta, LowRank, written
from guardedit.errors import BadRequestError, SolveError
from guardedit.models.handle import ModelHandle
from guardedit.records import EditRequest, RiskReport, Scope, canonical
from guardedit.risk import compare, rehearsal
from guardedit.risk.context import RiskContext
from guardedit.risk.key_stage import measure_key
from guardedit.risk.key_view import views_of
from guardedit.risk.measure import SCORES, measure
from guardedit.risk.neighbours import ProbeSizes
from guardedit.risk.rehearsal import RehearsalView, rehearse
from guardedit.risk.scores import mean_with_interval
from tests.risk_helpers import (
    TOWER,
    WIDTH,
    delta_of,
    some_keys,
    world,
)

NAMES = {
    "key_leakage", "key_near_interference", "key_norm", "subject_position", "sae_view", "neuron_polysemanticity",
    "neuron_entropy_twin", "key_participation", "conflict_old_nats", "conflict_new_nats",
    "overwritten_belief",
    "leakage", "leakage_share", "leakage_tail", "near_interference", "protected_interference_facts",
    "protected_interference_python", "protected_interference_prose", "latent_leak", "latent_leak_count",
    "leakage_explained", "delta_norm_ratio",
    "rehearsed_subject_kl", "rehearsed_subject_lost_top1", "rehearsed_near_kl", "rehearsed_near_lost_top1",
    "rehearsed_namesake_kl", "rehearsed_namesake_lost_top1",
    "rehearsed_entailed_kl", "rehearsed_p_new", "rehearsed_p_old",
}  # fmt: skip
"""The names that policies and MLflow rely on."""
SECOND = EditRequest(subject="Italy", prompt="The capital of {} is", target_new="Milan", target_true="Rome")


def zero(handle: ModelHandle) -> EditDelta:
    return delta_of(handle, LowRank(torch.zeros(32, 1).double(), torch.zeros(1, WIDTH).double()))


def plain(report: RiskReport) -> bytes:
    return canonical(report.model_copy(update={"seconds": {}}))


def test_the_report_has_every_score_that_policies_name(tiny: ModelHandle) -> None:
    ctx, delta = world(tiny)
    report = measure(ctx, [TOWER], delta)
    assert set(SCORES) == NAMES == {score.name for score in report.scores}
    assert [score.name for score in report.scores if score.value is None] == []
    assert report.latents and report.tokens and report.probes
    assert sorted(report.seconds) == ["delta", "key", "rehearsal"]


def test_the_same_inputs_give_the_same_report(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    again, _ = world(tiny_llama)
    assert plain(measure(ctx, [TOWER], delta)) == plain(measure(again, [TOWER], delta))


def test_measuring_leaves_the_model_and_its_random_state_as_they_were(tiny: ModelHandle) -> None:
    ctx, delta = world(tiny)
    tiny.model.train()
    flags = {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()}
    manifest, state = tiny.manifest(), torch.random.get_rng_state()
    try:
        measure(ctx, [TOWER], delta)
        assert tiny.manifest() == manifest and tiny.model.training
        assert torch.equal(torch.random.get_rng_state(), state)
        assert {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()} == flags
    finally:
        tiny.model.eval()


def test_a_rehearsal_that_raises_leaves_the_model_as_it_was_and_says_so(
    tiny_llama: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, delta = world(tiny_llama)
    manifest = tiny_llama.manifest()

    @contextmanager
    def breaking(handle: ModelHandle, delta: EditDelta) -> Iterator[Any]:
        with original(handle, delta):
            yield handle
            raise SolveError("broke under way")

    original = compare.rehearsed
    monkeypatch.setattr(compare, "rehearsed", breaking)
    monkeypatch.setattr(rehearsal, "rehearsed", breaking)
    report = measure(ctx, [TOWER], delta)
    rehearsed = [score for score in report.scores if score.stage == "rehearsal"]
    assert all(score.value is None and "broke" in (score.reason or "") for score in rehearsed)
    assert all(score.value is not None for score in report.scores if score.stage != "rehearsal")
    assert tiny_llama.manifest() == manifest and report.probes == ()


def test_a_bug_in_the_rehearsal_surfaces_and_leaves_no_hook(
    tiny_llama: ModelHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, delta = world(tiny_llama)
    monkeypatch.setattr(compare, "_compared", lambda *_: 1 / "a bug")  # type: ignore[operator]
    with pytest.raises(TypeError):
        measure(ctx, [TOWER], delta)


def test_nan_in_a_delta_gives_no_delta_and_no_rehearsal_score(tiny_llama: ModelHandle) -> None:
    ctx, _ = world(tiny_llama)
    broken = delta_of(tiny_llama, LowRank(torch.full((32, 1), torch.nan).double(), some_keys(1)))
    report = measure(ctx, [TOWER], broken)
    for score in report.scores:
        assert (score.value is not None) == (score.stage == "key"), score


def test_no_requests_are_an_error_and_not_an_empty_report(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    with pytest.raises(BadRequestError):
        measure(ctx, [], delta)


def test_the_zero_delta_changes_nothing_exactly(tiny: ModelHandle) -> None:
    ctx, _ = world(tiny)
    report = measure(ctx, [TOWER], zero(tiny))
    values = {score.name: score.value for score in report.scores}
    for name in ("leakage", "leakage_tail", "near_interference", "delta_norm_ratio", "latent_leak"):
        assert values[name] == 0.0, name
    for name in NAMES:
        if name.startswith("rehearsed") and not name.startswith("rehearsed_p"):
            assert values[name] == pytest.approx(0.0, abs=1e-9), name
    assert all(probe.before == probe.after for probe in report.probes)


def test_rehearsal_tells_what_the_written_model_does(tiny: ModelHandle) -> None:
    ctx, delta = world(tiny)
    view = RehearsalView(ctx, views_of(ctx, [TOWER]), delta)
    assert max(one.kl_nats for one in view.compared[0]) > 0.01
    for one in view.compared[0][::5]:
        before = last_logprobs(tiny, one.prompt)
        with written(tiny, delta):
            after = last_logprobs(tiny, one.prompt)
        kl = float((before.exp() * (before - after)).sum())
        assert one.kl_nats == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert one.top_after == int(after.argmax())
    with written(tiny, delta):
        (logprobs,) = tiny.token_logprobs([TOWER.filled], [TOWER.target_new])
    assert view.probabilities[0, TOWER.target_new] == pytest.approx(float(logprobs.sum().exp()), rel=1e-3)


def last_logprobs(handle: ModelHandle, prompt: str) -> torch.Tensor:
    batch = handle.encode([prompt])
    with torch.no_grad():
        logits = handle.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[0, -1].double().log_softmax(-1)


def test_a_delta_of_everything_is_rehearsed_and_has_no_closed_form(tiny: ModelHandle) -> None:
    """What it does to a key is not ΔW x, so those scores are missing, which the gate takes to a person."""
    ctx, _ = world(tiny)
    delta, digest = everything(tiny, 0.01), tiny.digest()
    report = measure(ctx, [TOWER], delta)
    for score in report.scores:
        closed = score.stage == "delta" and score.name != "delta_norm_ratio"
        assert (score.value is None) == closed, score
        assert not closed or "not only rewrite modules" in (score.reason or "")
    assert report.probes and not report.tokens and not report.latents and tiny.digest() == digest
    shown = next(probe for probe in report.probes if probe.scope == "near")
    before = last_logprobs(tiny, shown.prompt)
    with written(tiny, delta):
        after = last_logprobs(tiny, shown.prompt)
    assert shown.kl_nats == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3)


def test_attention_is_rehearsed_from_its_own_block_on(tiny: ModelHandle) -> None:
    changes = [c for c in everything(tiny, 0.05).changes if c.layer == 2 and not c.rewrites]
    delta = EditDelta(tuple(changes), "test", {}, {})
    (one,) = compare.compare(tiny, delta, [TOWER.filled], ["target"])
    before = last_logprobs(tiny, TOWER.filled)
    with written(tiny, delta):
        after = last_logprobs(tiny, TOWER.filled)
    assert one.kl_nats == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3) != 0


def test_every_scope_has_the_prompts_asked_for(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    risk = rehearse(ctx, [TOWER], delta)
    sizes: dict[Scope, int] = {
        "subject": ctx.sizes.subject,
        "near": ctx.sizes.near,
        "namesake": ctx.sizes.namesake,
    }
    by_name = {score.name: score for score in risk.scores}
    assert by_name["rehearsed_subject_kl"].n == sizes["subject"]
    assert by_name["rehearsed_near_lost_top1"].n == sizes["near"]
    assert by_name["rehearsed_namesake_lost_top1"].n == sizes["namesake"] == len(risk.prompts[0].namesake)
    assert len(risk.prompts[0].subject) == sizes["subject"]
    assert {probe.scope for probe in risk.probes} == {"target", "subject", "near", "namesake", "entailed"}


def test_several_requests_share_the_prompts_and_are_measured_as_one(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    report = measure(ctx, [TOWER, SECOND], delta)
    near = report.score("rehearsed_near_kl")
    assert near is not None and near.n == ctx.sizes.near
    leaks = [measure_key(ctx, request).scores[0].value for request in (TOWER, SECOND)]
    worst = report.score("key_leakage")
    assert worst is not None and worst.value == pytest.approx(max(leak or 0.0 for leak in leaks))
    assert worst.reason is not None and "the worst of 2 requests" in worst.reason


def test_a_scope_without_prompts_has_no_score(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    nameless = EditRequest(subject="Zorblax", prompt="The {} quarvels the", target_new="moon")
    report = measure(ctx, [nameless], delta)
    entailed = report.score("rehearsed_entailed_kl")
    assert entailed is not None and entailed.value is None and "no prompts" in (entailed.reason or "")


def test_inputs_name_everything_that_the_scores_rest_on(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    inputs = measure(ctx, [TOWER], delta).inputs
    wanted = {"second_moment_corpus", "key_bank", "protected_bank", "key_sae", "requests", "delta", "prompts"}
    assert wanted <= set(inputs)
    other = measure(
        ctx, [TOWER.model_copy(update={"same_subject": ("The Eiffel Tower weighs",)})], delta
    ).inputs
    assert other["prompts"] != inputs["prompts"] and other["key_bank"] == inputs["key_bank"]


def test_fewer_prompts_may_be_asked_for(tiny_llama: ModelHandle) -> None:
    ctx, delta = world(tiny_llama)
    small = RiskContext(**{**fields(ctx), "sizes": ProbeSizes(subject=3, near=5, entailed=0, target=1)})
    by_name = {score.name: score.n for score in rehearse(small, [TOWER], delta).scores}
    assert (by_name["rehearsed_subject_kl"], by_name["rehearsed_near_kl"]) == (3, 5)


def fields(ctx: RiskContext) -> dict[str, Any]:
    return {name: getattr(ctx, name) for name in RiskContext.__dataclass_fields__}


def test_the_interval_covers_the_mean_and_is_a_point_where_all_are_equal() -> None:
    spread = mean_with_interval([0.0, 1.0, 2.0, 5.0], seed=0)
    assert spread.low is not None and spread.high is not None
    assert spread.low < spread.value < spread.high
    same = mean_with_interval([0.5] * 4, seed=0)
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ZeroDivisionError):
        mean_with_interval([], seed=0)
