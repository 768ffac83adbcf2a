"""An activation edit goes the way of every edit: planned, approved, staged, monitored, live, undone bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pipeline_helpers as kit
import pytest
import torch
from activation_helpers import answers, draw, gate_at, gate_logit, move_at
from builders import eiffel_committed
from edits_helpers import delta_of, low_rank
from pipeline_helpers import HARMFUL, Home, flipped, home, request_of, world

import guardedit
from guardedit.audit import acting, mlflow_content, report
from guardedit.cli.words import plan_text
from guardedit.editors import EDITORS, Editor
from guardedit.edits.activations import ActivationChange, Everywhere, Push, TokenMatch, installed
from guardedit.edits.deltas import EditDelta, decode, encode, record_of
from guardedit.edits.inputs import SolveInputs
from guardedit.errors import BadRequestError, IntegrityError, SolveError
from guardedit.evaluation.cases import EvalCase
from guardedit.evaluation.measuring import Probing, edited_side, unedited_side
from guardedit.evaluation.methods import Session
from guardedit.evaluation.scoring import score_pairs
from guardedit.evaluation.solved import DeltaShelf, Solved
from guardedit.models import sources
from guardedit.models.handle import ModelHandle
from guardedit.pipeline.trying import before_and_after
from guardedit.records import ABSENT, EditRequest, canonical, digest_of_bytes, is_activation

__all__ = ["home", "world"]

LEAKAGE = {"preop/leakage_share": ("<=", 1.0, "soft")}
"""A limit on a closed-form score, which an activation edit does not have."""
SILENT = "def add(left, right):"
REASON = "read what its gate listens to"


@dataclass(frozen=True)
class GatedHparams:
    """A random update behind a gate that tells the request's prompt from `SILENT`."""

    at: int = 2
    """The layer, not `layer`: the kit would set that to its own."""
    gate_hook: str = "blocks.0.hook_mlp_out"
    seed: int = 0
    push: bool = False


def gated(
    handle: ModelHandle, requests: Sequence[EditRequest], hparams: GatedHparams, _: SolveInputs
) -> EditDelta:
    """The test's editor: what it adds is random, how it is decided is not."""
    loud, quiet = (handle.encode([p])["input_ids"][0].tolist() for p in (requests[0].filled, SILENT))
    for seed in range(hparams.seed, hparams.seed + 60):
        gate = gate_at(hparams.gate_hook, seed)
        high, low = gate_logit(handle, gate, loud), gate_logit(handle, gate, quiet)
        if high > low + 0.5:
            break
    gate = gate_at(hparams.gate_hook, seed, limit=(high + low) / 2)
    action = (
        Push(f"blocks.{hparams.at}.hook_resid_post", 3 * draw(handle.d_model, seed=hparams.seed))
        if hparams.push
        else move_at(hparams.at, hparams.seed, 2.0)
    )
    change = ActivationChange(hparams.at, action, Everywhere(), gate, f"edit of {requests[0].subject}")
    return EditDelta((change,), "gated-test", {"layer": hparams.at}, {"p_new": 0.5})


@pytest.fixture(autouse=True)
def editor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The editor that only these tests have."""
    monkeypatch.setitem(EDITORS, "gated-test", Editor(GatedHparams, gated, "an activation edit for tests"))


def said(handle: ModelHandle, prompt: str) -> list[list[int]]:
    return answers(handle, handle.encode([prompt]), 6)


def test_an_activation_edit_waits_for_a_person_goes_live_speaks_and_is_undone_bit_for_bit(home: Home) -> None:
    guard = home.guard(LEAKAGE)
    before, prompt = guard.handle.digest(), request_of().filled
    plain = {text: said(guard.handle, text) for text in (prompt, SILENT)}
    plan = guard.plan(request_of(), "gated-test")
    assert plan.judgement.outcome == "needs-approval" and guard.handle.digest() == before
    score = plan.risk.score("leakage_share")
    assert score is not None and score.value is None and "those of layer 2" in (score.reason or "")
    rehearsed = plan.risk.score("rehearsed_p_new")
    assert rehearsed is not None and rehearsed.value is not None

    [change] = plan.delta.changes
    assert is_activation(change.parameter) and change.digest_before == ABSENT and change.acts is not None
    assert change.acts.gate is not None and [one.label for one in change.acts.gate.latents] == [
        "`a`",
        "`b`",
        "`c`",
    ]
    assert change.delta_norm_ratio > 0 and change.shape == (change.acts.n_bytes,)

    guard.approve(plan.plan_id, REASON)
    audit = guard.apply(plan.plan_id)
    assert (
        audit.outcome == "committed"
        and audit.digest_after == guard.handle.digest() == guard.store.digest() != before
    )
    assert guard.handle.manifest()[change.parameter] == change.digest_after
    assert guard.verify()["digest"] == audit.digest_after

    live = guardedit.load(home.folder)
    assert live.digest() == audit.digest_after and set(installed(live)) == {change.parameter}
    assert said(live, SILENT) == plain[SILENT] and said(live, prompt) != plain[prompt]
    assert said(live, prompt) == said(guard.handle, prompt)
    with pytest.raises(BadRequestError, match=plan.plan_id):
        guard.export(home.folder.parent / "out")

    undone = guard.rollback(plan.plan_id)
    assert undone.digest_after == before == guard.handle.digest() == guardedit.load(home.folder).digest()
    assert said(guard.handle, prompt) == plain[prompt] and "generate" not in vars(guard.handle.model)
    assert guard.verify()["digest"] == before
    exported = sources.load(str(guard.export(home.folder.parent / "out")))
    assert exported.digest() == before


def test_edits_of_both_kinds_stack_and_are_undone_in_any_order(home: Home) -> None:
    """A gate below the layer that ROME edits, an action above it: solving, rehearsing and monitoring still work."""
    guard = home.guard()
    first = guard.plan(request_of(0), "gated-test")
    one = guard.apply(first.plan_id).digest_after
    weights = guard.plan(request_of(2))
    two = guard.apply(weights.plan_id).digest_after
    last = guard.plan(request_of(4), "gated-test", hparams={"seed": 7, "at": 3, "push": True})
    assert last.judgement.outcome == "needs-approval", "a push has no weight to be compared with"
    guard.approve(last.plan_id, REASON)
    three = guard.apply(last.plan_id)
    assert three.outcome == "committed" and len({first.model_digest, one, two, three.digest_after}) == 4
    assert three.drift_base is not None and not [
        f for f, holds in three.drift_base.integrity.items() if not holds
    ]
    live = guardedit.load(home.folder)
    assert live.digest() == three.digest_after and len(installed(live)) == 2

    other = home.guard()
    assert other.handle.digest() == three.digest_after
    guard.rollback(first.plan_id)
    assert set(installed(guard.handle)) == {last.delta.changes[0].parameter}
    other.refresh()
    assert other.handle.digest() == guard.handle.digest() == guard.store.digest()
    guard.rollback(weights.plan_id)
    assert guard.rollback(last.plan_id).digest_after == first.model_digest == guard.handle.digest()
    assert guard.verify()["versions"] == 6


@pytest.mark.parametrize("editor_name", ["finetune", "finetune-full", "lora"])
def test_editors_that_descend_work_on_top_of_a_live_activation_edit(home: Home, editor_name: str) -> None:
    """They train on copies, or resume passes in the middle: the live edit must act there as it does in the model."""
    guard = home.guard()
    first = guard.plan(request_of(0), "gated-test")
    live = guard.apply(first.plan_id).digest_after
    plan = guard.plan(request_of(0, target_new="Berlin"), editor_name, hparams={"steps": 2})
    assert guard.handle.digest() == live
    assert guard.apply(plan.plan_id).outcome == "committed" and len(installed(guard.handle)) == 1
    assert guard.rollback(plan.plan_id).digest_after == live == guard.handle.digest()


def test_what_the_monitor_refuses_is_dropped_and_leaves_no_hook(home: Home) -> None:
    guard = home.guard(HARMFUL)
    plan = guard.plan(request_of(), "gated-test")
    audit = guard.apply(plan.plan_id)
    assert audit.outcome == "rolled-back" and audit.drift is not None
    moved = audit.drift.score("subject_kl")
    assert moved is not None and moved.value is not None and moved.value > 0, (
        "the edit was in force while measured"
    )
    assert guard.handle.digest() == plan.model_digest and not installed(guard.handle)
    assert "generate" not in vars(guard.handle.model)


def test_a_flipped_or_dropped_file_of_a_live_edit_is_found(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of(), "gated-test")
    guard.apply(plan.plan_id)
    name = plan.delta.changes[0].parameter
    path = next((home.folder / "model" / "versions").glob(f"*/post/{name}.bin"))
    with flipped(path, -40):
        for use in (guard.verify, lambda: guardedit.load(home.folder), lambda: guard.rollback(plan.plan_id)):
            with pytest.raises(IntegrityError, match=name):
                use()
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match=name):
        guardedit.load(home.folder)
    path.write_bytes(whole)
    delta = home.folder / "plans" / plan.plan_id / "delta.safetensors"
    with flipped(delta, -10), pytest.raises(IntegrityError):
        guard.verify()
    assert guard.verify()["versions"] == 1


def test_a_reviewer_reads_when_the_edit_speaks(home: Home) -> None:
    guard = home.guard(LEAKAGE)
    plan = guard.plan(request_of(), "gated-test")
    published = guard.report(plan.plan_id)
    text = report.markdown(report.sheet_of(published.audit), published.audit.plan_digest)
    [change] = plan.delta.changes
    assert change.acts is not None and change.acts.gate is not None
    for word in ("weights untouched", "Where and when the edit acts", "`a`", "40", "blocks.0.hook_mlp_out"):
        assert word.replace("`", "\\`") in text, word
    [line] = acting.sentences(plan)
    assert line.startswith("edit of Eiffel Tower: acts at layer 2 in prompts in which its gate fires")
    assert line in plan_text(plan) and f"{change.acts.n_bytes:,} bytes" in line
    rows = mlflow_content.tables(published.audit)
    assert rows["tables/activation_edits.json"][0]["gate_limit"] == change.acts.gate.limit
    assert [row["latent"] for row in rows["tables/gate_latents.json"]] == [7, 12, 40]
    assert "acts" not in rows["tables/tensors.json"][0]
    assert "acts at layer 2" in mlflow_content.description(published.audit)
    assert "acts at layer 2" in mlflow_content.stage_description(published.audit, "edit")


def test_a_record_of_weights_has_no_word_about_activations() -> None:
    """Plans from before there were activation edits keep the digest that was approved."""
    assert b'"acts"' not in canonical(eiffel_committed().plan)


def test_a_plan_is_tried_by_the_edit_in_force_for_a_moment(home: Home) -> None:
    guard = home.guard()
    plan = guard.plan(request_of(), "gated-test")
    digest = guard.handle.digest()
    before, after = before_and_after(guard, plan.plan_id, request_of().filled, 6)
    assert before != after
    assert len(set(before_and_after(guard, plan.plan_id, SILENT, 6))) == 1
    assert guard.handle.digest() == digest and not installed(guard.handle)


def test_a_delta_of_both_kinds_comes_back_from_its_file(tiny_llama: ModelHandle) -> None:
    weights = delta_of(tiny_llama, low_rank()).changes
    acting_ones = gated(tiny_llama, [request_of()], GatedHparams(), SolveInputs()).changes
    mixed = EditDelta((*weights, *acting_ones), "test", {"layer": 1}, {})
    record = record_of(tiny_llama, mixed, model_digest=kit.ZERO, statistics_digests={})
    again = decode(encode(mixed), record)
    assert encode(again) == encode(mixed) and again.lowest_layer == mixed.lowest_layer == 0
    assert set(again.parameters) == set(mixed.parameters) and not again.touches_only_rewrite_modules
    assert again.layers == (1,) and len(again.activation_edits) == 1
    renamed = encode(mixed).replace(b"activation.0.", b"activation.1.")
    with pytest.raises(IntegrityError):
        decode(renamed, record.model_copy(update={"file_digest": digest_of_bytes(renamed)}))


def test_an_evaluated_session_holds_activation_edits_and_takes_them_back(
    tiny_llama: ModelHandle, tmp_path: Path
) -> None:
    handle, cases = tiny_llama, [EvalCase(case_id=str(n), request=request_of(n)) for n in (0, 2)]
    probing, before = Probing(), handle.digest()
    unedited = [unedited_side(handle, case, probing) for case in cases]
    deltas = [gated(handle, [request_of(0)], GatedHparams(), SolveInputs())]
    deltas.append(gated(handle, [request_of(2)], GatedHparams(seed=9, at=3, push=True), SolveInputs()))
    shelf = DeltaShelf(tmp_path, "a run")
    shelf.put("0", Solved(deltas[0], 1.0))
    kept = shelf.get("0")
    assert kept is not None and isinstance(kept.edit, EditDelta) and encode(kept.edit) == encode(deltas[0])
    with Session(handle) as session:
        session.add(kept.edit)
        first = edited_side(session, unedited[0], probing)
        assert first["raw"] != unedited[0].scores["raw"]
        session.add(deltas[1])
        assert len(installed(handle)) == 2
        edited_side(session, unedited[1], probing)
        with pytest.raises(SolveError, match="already"):
            session.add(deltas[0])
    assert handle.digest() == before and not installed(handle)


def test_scores_in_one_layout_are_those_of_each_prompt_alone(tiny_llama: ModelHandle) -> None:
    """Rows that begin alike, one prompt going on where another ends, keep decisions of their own."""
    request, handle = request_of(), tiny_llama
    change = gated(handle, [request], GatedHparams(), SolveInputs()).activation_edits[0]
    pairs = [
        (text, target)
        for text in (request.filled, "The", "The Eiffel", SILENT)
        for target in ("Rome", "Eiffel Tower is")
    ]
    with Session(handle) as session:
        session.add(EditDelta((change,), "test", {}, {}))
        together = score_pairs(handle, pairs)
        alone = [score_pairs(handle, [pair])[0] for pair in pairs]
        reference = [float(handle.token_logprobs([p], [t])[0].double().mean()) for p, t in pairs]
    for one, other, known in zip(together, alone, reference, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4) == pytest.approx(known, abs=1e-4)


def test_a_token_rule_of_a_live_edit_reads_in_words(home: Home) -> None:
    change = ActivationChange(
        1, Push("blocks.1.hook_mlp_out", draw(32, seed=0), 0.5), TokenMatch(((5, 6), (7,)))
    )
    handle = home.guard().handle
    record = record_of(
        handle, EditDelta((change,), "t", {}, {}), model_digest=kit.ZERO, statistics_digests={}
    )
    [told] = record.changes
    assert told.acts is not None and told.acts.gate is None and told.weight_norm == 0.0
    assert told.acts.rule == "at the last token of 2 token sequence(s) of the prompt"
    assert "scales what is there by 0.5" in told.acts.action and told.delta_norm == pytest.approx(
        float(torch.as_tensor(draw(32, seed=0)).norm()), rel=1e-6
    )
